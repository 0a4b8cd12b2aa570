"""Signum: the sign of the momentum, no second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_lowmem.algorithms.adamw import STORAGE
from hf_lowmem.codecs import codec_for
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.param_groups import FULL, Recipe, Treatment
from hf_lowmem.param_layouts import Roles
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import StatePlan


class Signum(LowMemOptimizer):
    """The sign of the momentum: every entry moves by lr.

        m <- b1 m + (1 - b1) g
        w <- w - lr (sign(m) + weight_decay w)

    Source: arXiv:2407.07972; equals Lion (arXiv:2302.06675) with equal betas.
    Its lr must be far below AdamW's. In 8 bits an entry whose momentum falls below 1e-7 of its block's largest stops.

    State per weight: exp_avg of its shape; `step`. Only `betas[0]` is used; `betas[1]` and `eps` are accepted so that
    a Trainer's arguments fit.
    """

    algorithm = "signum"
    rule = "signum"
    layout_options: ClassVar[dict[str, Any]] = STORAGE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
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
        return StatePlan({"exp_avg": Full()}, codec)


@dataclass(frozen=True)
class SignumRecipe(Recipe):
    """Momentum alone, stored like any other."""

    algorithm = "signum"
    optimizer_cls = Signum

    def treat(self, role: ParamRole) -> Treatment:
        return FULL, "no second moment"
