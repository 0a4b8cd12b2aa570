"""Moments stored as 8-bit codes with one float32 scale per block of a row."""

from __future__ import annotations

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
    """Dynamic 8-bit codes (arXiv:2110.02861), scaled by the largest magnitude of each block.

    A block is `block_size` consecutive entries of one row (of the last axis), so scales shard with their codes; the
    last axis must be a multiple of it. Unsigned tensors are stored as their square root: the codes span seven decades,
    which the square of a gradient exceeds, and a second moment that falls to zero blows the step up.

    State: `name` uint8, the tensor's shape; `name_absmax` float32, the last axis divided by `block_size`.
    """

    block_size: int = 256

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        *rows, columns = spec.shape
        return {
            name: replace(spec, dtype=torch.uint8),
            f"{name}_absmax": TensorSpec((*rows, columns // self.block_size), (*spec.param_dims[:-1], None)),
        }

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        codes, absmax = state[name], state[f"{name}_absmax"]
        if torch.compiler.is_compiling():
            blocks: Tensor = decode_lines(codes, spec.signed).unflatten(-1, (-1, self.block_size))
            value = (blocks * absmax.unsqueeze(-1)).flatten(-2)
        else:
            value = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
            dequantize(codes, absmax, spec.signed, out=value, scratch=Scratch(codes.device))
        return value if spec.signed else value.square()

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        codes, absmax = state[name], state[f"{name}_absmax"]
        value = value.clone() if spec.signed else value.sqrt()
        if torch.compiler.is_compiling():
            blocks = value.nan_to_num(0.0, 0.0, 0.0).unflatten(-1, (-1, self.block_size))
            largest = blocks.abs().amax(-1)
            codes.copy_(encode_lines((blocks / largest.clamp(min=_TINY).unsqueeze(-1)).flatten(-2), spec.signed))
            absmax.copy_(largest)
        else:
            quantize(value, codes, absmax, spec.signed, scratch=Scratch(value.device))


def dequantize(codes: Tensor, absmax: Tensor, signed: bool, *, out: Tensor, scratch: Scratch) -> None:
    """Write codes (..., n) scaled by absmax (..., n / block_size) to `out`, contiguous float32 of the codes' shape."""
    index = scratch.get("index", codes.shape, torch.int32).copy_(codes)
    torch.index_select(decode_table(signed, codes.device), 0, index.view(-1), out=out.view(-1))
    out.unflatten(-1, (absmax.shape[-1], -1)).mul_(absmax.unsqueeze(-1))


def quantize(value: Tensor, codes: Tensor, absmax: Tensor, signed: bool, *, scratch: Scratch) -> None:
    """Write the nearest codes of `value` (contiguous float32, overwritten) and the scales of its blocks.

    NaN and Inf become zero, so that they never reach the scale that their neighbours share; the weight at such an
    entry is already lost, as it is under AdamW.
    """
    blocks = value.unflatten(-1, (absmax.shape[-1], -1))
    largest = torch.maximum(blocks.amax(-1), -blocks.amin(-1)) if signed else blocks.amax(-1)
    if not known_finite(largest):
        torch.nan_to_num(blocks, 0.0, 0.0, 0.0, out=blocks)
        largest = blocks.abs().amax(-1)
    absmax.copy_(largest)
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


def block_size_for(columns: int, largest: int, any_divisor: bool = False) -> int | None:
    """The largest of 256, 128 and 64, at most `largest`, that divides a row of `columns` entries, or None."""
    usual = [size for size in BLOCK_SIZES if size <= largest]
    unusual = range(min(largest, columns), _MIN_BLOCK_SIZE - 1, -1) if any_divisor else ()
    return next((size for size in (*usual, *unusual) if columns % size == 0), None)
