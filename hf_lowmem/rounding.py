"""How a weight that is narrower than float32 is rounded to after an update to w'.

    nearest      w <- round(w'); an update of less than half a unit in the last place is lost
    stochastic   w <- the number above or below w', with probabilities such that E[w] = w'
    kahan        w <- round(w') and c <- w' - w; the next update starts from w + c

Source: arXiv:2010.06192, algorithms 2 to 5. Departs from it: w' is computed in float32 from w + c, and c is stored as
an int16 fraction of w's last place. Together w and c hold the 24 bits of float32. With a bfloat16 c they would hold 16
bits, and lose the updates of a learning rate of 1e-6 to weights above about 0.1.
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

_EXPONENT = 0x7F800000  # the exponent bits of a float32
_TINY = torch.finfo(torch.float32).tiny
_MASK = 0xFFFFFFFF
_FRACTION = 2.0**-16  # kahan_comp counts this fraction of a unit in the last place
# The hash of 32-bit integers is a Weyl sequence, followed by the multiply and shift rounds of "lowbias32".
WEYL, MIX_1, MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a view or tile of it, that is read and written as float32.

    Args:
        data: the weight in its own dtype.
        kahan_comp: the part of the weight that rounding has cut off, int16 of the same shape, in units of 2^-16 of the
            last place; None unless `rounding="kahan"`.
        noise_key: the key of this step's noise, which is a 0-D int32 tensor under torch.compile; None unless
            `rounding="stochastic"`.
        start: the offset of the whole weight in its storage.
    """

    data: Tensor
    kahan_comp: Tensor | None = None
    noise_key: Any = None
    start: Any = 0

    @classmethod
    def of(cls, param: Tensor, rounding: Rounding, state: State, noise_key: Any) -> StoredWeight:
        """Return a whole parameter; one in float32 or float64, as a projected update is, needs no rounding."""
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
        """Return the weight itself if it is float32 or float64, or else a float32 copy to be passed to `store`."""
        if self.data.dtype in (torch.float32, torch.float64):
            return self.data
        value = scratch.get("param", self.data.shape).copy_(self.data) if scratch else self.data.float()
        if self.kahan_comp is not None:
            value.addcmul_(last_place(value, self.data.dtype), self.kahan_comp.float(), value=_FRACTION)
        return value

    def store(self, value: Tensor) -> None:
        """Round the float32 `value` and write it to the weight; `value` may be overwritten."""
        if value is self.data:
            return
        if self.noise_key is not None:
            value = self._rounded_at_random(value)
        self.data.copy_(value)
        if self.kahan_comp is not None:
            fraction = value.sub_(self.data).div_(last_place(self.data.float(), self.data.dtype)).div_(_FRACTION)
            self.kahan_comp.copy_(fraction.round_().clamp_(-(2**15), 2**15 - 1))

    def _rounded_at_random(self, value: Tensor) -> Tensor:
        """Round `value` to the dtype of `data`: add noise of up to one unit to its magnitude, and truncate."""
        dtype = self.data.dtype
        bits = int(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # how many more float32 has
        unit = last_place(value, dtype)
        noise = hashed(places(self.data, self.start), self.noise_key, bits)
        units = value.abs().div_(unit).add_(noise, alpha=2.0**-bits).floor_()
        return torch.where(value.isfinite(), torch.copysign(units.mul_(unit), value), value)


def rounded(number: float, dtype: torch.dtype) -> float:
    """Return the number of a dtype that is nearest to `number`."""
    return float(torch.tensor(number, dtype=dtype, device="cpu"))


def last_place(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one unit in the last place of `dtype` at each entry of the float32 `value`.

    It is at least float32's smallest normal number, so that it is safe to divide by.
    """
    info = torch.finfo(dtype)
    power = value.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    return power.mul_(info.eps).clamp_(min=max(info.smallest_normal * info.eps, _TINY))


def places(view: Tensor, start: Any) -> Tensor:
    """Return the offset of each entry of a view from `start` in its storage, as int32.

    The noise is a hash of these offsets, so a tile draws the noise that it has in the whole weight.
    """
    # A compiled step takes whole weights, and cannot trace a storage offset.
    offset = 0 if torch.compiler.is_compiling() else view.storage_offset() - start
    if view.is_contiguous():
        return torch.arange(view.numel(), dtype=torch.int32, device=view.device).view(view.shape).add_(_signed(offset))
    total = torch.full((1,) * view.ndim, _signed(offset), dtype=torch.int32, device=view.device)
    for axis, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        along = torch.arange(size, dtype=torch.int32, device=view.device).mul_(_signed(stride))
        total = total + along.view([-1 if a == axis else 1 for a in range(view.ndim)])
    return total


def hashed(numbers: Tensor, key: Any, bits: int) -> Tensor:
    """Return integers of `bits` bits, uniform over (number, key); the int32 `numbers` are overwritten."""
    x = numbers.mul_(_signed(WEYL)).add_(key)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MIX_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MIX_2))
    return (x >> (32 - bits)).bitwise_and_((1 << bits) - 1)


def noise_key(seed: int, number: Any, step: Any, start: int = 0) -> Any:
    """Return the key of the `number`-th parameter of an optimizer at one step, which is the same in every process.

    If the number or the step is an int64 tensor, so is the key.

    Args:
        start: the place in the parameter of the first entry of a piece, which draws the noise of its entries there:
            `hashed` multiplies a place before it adds the key.
    """
    key: Any = 0
    for part in (seed, number, step):
        key = (key ^ part) * WEYL & _MASK
        key = (key ^ key >> 16) * MIX_1 & _MASK
        key = (key ^ key >> 15) * MIX_2 & _MASK
        key ^= key >> 16
    return _signed(key + start * WEYL & _MASK)


def _signed(value: Any) -> Any:
    """Return a 32-bit unsigned integer as the signed one with the same bits."""
    return (value + 0x80000000 & _MASK) - 0x80000000
