"""A moment stored as the rank-1 factors of a nearly square matrix, and one bit per entry for the signs (SMMF)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowmem.state import Codec, State, TensorSpec, widened


@dataclass(frozen=True)
class RankOne:
    """A moment whose magnitudes are stored as the sums of the rows and of the columns of its square view.

    The entries, in their order in memory, are viewed as a matrix (n, m) that is as square as their number allows; see
    `square_of`. The estimate that `ema` returns holds the new value exactly; what is stored of it is

        row = A 1,  col = A^T 1 / sum(A)  with A = |estimate|,  and the bits estimate > 0

    and stands for the matrix row col^T with these signs, whose row and column sums are those of the estimate. A number
    that is not finite counts as zero in the sums, so that it affects its own entry only.

    Source: arXiv:2412.08894.

    Args:
        signed: whether the signs are stored.
        stacked: whether axis 0 counts tensors that have a square each.
        mask_zeros: whether the old moment counts as zero where the new value is exactly zero. The factors spread the
            moment over whole rows and columns, to entries that never had a value.

    State: `name_row` (n) and `name_col` (m), float32 under every codec, with an axis of the stack before them; and
    `name_sign`, uint8, whose bits are the signs of eight consecutive entries, the lowest bit first.
    """

    signed: bool = True
    stacked: bool = False
    mask_zeros: bool = False

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        stack, n, m = self.view_of(shape)
        dims = (0, None) if stack else (None,)
        found = {
            f"{name}_row": TensorSpec((*stack, n), dims, signed=False),
            f"{name}_col": TensorSpec((*stack, m), dims, signed=False),
        }
        return {**found, f"{name}_sign": self._sign_spec(shape)} if self.signed else found

    def view_of(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Return the axis of the stack, if there is one, and both sides of the square view."""
        stack = shape[:1] if self.stacked else ()
        return stack, *square_of(math.prod(shape[len(stack) :]))

    def _sign_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """Return the declaration of the signs: axes of the weight stay axes where no byte crosses their entries."""
        if shape and shape[-1] % 8 == 0:
            dims = (*range(len(shape) - 1), None)
            return TensorSpec((*shape[:-1], shape[-1] // 8), dims, torch.uint8, block=8)
        row = math.prod(shape[1:])
        if self.stacked or (shape and row % 8 == 0):
            return TensorSpec((shape[0], -(-row // 8)), (0, None), torch.uint8)
        return TensorSpec((-(-math.prod(shape) // 8),), (None,), torch.uint8)

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        stack, n, m = self.view_of(tuple(value.shape))
        square, row, col = (
            widened(value).reshape(*stack, n, m).contiguous(),
            state[f"{name}_row"],
            state[f"{name}_col"],
        )
        old = row.unsqueeze(-1) * col.unsqueeze(-2)
        if self.signed:
            signs = state[f"{name}_sign"].view(*stack, -1)
            old = torch.where(unpacked(signs, n * m).view(old.shape), old, -old)
        if self.mask_zeros:
            old = torch.where(square == 0, 0.0, old)
        estimate: Tensor = beta * old + (1 - beta) * square
        size = estimate.abs().nan_to_num(0.0, 0.0, 0.0)
        if self.signed:  # nor does an entry count whose square has no place among those of the second moment
            size = torch.where(square.square().isfinite(), size, 0.0)
        store_factors(row, col, size.sum(-1), size.sum(-2))
        if self.signed:
            signs.copy_(packed((estimate > 0).view(*stack, -1)))
        return estimate.view(value.shape)

    def describe(self, name: str) -> str:
        return f"{name} as rank-1 factors{' and signs' if self.signed else ''}"


def store_factors(row: Tensor, col: Tensor, row_sums: Tensor, col_sums: Tensor) -> None:
    """Store the factors of a non-negative matrix, or of each of a stack, whose row and column sums these are."""
    row.copy_(row_sums)
    total = row_sums.sum(-1, keepdim=True, dtype=torch.float64)  # which may be too large for float32
    total.clamp_(min=torch.finfo(row.dtype).tiny)  # all sums are zero where it is
    col.copy_(col_sums / total)


@lru_cache(maxsize=1 << 12)
def square_of(entries: int) -> tuple[int, int]:
    """Return the sides (n, m) of the most nearly square matrix of so many entries, n >= m.

    >>> square_of(151936 * 896)
    (14336, 9496)
    """
    m = math.isqrt(entries)
    while m and entries % m:
        m -= 1
    return (entries // m, m) if m else (0, 0)


def packed(bits: Tensor) -> Tensor:
    """Return booleans (..., N) as bits, eight to a byte, uint8 (..., ceil(N / 8)); the lowest bit comes first."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    found: Tensor = (padded.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
    return found


def unpacked(codes: Tensor, entries: int) -> Tensor:
    """Return the first `entries` booleans of each row that `packed` has packed."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :entries].bool()
