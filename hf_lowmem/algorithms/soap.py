"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_lowmem.algorithms.adamw import STORAGE
from hf_lowmem.algorithms.projected import LEFT_OUT, ProjectedRecipe, basis_dtype
from hf_lowmem.codecs import codec_for
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import Group, LowMemOptimizer
from hf_lowmem.param_groups import Treatment
from hf_lowmem.param_layouts import Roles
from hf_lowmem.projections import Eigenbasis
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE, StatePlan


class Soap(LowMemOptimizer):
    """Adam whose second moment lives in the eigenbasis of the gradient's row and column second moments.

        G' <- Q_L^T G Q_R                               (one of the two by default)
        m <- b1 m + (1 - b1) G
        v <- b2 v + (1 - b2) G'^2
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) Q_L (Q_L^T m Q_R / (sqrt(v) + eps)) Q_R^T
        W <- W - lr weight_decay W
        L <- s L + (1 - s) G G^T,  R likewise;  every `precondition_frequency` updates Q <- QR of L Q

    Source: arXiv:2409.11321, algorithm 3; authors' code nikhilvyas/SOAP@a1e5535. A parameter's first call takes no
    step: it only finds the basis.
    Departs from it: one side by default, the smaller; each expert of a stack has its own bases; L and R are float32
    whatever the weight's dtype. It is for quality, not for memory.

    State per (m, n) weight: exp_avg and exp_avg_sq (m, n), gram_<axis> (d, d) in float32 and proj_<axis> (d, d) in
    float32 or bfloat16 for each preconditioned axis of size d; proj_count; step. In 8 bits exp_avg and exp_avg_sq are
    as in `LowMemAdamW`.

    Args:
        sides: "one" preconditions the smaller of the two matrix axes, "both" every axis.
        precondition_frequency: updates between two changes of the basis.
        max_precond_dim: larger axes get no basis.
        proj_bits: 32 or 16, bits of the bases; by default 16 where `state_bits` is below 32.
        shampoo_beta: decay of L and R; `betas[1]` where it is None.
        correct_bias: correct the moments' bias.
        normalize_grads: scale every update to unit root mean square; the authors advise it for frequencies near 100.
        project: whether the group's weights are preconditioned at all.
        stacked: whether 3-D weights are stacks of matrices.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range.
    """

    algorithm = "soap"
    rule = "soap"
    idle_calls = 1
    layout_options: ClassVar[dict[str, Any]] = {
        **STORAGE,
        "sides": "one",
        "max_precond_dim": 10000,
        "proj_bits": None,
        "project": True,
        "stacked": False,
    }
    schedule_options: ClassVar[dict[str, Any]] = {"precondition_frequency": 10, "shampoo_beta": None}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        sides: str = "one",
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        proj_bits: int | None = None,
        shampoo_beta: float | None = None,
        correct_bias: bool = True,
        normalize_grads: bool = False,
        project: bool = True,
        stacked: bool = False,
        state_bits: int = 32,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        compile: bool = False,
        roles: Roles | None = None,
        **options: Any,
    ) -> None:
        own: dict[str, Any] = dict(
            sides=sides,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            proj_bits=proj_bits,
            shampoo_beta=shampoo_beta,
            project=project,
            stacked=stacked,
        )
        flags: dict[str, Any] = dict(correct_bias=correct_bias, normalize_grads=normalize_grads)
        storage: dict[str, Any] = dict(
            state_bits=state_bits, block_size=block_size, min_8bit_size=min_8bit_size, compile=compile
        )
        super().__init__(params, lr, betas, eps, weight_decay, roles=roles, **own, **flags, **storage, **options)

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        codec = codec_for(shape, options["state_bits"], options["block_size"], options["min_8bit_size"])
        axes = basis_axes(shape, options)
        schedule = (options["precondition_frequency"], options["shampoo_beta"])
        projection = Eigenbasis(axes, options["stacked"], basis_dtype(options), *schedule) if axes else FULL_SPACE
        moments = {"exp_avg": Full(), "exp_avg_sq": Full(signed=False)}
        return StatePlan(moments, codec, projection, stacked=options["stacked"])

    def rule_of(self, plan: StatePlan, group: Group) -> str:
        plain = plan.projection is FULL_SPACE and not group["normalize_grads"]
        return "transformers_adamw" if plain else self.rule


def basis_axes(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[int, ...]:
    """The axes of a weight that are preconditioned; the expert axis never is, nor one of size 1."""
    if not options["project"] or len(shape) < 2 or 0 in shape:
        return ()
    axes = range(1 if options["stacked"] else 0, len(shape))
    if options["sides"] == "one":
        first, second = axes[:2]
        axes = range(first, first + 1) if shape[first] < shape[second] else range(second, second + 1)
    return tuple(axis for axis in axes if 1 < shape[axis] <= options["max_precond_dim"])


@dataclass(frozen=True)
class SoapRecipe(ProjectedRecipe):
    """`Soap`'s options.

    Args:
        sides, precondition_frequency, max_precond_dim, proj_bits, shampoo_beta, correct_bias, normalize_grads: see
            `Soap`.
    """

    sides: Literal["one", "both"] = "one"
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    proj_bits: Literal[32, 16] | None = None
    shampoo_beta: float | None = None
    correct_bias: bool = True
    normalize_grads: bool = False

    algorithm = "soap"
    optimizer_cls = Soap
    caution = (
        "SOAP is for quality, not for memory: its state takes {bytes:.2f} bytes per parameter here, where AdamW's "
        "takes about {adamw} in the same storage."
    )

    def shared_options(self) -> dict[str, Any]:
        own = (
            *("sides", "precondition_frequency", "max_precond_dim", "proj_bits", "shampoo_beta"),
            *("correct_bias", "normalize_grads"),
        )
        return {**super().shared_options(), **{name: getattr(self, name) for name in own}}

    def options_of(self, role: ParamRole, asked: Any) -> Treatment:
        if asked is not True:
            raise ValueError(f"{role.name}: a rank means nothing to soap; use true or false.")
        options: dict[str, Any] = {"stacked": True} if len(role.shape) == 3 else {}
        if not basis_axes(role.shape, {**self.optimizer_cls.plan_options(), **self.shared_options(), **options}):
            return LEFT_OUT, f"no side of more than 1 and at most max_precond_dim={self.max_precond_dim}"
        return options, "a basis for each expert" if options else "preconditioned"
