"""How a weight narrower than float32 takes an update w' that it cannot hold.

    nearest      w <- round(w'), so that an update of less than half a unit in the last place is lost
    stochastic   w <- the neighbour of w' above or below, each as likely as w' is near it, so that E[w] = w'
    kahan        w <- round(w'), c <- w' - w, and the next update starts from w + c

Source: arXiv:2010.06192, algorithms 2 to 5. Departs from it: w' is computed in float32 from w + c, and c is an int16
fraction of w's last place. Together they hold float32's 24 bits, where a bfloat16 c would hold 16 and lose, in its
turn, the updates of an lr of 1e-6 to weights above about 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.scratch import Scratch
from hf_lowmem.state import KAHAN_COMP, Rounding, State

_EXPONENT = 0x7F800000  # the bits of a float32's power of two
_TINY = torch.finfo(torch.float32).tiny
_MASK = 0xFFFFFFFF
_FRACTION = 2.0**-16  # of a unit in the last place, that an int16 counts
# A hash of 32-bit integers: Weyl's sequence, then the multiply and shift rounds of "lowbias32".
WEYL, MIX_1, MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a view or tile of it, that is read and written as float32.

    Args:
        data: the weight in its own dtype.
        kahan_comp: what rounding has cut off from it, int16 of the same shape, in 2^-16 of a unit in the last place;
            None unless `rounding="kahan"`.
        noise_key: this step's key of the noise; None unless `rounding="stochastic"`. A 0-D int32 tensor under
            torch.compile.
        start: where the whole weight starts in its storage.
    """

    data: Tensor
    kahan_comp: Tensor | None = None
    noise_key: Any = None
    start: Any = 0

    @classmethod
    def of(cls, param: Tensor, rounding: Rounding, state: State, noise_key: Any) -> StoredWeight:
        """A whole parameter; one in float32 or float64 (a projected update is) needs no rounding."""
        if param.dtype in (torch.float32, torch.float64):
            return cls(param)
        key = noise_key if rounding.kind == "stochastic" else None
        return cls(param, state[KAHAN_COMP] if rounding.kind == "kahan" else None, key, param.storage_offset())

    def map(self, view: Callable[[Tensor], Tensor]) -> StoredWeight:
        comp = None if self.kahan_comp is None else view(self.kahan_comp)
        return replace(self, data=view(self.data), kahan_comp=comp)

    def __getitem__(self, index: tuple[slice, ...]) -> StoredWeight:
        return self.map(lambda tensor: tensor[index]) if index else self

    def load(self, scratch: Scratch | None = None) -> Tensor:
        """As float32: in place where it is stored so (or as float64), else a temporary to hand to `store`."""
        if self.data.dtype in (torch.float32, torch.float64):
            return self.data
        value = scratch.get("param", self.data.shape).copy_(self.data) if scratch else self.data.float()
        if self.kahan_comp is not None:
            value.addcmul_(last_place(value, self.data.dtype), self.kahan_comp.float(), value=_FRACTION)
        return value

    def store(self, value: Tensor) -> None:
        """Write float32 `value`, which may be overwritten."""
        if value is self.data:
            return
        if self.noise_key is not None:
            value = self._rounded_at_random(value)
        self.data.copy_(value)
        if self.kahan_comp is not None:
            fraction = value.sub_(self.data).div_(last_place(self.data.float(), self.data.dtype)).div_(_FRACTION)
            self.kahan_comp.copy_(fraction.round_().clamp_(-(2**15), 2**15 - 1))

    def _rounded_at_random(self, value: Tensor) -> Tensor:
        """`value` on the grid of `data`'s dtype: its magnitude plus noise of one unit, cut off."""
        dtype = self.data.dtype
        bits = int(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # that float32 has more
        unit = last_place(value, dtype)
        noise = hashed(places(self.data, self.start), self.noise_key, bits)
        units = value.abs().div_(unit).add_(noise, alpha=2.0**-bits).floor_()
        return torch.where(value.isfinite(), torch.copysign(units.mul_(unit), value), value)


def last_place(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place that `dtype` has at each entry of float32 `value`, and at least float32's smallest
    normal number, so that dividing by it is safe."""
    info = torch.finfo(dtype)
    power = value.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    return power.mul_(info.eps).clamp_(min=max(info.smallest_normal * info.eps, _TINY))


def places(view: Tensor, start: Any) -> Tensor:
    """The place in the storage of each entry of a view, from `start`, as int32: tiles draw what the whole would."""
    # A compiled step takes whole weights, and cannot ask where they start.
    offset = 0 if torch.compiler.is_compiling() else view.storage_offset() - start
    if view.is_contiguous():
        return torch.arange(view.numel(), dtype=torch.int32, device=view.device).view(view.shape).add_(_signed(offset))
    total = torch.full((1,) * view.ndim, _signed(offset), dtype=torch.int32, device=view.device)
    for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        along = torch.arange(size, dtype=torch.int32, device=view.device).mul_(_signed(stride))
        total = total + along.view([-1 if a == axis else 1 for a in range(view.ndim)])
    return total


def hashed(numbers: Tensor, key: Any, bits: int) -> Tensor:
    """Integers of `bits` bits, uniform over (number, key); `numbers` int32, overwritten."""
    x = numbers.mul_(_signed(WEYL)).add_(key)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MIX_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MIX_2))
    return (x >> (32 - bits)).bitwise_and_((1 << bits) - 1)


def noise_key(seed: int, number: Any, step: Any) -> Any:
    """The key of one parameter, the `number`-th of its optimizer, at one step: the same in every process.

    Number and step may be int64 tensors, and then the key is one.
    """
    key: Any = 0
    for part in (seed, number, step):
        key = (key ^ part) * WEYL & _MASK
        key = (key ^ key >> 16) * MIX_1 & _MASK
        key = (key ^ key >> 15) * MIX_2 & _MASK
        key ^= key >> 16
    return _signed(key)


def _signed(value: Any) -> Any:
    """A 32-bit integer as torch.int32 has it."""
    return (value + 0x80000000 & _MASK) - 0x80000000
