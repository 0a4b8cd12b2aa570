"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.algorithms.projected import UNPROJECTED, ProjectedOptions, ProjectedRecipe, basis_dtype
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import DECAY, Hyperparameters, at_least, flag, layout, schedule
from hf_lowmem.param_groups import RoleOptions
from hf_lowmem.projections import Eigenbasis
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE, StatePlan


@dataclass(frozen=True)
class SoapOptions(ProjectedOptions):
    """The options of SOAP."""

    sides: Literal["one", "both"] = layout(
        "one", '"one" preconditions the smaller of a weight\'s two matrix axes; "both" preconditions every axis.'
    )
    precondition_frequency: int = schedule(10, "updates between two changes of the basis.", at_least(1))
    max_precond_dim: int = layout(10000, "longest axis that gets a basis.", at_least(1))
    shampoo_beta: float | None = schedule(None, "decay of the factors L and R; by default `betas[1]`.", DECAY)
    correct_bias: bool = flag(True, "correct the moments' bias.")
    normalize_grads: bool = flag(
        False, "scale every update to unit root mean square, which the authors advise for frequencies near 100."
    )


class Soap(LowMemOptimizer):
    """Adam whose second moment lives in the eigenbasis of the gradient's row and column second moments.

        G' <- Q_L^T G Q_R                               (one of the two by default)
        m <- b1 m + (1 - b1) G
        v <- b2 v + (1 - b2) G'^2
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (Q_L^T m Q_R / (sqrt(v) + eps)) Q_R^T
        W <- W - lr weight_decay W
        L <- s L + (1 - s) G G^T,  R likewise;  every `precondition_frequency` updates Q <- QR of L Q

    Source: arXiv:2409.11321, algorithm 3; authors' code nikhilvyas/SOAP@a1e5535. The first call for a parameter finds
    its basis and does not update it.
    It departs from them: by default one side is preconditioned, the smaller; each expert of a stack has its own bases;
    L and R are float32 whatever the weight's dtype. SOAP is for quality, not for memory.

    The state of an (m, n) weight is exp_avg and exp_avg_sq (m, n); for each preconditioned axis of size d,
    gram_<axis> (d, d) in float32 and proj_<axis> (d, d) in float32 or bfloat16; proj_count; and step. In 8 bits
    exp_avg and exp_avg_sq are as in `LowMemAdamW`.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = Soap([weight], lr=3e-3)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> [name for name, tensor in optimizer.state[weight].items() if tensor.ndim]
    ['gram_0', 'proj_0', 'exp_avg', 'exp_avg_sq']
    """

    algorithm = "soap"
    rule = "soap"
    options_cls = SoapOptions
    hyperparameters = Hyperparameters(lr=3e-3, betas=(0.95, 0.95), weight_decay=0.01)
    idle_calls = 1

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        axes = basis_axes(shape, options)
        schedule = (options["precondition_frequency"], options["shampoo_beta"])
        projection = Eigenbasis(axes, options["stacked"], basis_dtype(options), *schedule) if axes else FULL_SPACE
        moments = {"exp_avg": Full(), "exp_avg_sq": Full(signed=False)}
        return StatePlan(moments, codec_of(shape, options), projection, stacked=options["stacked"])

    @classmethod
    def rule_of(cls, plan: StatePlan, group: Mapping[str, Any]) -> str:
        plain = plan.projection is FULL_SPACE and not group["normalize_grads"]
        return "transformers_adamw" if plain else cls.rule


def basis_axes(shape: tuple[int, ...], options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axes of a weight that are preconditioned, which the expert axis and axes of size 1 never are."""
    if not options["project"] or len(shape) < 2 or 0 in shape:
        return ()
    axes = range(1 if options["stacked"] else 0, len(shape))
    if options["sides"] == "one":
        first, second = axes[:2]
        axes = range(first, first + 1) if shape[first] < shape[second] else range(second, second + 1)
    return tuple(axis for axis in axes if 1 < shape[axis] <= options["max_precond_dim"])


@dataclass(frozen=True)
class SoapRecipe(ProjectedRecipe, SoapOptions):
    """SOAP, and which weights it preconditions."""

    optimizer_cls = Soap
    caution = (
        "SOAP is for quality, not for memory: its state takes {bytes:.2f} bytes per parameter here, where AdamW's "
        "takes about {adamw} in the same storage."
    )

    def projected(self, role: ParamRole, asked: Any) -> RoleOptions:
        if asked is not True:
            raise ValueError(f"{role.name}: a rank means nothing to soap; use true or false.")
        options: dict[str, Any] = {"stacked": True} if len(role.shape) == 3 else {}
        if not basis_axes(role.shape, self.plan_options(options)):
            return UNPROJECTED, f"no side of more than 1 and at most max_precond_dim={self.max_precond_dim}"
        return options, "a basis for each expert" if options else "preconditioned"
