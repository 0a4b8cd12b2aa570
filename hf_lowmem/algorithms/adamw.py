"""AdamW with this package's state storage: the baseline, and the options that its variants share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_lowmem.codecs import codec_for
from hf_lowmem.moments import Full, GroupMean, Segment, whole
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.param_groups import FULL, Recipe, Treatment
from hf_lowmem.param_layouts import Roles
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Moment, StatePlan

STORAGE = {"state_bits": 32, "block_size": 256, "min_8bit_size": 4096}


class LowMemAdamW(LowMemOptimizer):
    """AdamW whose state is stored in 32, 16 or 8 bits.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        w <- w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    Source: arXiv:1711.05101, algorithm 2; 8-bit state: arXiv:2110.02861.
    Departs from the latter: blocks end with the row, and the codes of v hold its square root.

    State per weight: exp_avg and exp_avg_sq of the weight's shape; in 8 bits uint8 codes and `_absmax`, one float32
    per block of a row, of which the last may be short; `step`.
    """

    algorithm = "lowmem_adamw"
    rule = "adamw"
    layout_options: ClassVar[dict[str, Any]] = STORAGE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        compile: bool = False,
        roles: Roles | None = None,
        **options: Any,
    ) -> None:
        storage: dict[str, Any] = dict(
            state_bits=state_bits, block_size=block_size, min_8bit_size=min_8bit_size, compile=compile
        )
        super().__init__(params, lr, betas, eps, weight_decay, roles=roles, **storage, **options)

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        codec = codec_for(shape, options["state_bits"], options["block_size"], options["min_8bit_size"])
        return StatePlan({"exp_avg": Full(), "exp_avg_sq": cls.second_moment(shape, options)}, codec)

    @classmethod
    def second_moment(cls, shape: tuple[int, ...], options: dict[str, Any]) -> Moment:
        return Full(signed=False)


class GroupedAdamW(LowMemAdamW):
    """AdamW whose second moment is the mean of g^2 over groups of entries: SlimAdam, Adam-mini and Adalayer.

    Without `roles` the groups say what is averaged, by the options below; their defaults average nothing.

    Args:
        axes: axes of the weight that are averaged over; empty keeps the full second moment.
        rows_per_block: that many consecutive entries of the last kept axis share one number too.
        segments: for fused weights, (name, axis, outer, start, stop, axes, rows_per_block) of each part instead:
            `axis`, of size n, is viewed as (outer, n // outer), and the part is `[:, start:stop]` of it.
    """

    layout_options: ClassVar[dict[str, Any]] = {**STORAGE, "axes": (), "rows_per_block": 1, "segments": ()}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        axes: tuple[int, ...] = (),
        rows_per_block: int = 1,
        segments: tuple[tuple, ...] = (),
        **options: Any,
    ) -> None:
        grouping: dict[str, Any] = dict(
            axes=tuple(axes or ()), rows_per_block=rows_per_block, segments=tuple(segments)
        )
        super().__init__(params, lr, betas, eps, weight_decay, **grouping, **options)

    @classmethod
    def second_moment(cls, shape: tuple[int, ...], options: dict[str, Any]) -> Moment:
        if options["segments"]:
            moment = GroupMean(tuple(Segment(*segment) for segment in options["segments"]))
            moment.check(shape)
            return moment
        if options["axes"]:
            return whole(shape, options["axes"], options["rows_per_block"])
        return Full(signed=False)


@dataclass(frozen=True)
class LowMemAdamWRecipe(Recipe):
    """AdamW with the storage options alone."""

    algorithm = "lowmem_adamw"
    optimizer_cls = LowMemAdamW

    def treat(self, role: ParamRole) -> Treatment:
        return FULL, "AdamW keeps every entry"


def segments_of(role: ParamRole, second_moments: list[dict[str, Any]]) -> dict[str, Any]:
    """Group options of a fused weight from those of its parts, in the order of `role.parts`."""
    return {
        "segments": tuple(
            (
                part.role.rpartition("_")[2],
                role.fan_out,
                part.outer,
                part.start,
                part.stop,
                options.get("axes", ()),
                options.get("rows_per_block", 1),
            )
            for part, options in zip(role.parts, second_moments, strict=True)
        )
    }
