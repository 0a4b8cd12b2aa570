"""Signum: the sign of the momentum, without a second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import Hyperparameters
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import StatePlan


class Signum(LowMemOptimizer):
    """The sign of the momentum, by which every entry moves by lr.

        m <- b1 m + (1 - b1) g
        w <- w - lr (sign(m) + weight_decay w)

    Source: arXiv:2407.07972. It equals Lion (arXiv:2302.06675) with equal betas.
    Its lr must be far below AdamW's. In 8 bits an entry whose momentum falls below 1e-7 of its block's largest stops.

    The state of a weight is exp_avg of its shape, and step. Only `betas[0]` is used; `betas[1]` and `eps` are
    accepted so that a Trainer's arguments fit.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = Signum([weight], lr=1e-4)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[weight])
    ['exp_avg', 'step']
    """

    algorithm = "signum"
    rule = "signum"
    takes_flat_pieces = True
    hyperparameters = Hyperparameters(lr=1e-4)

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        return StatePlan({"exp_avg": Full()}, codec_of(shape, options))


@dataclass(frozen=True)
class SignumRecipe(Recipe):
    """Signum, whose one moment keeps every entry."""

    optimizer_cls = Signum

    def options_of(self, role: ParamRole) -> RoleOptions:
        return {}, "no second moment"
