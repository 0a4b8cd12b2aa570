"""Moments stored as 8-bit codes with one float32 scale per block of a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowmem.codecs.dynamic_map import CELL_BITS, decode_lines, decode_table, encode_lines, encode_table
from hf_lowmem.scratch import Scratch, known_finite
from hf_lowmem.state import State, TensorSpec

BLOCK_SIZES = (256, 128, 64)
_MIN_BLOCK_SIZE = 32
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Blockwise:
    """Dynamic 8-bit codes (arXiv:2110.02861), scaled by the largest magnitude (absmax) of each block.

    A row is the entries along the last `row_axes` axes. It is cut into blocks of `block_size` consecutive entries, of
    which the last may be shorter. No block crosses a row, so the absmax shards with the codes along all other axes.

    An unsigned tensor is stored as its square root. The codes span seven decades; the squares of gradients span more,
    and a second moment that is rounded to zero makes the update blow up.

    State: `name`, uint8 of the tensor's shape; `name_absmax`, float32 with one axis, an entry per block, in place of
    the row axes.
    """

    block_size: int = 256
    row_axes: int = 1

    def row(self, shape: tuple[int, ...]) -> int:
        """Return the number of entries in a row of a tensor of `shape`."""
        return math.prod(shape[-self.row_axes :])

    def ragged_row(self, shape: tuple[int, ...]) -> int | None:
        """Return the number of entries in a row if its last block is short, or None if all blocks are whole."""
        row = self.row(shape)
        return row if row % self.block_size else None

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        blocks = -(-self.row(spec.shape) // self.block_size)
        scales = (*spec.shape[: -self.row_axes], blocks)
        return {
            name: replace(spec, dtype=torch.uint8),
            f"{name}_absmax": TensorSpec(
                scales,
                (*spec.param_dims[: -self.row_axes], None),
                block=self.block_size if self.row_axes == 1 else 1,
            ),
        }

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        codes, absmax = state[name], state[f"{name}_absmax"]
        if torch.compiler.is_compiling():
            parts = in_blocks(codes, absmax, self.block_size)
            values = [(decode_lines(part, spec.signed) * scales.unsqueeze(-1)).flatten(-2) for part, scales in parts]
            value: Tensor = (torch.cat(values, -1) if len(values) > 1 else values[0]).view(codes.shape)
        else:
            value = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
            dequantize(codes, absmax, self.block_size, spec.signed, out=value, scratch=Scratch(codes.device))
        return value if spec.signed else value.square()

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        codes, absmax = state[name], state[f"{name}_absmax"]
        value = (value.to(torch.float32, copy=True) if spec.signed else value.sqrt().float()).contiguous()
        if torch.compiler.is_compiling():
            finite = in_blocks(value.nan_to_num(0.0, 0.0, 0.0), absmax, self.block_size)
            for (part, scales), (blocks, _) in zip(in_blocks(codes, absmax, self.block_size), finite, strict=True):
                largest = blocks.abs().amax(-1)
                part.copy_(encode_lines(blocks / largest.clamp(min=_TINY).unsqueeze(-1), spec.signed))
                scales.copy_(largest)
        else:
            quantize(value, codes, absmax, self.block_size, spec.signed, scratch=Scratch(value.device))


def in_blocks(value: Tensor, absmax: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the blocks of all rows of `value`, which is contiguous, each with a view of their absmax.

    The whole blocks come first, as (..., n, block_size) and (..., n). The short last blocks of the rows, if there are
    any, follow as (..., 1, rest) and (..., 1).
    """
    if not value.numel():  # of an empty shard
        return
    rows = value.view(*absmax.shape[:-1], -1)
    rest = rows.shape[-1] % block_size
    if not rest:
        yield rows.unflatten(-1, (-1, block_size)), absmax
        return
    if absmax.shape[-1] > 1:
        yield rows[..., :-rest].unflatten(-1, (-1, block_size)), absmax[..., :-1]
    yield rows[..., -rest:].unsqueeze(-2), absmax[..., -1:]


def dequantize(codes: Tensor, absmax: Tensor, block_size: int, signed: bool, *, out: Tensor, scratch: Scratch) -> None:
    """Write the values of the codes, scaled by the absmax of their blocks, to `out` (contiguous float32)."""
    index = scratch.get("index", codes.shape, torch.int32).copy_(codes)
    torch.index_select(decode_table(signed, codes.device), 0, index.view(-1), out=out.view(-1))
    for blocks, scales in in_blocks(out, absmax, block_size):
        blocks.mul_(scales.unsqueeze(-1))


def quantize(value: Tensor, codes: Tensor, absmax: Tensor, block_size: int, signed: bool, *, scratch: Scratch) -> None:
    """Write the nearest codes of `value` (contiguous float32, overwritten) and the absmax of its blocks.

    NaN and Inf become zero, so that they do not spoil the absmax of their block. The weight at such an entry is
    already lost, as it is under AdamW.
    """
    for blocks, scales in in_blocks(value, absmax, block_size):
        largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1)) if signed else blocks.amax(-1)
        if not known_finite(largest):
            torch.nan_to_num(blocks, 0.0, 0.0, 0.0, out=blocks)
            largest = blocks.abs().amax(-1)
        scales.copy_(largest)
        blocks.div_(largest.clamp_(min=_TINY).unsqueeze(-1))

    bits = value.view(torch.int32)
    cell = torch.bitwise_right_shift(bits, CELL_BITS, out=scratch.get("index", value.shape, torch.int32))
    if signed:
        cell.bitwise_and_(0xFFFF)
    code = scratch.get("code", value.shape, torch.int32)
    torch.index_select(encode_table(signed, value.device), 0, cell.view(-1), out=code.view(-1))
    code.add_(bits)
    if signed:
        code.bitwise_xor_(bits.bitwise_right_shift_(31))
    codes.copy_(code.bitwise_right_shift_(CELL_BITS))


def blocks_for(shape: tuple[int, ...], largest: int, any_divisor: bool = False) -> Int8Blockwise | None:
    """Return the blocks of a tensor of `shape`, or None if its rows have one entry and float32 takes fewer bytes.

    A row is the last axis. While it has fewer than 64 entries, the axis before it joins the row, except axis 0, along
    which state can be sharded. So an (out, in, 3, 3) weight has rows of 9 * in entries, and a depthwise (out, 1, 7, 7)
    weight has rows of 49.

    The block size is the largest of 256, 128 and 64 that is at most `largest` and divides the row. If none does, the
    row is cut into blocks of `largest` with a shorter last block, or is one block if it is shorter than `largest`.

    Args:
        any_divisor: whether the row's largest divisor of at least 32, if it has one, is preferred to a short last
            block.
    """
    axes, row = 1, shape[-1]
    while True:
        usual = [size for size in BLOCK_SIZES if size <= largest]
        unusual = range(min(largest, row), _MIN_BLOCK_SIZE - 1, -1) if any_divisor else ()
        divisor = next((size for size in (*usual, *unusual) if row % size == 0), None)
        # A weight of shape (n, 1) may join all of its axes, as a vector does.
        if divisor or row >= min(BLOCK_SIZES) or axes >= len(shape) - (row > 1):
            break
        axes += 1
        row *= shape[-axes]
    return Int8Blockwise(divisor or min(row, largest), axes) if row > 1 else None
