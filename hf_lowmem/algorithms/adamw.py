"""AdamW with this package's state storage: the baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowmem.codecs import codec_for
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import Codec, Moment, StatePlan


def codec_of(shape: tuple[int, ...], options: Mapping[str, Any], any_divisor: bool = False) -> Codec:
    """Return the codec that the storage options ask for in moments of `shape`; see `codec_for`."""
    storage = (options["state_bits"], options["block_size"], options["min_8bit_size"])
    return codec_for(shape, *storage, any_divisor=any_divisor)


class LowMemAdamW(LowMemOptimizer):
    """AdamW whose state is stored in 32, 16 or 8 bits.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        w <- w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    Source: arXiv:1711.05101, algorithm 2; 8-bit state: arXiv:2110.02861.
    It departs from the latter in two ways: blocks end with the row, and the codes of v hold its square root.

    The state of a weight is exp_avg and exp_avg_sq of its shape, and step. In 8 bits the moments are uint8 codes, with
    one float32 per block of a row in exp_avg_absmax and exp_avg_sq_absmax; the last block of a row may be short.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = LowMemAdamW([weight], lr=1e-3, state_bits=8)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> print(optimizer)
    LowMemAdamW(state_bits=8): groups: 1, parameters: 1 of 8,192 entries, state: 16.50 KiB
    """

    algorithm = "lowmem_adamw"
    rule = "adamw"
    takes_flat_pieces = True

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        moments = {"exp_avg": Full(), "exp_avg_sq": cls.second_moment(shape, options)}
        return StatePlan(moments, codec_of(shape, options))

    @classmethod
    def second_moment(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> Moment:
        """Return how the second moment of a weight of `shape` is represented."""
        return Full(signed=False)


@dataclass(frozen=True)
class LowMemAdamWRecipe(Recipe):
    """AdamW, of which only the storage differs from torch's."""

    optimizer_cls = LowMemAdamW

    def options_of(self, role: ParamRole) -> RoleOptions:
        return {}, "AdamW keeps every entry"
