"""The largest entries of the last gradients, and the rest of them in 4 bits (MicroAdam)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_lowmem.state import Codec, State, TensorSpec

INDEX, VALUE, CODES, LOW, HIGH = "window_index", "window_value", "error_codes", "error_lo", "error_hi"
LEVELS = 15  # steps from the smallest to the largest number of a bucket, whose codes have 4 bits
LARGEST = 2.0**126  # the distance of two larger numbers may overflow
MAX_BLOCK = 1 << 15  # places in a block are int16


@dataclass(frozen=True)
class TopKWindow:
    """A ring of sparse gradients, from which both moments are rebuilt, and what the gradients had beside it.

    Blocks and buckets are runs of a weight's entries in memory order. Each block of a gradient puts its entries of
    largest magnitude into the window; where magnitudes are equal, the first ones. What is left is the error, which is
    added to the next gradient. Each bucket of it keeps its extremes and, for each entry, the nearest of 16 levels.

    Source: arXiv:2405.15593, algorithm 1.

    State, under these names whatever the moment is called, and independent of the plan's codec: `window_index` and
    `window_value` (length, entries kept), the former counted from the start of the block; `error_codes`, two in a
    byte, the first one in the high bits; `error_lo` and `error_hi`, a number per bucket.

    Args:
        length: how many gradients the window holds.
        density: the share of a block that is kept, which is rounded up to whole entries.
        block_size: entries of a block, at most 32768; the last one of a weight may be shorter.
        bucket_size: entries of a bucket, an even number; the last one may be shorter.
        dtype: how the values of the window and the extremes of the buckets are stored.
    """

    length: int
    density: float
    block_size: int
    bucket_size: int
    dtype: torch.dtype

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        numel = math.prod(shape)
        window, buckets = (self.length, self.columns(numel)), (-(-numel // self.bucket_size),)
        return {
            INDEX: TensorSpec(window, (None, None), torch.int16),
            VALUE: TensorSpec(window, (None, None), self.dtype),
            CODES: TensorSpec((-(-numel // 2),), (None,), torch.uint8),
            LOW: TensorSpec(buckets, (None,), self.dtype),
            HIGH: TensorSpec(buckets, (None,), self.dtype),
        }

    def describe(self, name: str) -> str:
        return f"the largest {self.density:.3g} of the last {self.length} gradients, the error in 4 bits"

    def kept(self, size: int) -> int:
        """Return how many entries of a block of `size` are kept."""
        return math.ceil(size * self.density)

    def columns(self, numel: int) -> int:
        """Return how many columns of the window belong to the first `numel` entries of a weight, in whole blocks."""
        blocks, rest = divmod(numel, self.block_size)
        return blocks * self.kept(self.block_size) + self.kept(rest)

    # A part of a weight is the range of its entries from `start` to `stop`. A gradient is flat, and that of a part.

    def error(self, state: State, start: int, stop: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Return the error of a part that starts at an even entry, times `scale`."""
        packed = state[CODES][start // 2 : -(-stop // 2)]
        codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: stop - start]
        first, last = start // self.bucket_size, -(-stop // self.bucket_size)
        before, size = start - first * self.bucket_size, min(self.bucket_size, stop - first * self.bucket_size)
        low, unit = (
            each.unsqueeze(1).expand(-1, size).flatten()[before : before + len(codes)]
            for each in _levels(state[LOW][first:last], state[HIGH][first:last], dtype)
        )
        return ((codes * unit + low) * scale).to(dtype)

    def push(self, state: State, grad: Tensor, start: int, step: float | Tensor) -> Tensor:
        """Put the largest entries of whole blocks into the window, in place of those of `length` steps ago.

        Returns:
            Their places in the part.
        """
        index, columns = self._largest(grad), slice(self.columns(start), self.columns(start + len(grad)))
        places, row = index + self._block_starts(index), (step - 1) % self.length
        for tensor, new in ((state[INDEX][:, columns], index), (state[VALUE][:, columns], grad[places])):
            if isinstance(row, Tensor):
                tensor.index_copy_(0, row.long().view(1), new.to(tensor.dtype).unsqueeze(0))
            else:
                tensor[int(row)] = new.to(tensor.dtype)
        return places

    def set_error(self, state: State, grad: Tensor, start: int, step: float | Tensor) -> None:
        """Store what whole buckets have beside the newest gradient of the window as the error.

        What is not finite is left out, because it would stay in its bucket for good.
        """
        left_out = self._is_newest(state, start, start + len(grad), step) | ~(grad.abs() <= LARGEST)
        self.encode_error(state, grad.masked_fill(left_out, 0), start)

    def encode_error(self, state: State, error: Tensor, start: int) -> None:
        """Store the error of whole buckets."""
        size = min(self.bucket_size, len(error))
        buckets = torch.cat([error, error[-1:].expand(-len(error) % size)]).view(-1, size)
        which = slice(start // self.bucket_size, start // self.bucket_size + len(buckets))
        state[LOW][which], state[HIGH][which] = buckets.amin(1), buckets.amax(1)
        low, unit = _levels(state[LOW][which, None], state[HIGH][which, None], error.dtype)
        # The extremes are rounded as they are stored, so that an entry may lie outside of them.
        codes = torch.where(unit > 0, (buckets - low) / unit + 0.5, 0).floor().clamp(0, LEVELS).to(torch.uint8)
        pairs = pad(codes.flatten()[: len(error)], (0, len(error) % 2)).view(-1, 2)
        state[CODES][start // 2 : start // 2 + len(pairs)] = (pairs[:, 0] << 4) | pairs[:, 1]

    def sums(
        self,
        state: State,
        start: int,
        stop: int,
        betas: tuple[float | Tensor, float | Tensor],
        step: float | Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of beta1^age g and of beta2^age g^2 over the gradients g in the window, for whole blocks.

        Rows that no gradient has filled yet add zeros.
        """
        columns = slice(self.columns(start), self.columns(stop))
        index, values = state[INDEX][:, columns], state[VALUE][:, columns].to(_at_least_float32(dtype))
        places = index + self._block_starts(index[0])
        first, second = (torch.zeros(stop - start, dtype=values.dtype, device=values.device) for _ in betas)
        for row in range(self.length):
            age = (step - 1 - row) % self.length
            first.index_add_(0, places[row], values[row] * betas[0] ** age)
            second.index_add_(0, places[row], values[row] * betas[1] ** age * values[row])
        return first, second

    def _largest(self, grad: Tensor) -> Tensor:
        """Return the places of the entries that each block keeps, counted from the start of the block, in order."""
        blocks = len(grad) // self.block_size * self.block_size
        found = []
        for part, size in ((grad[:blocks], self.block_size), (grad[blocks:], len(grad) - blocks)):
            if len(part):
                magnitude = part.view(-1, size).abs().float().nan_to_num(nan=math.inf)
                # The bits of magnitudes are in their order, and the place decides between equal ones.
                keys = magnitude.view(torch.int32).long() * MAX_BLOCK - torch.arange(size, device=grad.device)
                found.append(keys.topk(self.kept(size), sorted=False).indices.sort().values.flatten())
        return torch.cat(found)

    def _is_newest(self, state: State, start: int, stop: int, step: float | Tensor) -> Tensor:
        """Return which entries of any part the newest gradient of the window has."""
        first, last = start // self.block_size, -(-stop // self.block_size)
        index = state[INDEX][:, self.columns(first * self.block_size) : self.columns(last * self.block_size)]
        row = (step - 1) % self.length
        index = index.index_select(0, row.long().view(1))[0] if isinstance(row, Tensor) else index[int(row)]
        found = torch.zeros((last - first) * self.block_size, dtype=torch.bool, device=index.device)
        found[index + self._block_starts(index)] = True
        return found[start - first * self.block_size : stop - first * self.block_size]

    def _block_starts(self, columns: Tensor) -> Tensor:
        """Return where the block of each column starts, for the columns of whole blocks from the first one on."""
        return torch.arange(len(columns), device=columns.device) // self.kept(self.block_size) * self.block_size


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _levels(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the lowest level of each bucket, and the distance from one level to the next."""
    low, high = low.to(_at_least_float32(dtype)), high.to(_at_least_float32(dtype))
    return low, (high - low) / LEVELS
