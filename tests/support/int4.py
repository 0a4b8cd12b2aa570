"""A 4-bit codec as a test-only codec: two numbers in each byte, and a scale per block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowmem.state import State, TensorSpec

BLOCK = 64


@dataclass(frozen=True)
class Int4Blockwise:
    """Linear 4-bit codes of rows that whole blocks of 64 divide; a second moment is stored as its fourth root."""

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        *rows, columns = spec.shape
        codes = TensorSpec((*rows, columns // 2), (*spec.param_dims[:-1], None), torch.uint8, block=2)
        scales = replace(codes, shape=(*rows, columns // BLOCK), dtype=torch.float32, block=BLOCK)
        return {name: codes, f"{name}_absmax": scales}

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        codes = torch.stack([state[name] & 15, state[name] >> 4], -1).flatten(-2).float() - 8
        scaled = codes.unflatten(-1, (-1, BLOCK)) * (state[f"{name}_absmax"] / 7).unsqueeze(-1)
        value = scaled.flatten(-2)
        return value if spec.signed else value**4

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        blocks = (value if spec.signed else value.sqrt().sqrt()).float().unflatten(-1, (-1, BLOCK))
        absmax = blocks.abs().amax(-1)
        codes = (blocks / (absmax / 7).clamp(min=1e-38).unsqueeze(-1)).round().to(torch.int8).flatten(-2) + 8
        low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        state[name].copy_(low | (high << 4))
        state[f"{name}_absmax"].copy_(absmax)


def int4_for(shape: tuple[int, ...], block_size: int, any_divisor: bool) -> Int4Blockwise | None:
    """Return the codec of moments of `shape`; None where its blocks do not divide a row."""
    return Int4Blockwise() if shape[-1] % BLOCK == 0 else None
