"""COAP: AdamW and Adafactor whose moments live in a low-rank space that follows the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from hf_lowmem.algorithms.adamw import STORAGE
from hf_lowmem.algorithms.projected import LEFT_OUT, ProjectedRecipe, basis_dtype
from hf_lowmem.checks import check_one_rank
from hf_lowmem.codecs import codec_for
from hf_lowmem.log import get_logger
from hf_lowmem.moments import Full, RowColMean
from hf_lowmem.optimizer import Group, LowMemOptimizer
from hf_lowmem.param_groups import Treatment
from hf_lowmem.param_layouts import Roles
from hf_lowmem.projections import BasisOptions, LowRank, Tucker
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE, Moment, Projection, StatePlan
from hf_lowmem.update_rules import RULE_FLAGS

logger = get_logger(__name__)

DEFAULT_RANK_RATIO = 4.0
MIN_CONV_SIZE = 32 * 32 * 3 * 3  # smaller convolutions are not projected


class Coap(LowMemOptimizer):
    """What COAP's two optimizers share: the space of each weight, and when its basis changes.

    Without `roles`, matrices and large 4-D convolutions are projected, and 3-D weights where the group says that they
    are `stacked` matrices.

    Args:
        rank: dimensions kept of each matrix's smaller side. A matrix whose smaller side is no larger is not projected,
            and keeps its moments whole in the same storage.
        rank_ratio: smaller side over dimensions kept, instead of `rank`; 4 where neither is given.
        conv_rank_ratio: the same for convolutions, whose two ranks are channels / sqrt(ratio); default `rank_ratio`.
            With `rank` alone convolutions are not projected.
        update_interval: steps between two corrections of the basis (Eq. 5).
        reproject_factor: every so many corrections the basis is recomputed instead (Eq. 6 and 7).
        scale: factor of every projected update.
        restore_state: carry the moments over a change of basis: True mixes the second by the squared rotation,
            "reference" as the authors' code does, which lets single steps grow a hundredfold; False leaves them.
        eq5_scale: "rms" scales the gradient to unit size in Eq. 5; with "none", the paper's, a large weight's basis
            does not move.
        align: what a recomputed basis is matched to the old one by: "sign", "procrustes" or "none".
        proj_bits: 32 or 16, bits of the basis; by default 16 where `state_bits` is below 32.
        project: whether the group's weights are projected at all.
        transposed: whether they are stored (fan_in, fan_out).
        stacked: whether 3-D weights are stacks of matrices.
        block_size: largest 8-bit block of the projected moments: any divisor of their rows from 32 to it is taken
            before a short block.
        min_8bit_size: projected moments with fewer entries stay float32.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range, or `rank` together with `rank_ratio`.
    """

    layout_options: ClassVar[dict[str, Any]] = {
        **STORAGE,
        "rank": None,
        "rank_ratio": None,
        "conv_rank_ratio": None,
        "proj_bits": None,
        "project": True,
        "transposed": False,
        "stacked": False,
    }
    schedule_options: ClassVar[dict[str, Any]] = {
        "update_interval": 32,
        "reproject_factor": 5,
        "scale": 1.0,
        "restore_state": False,
        "eq5_scale": "none",
        "align": "sign",
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        compile: bool,
        roles: Roles | None,
        **options: Any,
    ) -> None:
        values = {**self.plan_options(), **options}
        check_one_rank(values)
        super().__init__(params, lr, betas, eps, weight_decay, roles=roles, compile=compile, **values)
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
            for param, layout in zip(group["params"], layouts.layouts, strict=True):
                options, shape = dict(layout.options), tuple(param.shape)
                if options["rank"] and (why := kept_whole(shape, options)):
                    whole.append(f"{layout.name or f'one of shape {shape}'} ({why})")
        if whole:
            logger.warning("Weights that %s leaves unprojected: %d, such as %s.", self.algorithm, len(whole), whole[0])

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        projection = projection_for(shape, options)
        space = projection.space(shape, "exp_avg")[0]
        storage = (options["state_bits"], options["block_size"], options["min_8bit_size"])
        codec = codec_for(space, *storage, any_divisor=projection is not FULL_SPACE)
        moments = {"exp_avg": Full(), "exp_avg_sq": cls.second_moment(space)}
        return StatePlan(moments, codec, projection, stacked=options["stacked"])

    def _own_options(self, group: Group) -> dict[str, Any]:
        """The layout options that a group brings; its own rank or ratio replaces the default of both."""
        own = super()._own_options(group)
        given = {name: own[name] for name in ("rank", "rank_ratio") if own.get(name) is not None}
        check_one_rank(given)
        return {**own, **dict.fromkeys({"rank", "rank_ratio"} - set(given), None)} if given else own

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        raise NotImplementedError


class CoapAdamW(Coap):
    """AdamW in a low-rank space of each weight's smaller side.

        g <- G P^T                                      (P G where the weight has more inputs than outputs)
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) scale (m / (sqrt(v) + eps)) P
        W <- W - lr weight_decay W

    Source: arXiv:2412.00071; authors' code bytedance/coap@deabc3a.
    Departs from it: moments are float32 or 8-bit whatever the weight's dtype, and in 8 bits v is stored as its root; a
    recomputed basis keeps its signs; carried-over second moments mix by the squared rotation; W is taken as
    (outputs, inputs) whatever its layout.

    State per projected (m, n) weight, r the rank: exp_avg and exp_avg_sq (max(m, n), r) or (r, max(m, n)); proj
    (r, min(m, n)) in float32 or bfloat16; proj_count; step. Other weights: as `LowMemAdamW`.

    Args:
        correct_bias: correct the moments' bias, as the authors do by default.
    """

    algorithm = "coap_adamw"
    rule = "transformers_adamw"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        compile: bool = False,
        roles: Roles | None = None,
        **options: Any,
    ) -> None:
        flags = {"correct_bias": correct_bias}
        super().__init__(params, lr, betas, eps, weight_decay, compile=compile, roles=roles, **flags, **options)

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        return Full(signed=False)


class CoapAdafactor(Coap):
    """Adafactor with momentum in a low-rank space of each weight's smaller side.

        g <- G P^T;  b2 = 1 - t^decay_rate;  a = lr, or lr max(1e-3, rms(W)) with scale_parameter
        row <- b2 row + (1 - b2) mean_columns(g^2 + 1e-30);  col likewise over rows
        u <- g / sqrt(row / mean(row) col);  u <- u / max(1, rms(u) / clip_threshold)
        m <- b1 m + (1 - b1) a u
        W <- W - a weight_decay W - scale m P

    Source: arXiv:2412.00071 and arXiv:1804.04235; authors' code bytedance/coap@deabc3a.
    Departs from it as `CoapAdamW` does; the first moment cannot be left out, Eq. 5 needs it; `scale_parameter` is off
    by default, as in the Trainer's own Adafactor; statistics of stacked experts are each expert's own.

    State per projected (m, n) weight, r the rank: exp_avg (max(m, n), r) or (r, max(m, n)); exp_avg_sq_row and
    exp_avg_sq_col, one number for each of its rows and columns, float32; proj; proj_count; step. Vectors keep a full
    exp_avg_sq. `betas[1]` and `eps` are accepted so that a Trainer's arguments fit, and not used.

    Args:
        decay_rate: exponent of the second moment's decay, below 0.
        clip_threshold: largest root mean square of an update before the learning rate.
        scale_parameter: scale the learning rate by the weight's root mean square.
    """

    algorithm = "coap_adafactor"
    rule = "adafactor"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay_rate: float = -0.8,
        clip_threshold: float = 1.0,
        scale_parameter: bool = False,
        compile: bool = False,
        roles: Roles | None = None,
        **options: Any,
    ) -> None:
        flags = {"decay_rate": decay_rate, "clip_threshold": clip_threshold, "scale_parameter": scale_parameter}
        super().__init__(params, lr, betas, eps, weight_decay, compile=compile, roles=roles, **flags, **options)

    @classmethod
    def second_moment(cls, space: tuple[int, ...]) -> Moment:
        return RowColMean() if len(space) > 1 else Full(signed=False)


def projection_for(shape: tuple[int, ...], options: dict[str, Any]) -> Projection:
    """The space of a weight's moments under the options of its group."""
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


def is_matrix(shape: tuple[int, ...], options: dict[str, Any]) -> bool:
    """Whether a weight is a matrix or a stack of them."""
    return len(shape) == 2 or (len(shape) == 3 and options["stacked"])


def ratio_of(options: dict[str, Any]) -> float | None:
    given: float | None = options["rank_ratio"]
    return DEFAULT_RANK_RATIO if given is None and options["rank"] is None else given


def kept(shape: tuple[int, ...], options: dict[str, Any]) -> int:
    """Dimensions kept of a matrix's smaller side."""
    ratio = ratio_of(options)
    return int(options["rank"]) if ratio is None else max(int(min(shape[-2:]) / ratio), 1)


def kept_whole(shape: tuple[int, ...], options: dict[str, Any]) -> str:
    """Why a matrix that could be projected is not; "" where it is, or is no matrix to project."""
    if not options["project"] or 0 in shape or not is_matrix(shape, options):
        return ""
    short, rank = min(shape[-2:]), kept(shape, options)
    return f"its smaller side is {short}: rank {rank} would keep all of it" if rank >= short else ""


def tucker_ranks(shape: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Of the output channels of a width-1 kernel, else of output and input channels."""
    if shape[3] == 1:
        return (max(int(shape[0] / ratio), 1),)
    return tuple(max(int(channels / math.sqrt(ratio)), 1) for channels in shape[:2])


@dataclass(frozen=True)
class CoapRecipe(ProjectedRecipe):
    """The options of COAP; see `Coap`."""

    rank: int | None = None
    rank_ratio: float | None = None
    conv_rank_ratio: float | None = None
    update_interval: int = 32
    reproject_factor: int = 5
    scale: float = 1.0
    restore_state: bool | Literal["reference"] = False
    eq5_scale: Literal["none", "rms"] = "none"
    align: Literal["sign", "none", "procrustes"] = "sign"
    proj_bits: Literal[32, 16] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_rank(vars(self))

    def shared_options(self) -> dict[str, Any]:
        names = [*self.optimizer_cls.plan_options(), *RULE_FLAGS[self.optimizer_cls.rule]]
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {**super().shared_options(), **own}

    def options_of(self, role: ParamRole, asked: Any) -> Treatment:
        options: dict[str, Any] = {}
        if len(role.shape) == 4 and asked is not True:
            raise ValueError(f"{role.name}: a convolution takes no rank by rule, use true and conv_rank_ratio.")
        if len(role.shape) < 4 and role.fan_out == len(role.shape) - 1:
            options["transposed"] = True
        if len(role.shape) == 3:
            options["stacked"] = True
        if asked is not True:
            options["rank"] = asked
        values = {**self._values(), **options}
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
        return LEFT_OUT, "a small convolution" if small else "a convolution, and rank is given without conv_rank_ratio"

    def _values(self) -> dict[str, Any]:
        return {**self.optimizer_cls.plan_options(), **self.shared_options()}


@dataclass(frozen=True)
class CoapAdamWRecipe(CoapRecipe):
    """`CoapAdamW`'s options.

    Args:
        correct_bias: see `CoapAdamW`.
    """

    correct_bias: bool = True

    algorithm = "coap_adamw"
    optimizer_cls = CoapAdamW


@dataclass(frozen=True)
class CoapAdafactorRecipe(CoapRecipe):
    """`CoapAdafactor`'s options.

    Args:
        decay_rate, clip_threshold, scale_parameter: see `CoapAdafactor`.
    """

    decay_rate: float = -0.8
    clip_threshold: float = 1.0
    scale_parameter: bool = False

    algorithm = "coap_adafactor"
    optimizer_cls = CoapAdafactor
