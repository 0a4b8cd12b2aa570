"""COAP: AdamW and Adafactor whose moments live in a low-rank space that follows the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.algorithms.projected import UNPROJECTED, ProjectedOptions, ProjectedRecipe, basis_dtype
from hf_lowmem.log import get_logger
from hf_lowmem.moments import Full, RowColMean
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import (
    NEGATIVE,
    POSITIVE,
    Hyperparameters,
    Legal,
    at_least,
    decided_by_role,
    flag,
    layout,
    schedule,
)
from hf_lowmem.param_groups import RoleOptions
from hf_lowmem.planned_optimizer import Group
from hf_lowmem.projections import BasisOptions, LowRank, Tucker
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE, Moment, Projection, StatePlan

logger = get_logger(__name__)

DEFAULT_RANK_RATIO = 4.0
MIN_CONV_SIZE = 32 * 32 * 3 * 3  # convolutions of no more entries are not projected
RATIO = Legal("at least 1: it is the smaller side over the rank", lambda value: 1 <= value < math.inf)


@dataclass(frozen=True)
class CoapOptions(ProjectedOptions):
    """The options of COAP's two optimizers."""

    rank: int | None = layout(
        None,
        "dimensions kept of each matrix's smaller side. A matrix whose smaller side is no larger is not projected, "
        "and keeps its moments whole in the same storage.",
        at_least(1),
    )
    rank_ratio: float | None = layout(
        None, "smaller side over dimensions kept, instead of `rank`; 4 where neither is given.", RATIO
    )
    conv_rank_ratio: float | None = layout(
        None,
        "`rank_ratio` of convolutions, whose two ranks are channels / sqrt(ratio); by default `rank_ratio`. With "
        "`rank` alone convolutions are not projected.",
        RATIO,
    )
    update_interval: int = schedule(32, "steps between two changes of the basis.", at_least(1))
    reproject_factor: int = schedule(
        5,
        "number of changes from one recomputed basis (Eq. 6 and 7) to the next; those between correct it (Eq. 5).",
        at_least(1),
    )
    scale: float = schedule(1.0, "factor of every projected update.", POSITIVE)
    restore_state: bool | Literal["reference"] = schedule(
        False,
        'carry the moments over a change of basis: true mixes the second by the squared rotation; "reference" does as '
        "the authors' code, which lets single steps grow a hundredfold; false leaves them.",
    )
    eq5_scale: Literal["none", "rms"] = schedule(
        "none",
        '"rms" scales the gradient to unit size in Eq. 5; with "none", the paper\'s, a large weight\'s basis does not '
        "move.",
    )
    align: Literal["sign", "none", "procrustes"] = schedule(
        "sign",
        'how a recomputed basis is brought near to the old one: "sign" chooses the signs of its vectors, "procrustes" '
        'rotates it, and "none" leaves it.',
    )
    transposed: bool = decided_by_role(False, "take weights as stored (fan_in, fan_out).")

    @classmethod
    def check_values(cls, values: Mapping[str, Any]) -> None:
        super().check_values(values)
        if values.get("rank") is not None and values.get("rank_ratio") is not None:
            raise ValueError(
                f"rank={values['rank']} and rank_ratio={values['rank_ratio']} both set the rank: give one of them."
            )


class Coap(LowMemOptimizer):
    """The base of COAP's two optimizers: the space of each weight, and when its basis changes.

    Without `roles`, matrices and large 4-D convolutions are projected, and 3-D weights where the group says that they
    are `stacked` matrices.
    """

    options_cls = CoapOptions

    def __init__(self, params: Any, *hyperparameters: Any, **options: Any) -> None:
        super().__init__(params, *hyperparameters, **options)
        self._say_what_is_kept_whole(0)
        self._is_built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as every optimizer does, and log which of its weights `rank` is too large for."""
        super().add_param_group(param_group)
        if getattr(self, "_is_built", False):
            self._say_what_is_kept_whole(len(self.param_groups) - 1)

    def _say_what_is_kept_whole(self, first: int) -> None:
        """Say once which weights of the groups from number `first` on a `rank` is too large for."""
        whole = []
        for group, layouts in zip(self.param_groups[first:], self._layouts[first:], strict=True):
            for param, (name, pairs, _) in zip(group["params"], layouts.layouts, strict=True):
                options, shape = dict(pairs), tuple(param.shape)
                if options["rank"] and (why := kept_whole(shape, options)):
                    whole.append(f"{name or f'one of shape {shape}'} ({why})")
        if whole:
            logger.warning("Weights that %s leaves unprojected: %d, such as %s.", self.algorithm, len(whole), whole[0])

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        projection = projection_for(shape, options)
        space = projection.space(shape, "exp_avg")[0]
        codec = codec_of(space, options, any_divisor=projection is not FULL_SPACE)
        moments = {"exp_avg": Full(), "exp_avg_sq": cls.second_moment(space)}
        return StatePlan(moments, codec, projection, stacked=options["stacked"])

    def _own_options(self, group: Group) -> dict[str, Any]:
        """Return the layout options that a group brings; its own rank or ratio replaces the default of both."""
        own = super()._own_options(group)
        given = {name: own[name] for name in ("rank", "rank_ratio") if own.get(name) is not None}
        return {**own, **dict.fromkeys({"rank", "rank_ratio"} - set(given), None)} if given else own

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        """Return how the second moment of a weight is represented whose moments have the shape `space`."""
        raise NotImplementedError


@dataclass(frozen=True)
class CoapAdamWOptions(CoapOptions):
    """The options of COAP with AdamW."""

    correct_bias: bool = flag(True, "correct the moments' bias.")


class CoapAdamW(Coap):
    """AdamW in a low-rank space of each weight's smaller side.

        g <- G P^T                                      (P G where the weight has more inputs than outputs)
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale (m / (sqrt(v) + eps)) P
        W <- W - lr weight_decay W

    Source: arXiv:2412.00071; authors' code bytedance/coap@deabc3a.
    It departs from them: moments are float32 or 8-bit whatever the weight's dtype, and in 8 bits v is stored as its
    root; a recomputed basis keeps its signs; carried-over second moments mix by the squared rotation; W is taken as
    (outputs, inputs) whatever its layout.

    The state of a projected (m, n) weight, where r is the rank, is exp_avg and exp_avg_sq (max(m, n), r) or
    (r, max(m, n)); proj (r, min(m, n)) in float32 or bfloat16; proj_count; and step. Other weights have the state of
    `LowMemAdamW`.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = CoapAdamW([weight], lr=1e-3, rank=4)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {name: tuple(tensor.shape) for name, tensor in optimizer.state[weight].items() if tensor.ndim}
    {'proj': (4, 64), 'exp_avg': (4, 128), 'exp_avg_sq': (4, 128)}
    """

    algorithm = "coap_adamw"
    rule = "transformers_adamw"
    options_cls = CoapAdamWOptions
    hyperparameters = Hyperparameters(eps=1e-6)

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        return Full(signed=False)


@dataclass(frozen=True)
class CoapAdafactorOptions(CoapOptions):
    """The options of COAP with Adafactor."""

    decay_rate: float = flag(-0.8, "exponent of the second moment's decay, below 0.", NEGATIVE)
    clip_threshold: float = flag(
        1.0, "largest root mean square of an update before the learning rate is applied.", POSITIVE
    )
    scale_parameter: bool = flag(False, "scale the learning rate by the weight's root mean square.")


class CoapAdafactor(Coap):
    """Adafactor with momentum in a low-rank space of each weight's smaller side.

        g <- G P^T;  b2 = 1 - t^decay_rate;  a = lr, or lr max(1e-3, rms(W)) with scale_parameter
        row <- b2 row + (1 - b2) mean_columns(g^2 + 1e-30);  col likewise over rows
        u <- g / sqrt(row / mean(row) col);  u <- u / max(1, rms(u) / clip_threshold)
        m <- b1 m + (1 - b1) a u
        W <- W - a weight_decay W - scale m P

    Source: arXiv:2412.00071 and arXiv:1804.04235; authors' code bytedance/coap@deabc3a.
    It departs from them as `CoapAdamW` does. The first moment cannot be left out, as Eq. 5 needs it; `scale_parameter`
    is off by default, as in the Trainer's own Adafactor; statistics of stacked experts are each expert's own.

    The state of a projected (m, n) weight, where r is the rank, is exp_avg (max(m, n), r) or (r, max(m, n));
    exp_avg_sq_row and exp_avg_sq_col, one float32 number for each of its rows and columns; proj; proj_count; and step.
    Vectors keep a full exp_avg_sq. `betas[1]` and `eps` are accepted so that a Trainer's arguments fit, and not used.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = CoapAdafactor([weight], lr=1e-3, rank=4)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {name: tuple(tensor.shape) for name, tensor in optimizer.state[weight].items() if tensor.ndim}
    {'proj': (4, 64), 'exp_avg': (4, 128), 'exp_avg_sq_row': (4,), 'exp_avg_sq_col': (128,)}
    """

    algorithm = "coap_adafactor"
    rule = "adafactor"
    options_cls = CoapAdafactorOptions

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        return RowColMean() if len(space) > 1 else Full(signed=False)


def projection_for(shape: tuple[int, ...], options: Mapping[str, Any]) -> Projection:
    """Return the space that a weight's moments live in under its options."""
    basis = BasisOptions(
        dtype=basis_dtype(options),
        update_interval=options["update_interval"],
        reproject_factor=options["reproject_factor"],
        scale=options["scale"],
        restore_state={True: "squared", False: "none"}.get(options["restore_state"], options["restore_state"]),
        eq5_scale=options["eq5_scale"],
        align=options["align"],
    )
    if not options["project"] or 0 in shape:
        return FULL_SPACE
    if is_matrix(shape, options):
        return (
            FULL_SPACE if kept_whole(shape, options) else LowRank(kept(shape, options), options["transposed"], basis)
        )
    conv_ratio = options["conv_rank_ratio"] or ratio_of(options)
    if len(shape) == 4 and math.prod(shape) > MIN_CONV_SIZE and conv_ratio is not None:
        return Tucker(shape, tucker_ranks(shape, conv_ratio), basis)
    return FULL_SPACE


def is_matrix(shape: tuple[int, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a weight is a matrix or a stack of them."""
    return len(shape) == 2 or (len(shape) == 3 and options["stacked"])


def ratio_of(options: Mapping[str, Any]) -> float | None:
    """Return a matrix's smaller side over the dimensions kept; None where `rank` says how many those are."""
    given: float | None = options["rank_ratio"]
    return DEFAULT_RANK_RATIO if given is None and options["rank"] is None else given


def kept(shape: tuple[int, ...], options: Mapping[str, Any]) -> int:
    """Return the number of dimensions kept of a matrix's smaller side."""
    ratio = ratio_of(options)
    return int(options["rank"]) if ratio is None else max(int(min(shape[-2:]) / ratio), 1)


def kept_whole(shape: tuple[int, ...], options: Mapping[str, Any]) -> str:
    """Return why a matrix that could be projected is not; "" where it is projected, or is no matrix to project."""
    if not options["project"] or 0 in shape or not is_matrix(shape, options):
        return ""
    short, rank = min(shape[-2:]), kept(shape, options)
    return f"its smaller side is {short}: rank {rank} would keep all of it" if rank >= short else ""


def tucker_ranks(shape: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Return the rank of the output channels for a kernel of width 1, else those of output and input channels."""
    if shape[3] == 1:
        return (max(int(shape[0] / ratio), 1),)
    return tuple(max(int(channels / math.sqrt(ratio)), 1) for channels in shape[:2])


@dataclass(frozen=True)
class CoapRecipe(ProjectedRecipe, CoapOptions):
    """COAP, and which weights it projects."""

    def projected(self, role: ParamRole, asked: Any) -> RoleOptions:
        options: dict[str, Any] = {}
        if len(role.shape) == 4 and asked is not True:
            raise ValueError(f"{role.name}: a convolution takes no rank by rule, use true and conv_rank_ratio.")
        if len(role.shape) < 4 and role.fan_out == len(role.shape) - 1:
            options["transposed"] = True
        if len(role.shape) == 3:
            options["stacked"] = True
        if asked is not True:
            options |= {"rank": asked, "rank_ratio": None}
        values = self.plan_options(options)
        if why := kept_whole(role.shape, values):
            if asked is not True:
                raise ValueError(
                    f"{role.name} of shape {role.shape} cannot be projected with rank {asked}: use a rank below "
                    f"{min(role.shape[-2:])}, its smaller side, or false."
                )
            return options, why
        if projection_for(role.shape, values) is not FULL_SPACE:
            return options, "a rank for each expert" if role.expert_axis == 0 else "low rank"
        small = math.prod(role.shape) <= MIN_CONV_SIZE
        why = "a small convolution" if small else "a convolution, and rank is given without conv_rank_ratio"
        return UNPROJECTED, why


@dataclass(frozen=True)
class CoapAdamWRecipe(CoapRecipe, CoapAdamWOptions):
    """COAP with AdamW."""

    optimizer_cls = CoapAdamW


@dataclass(frozen=True)
class CoapAdafactorRecipe(CoapRecipe, CoapAdafactorOptions):
    """COAP with Adafactor."""

    optimizer_cls = CoapAdafactor
