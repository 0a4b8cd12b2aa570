"""A moment stored as the means of its rows and of its columns (Adafactor)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.state import Codec, State, TensorSpec


@dataclass(frozen=True)
class RowColMean:
    """A non-negative moment (..., m, n), stored as the means of its rows and columns; its estimate has rank 1.

        estimate = row / mean(row) * col

    Source: arXiv:1804.04235, algorithm 4.

    State: `name_row` (..., m) and `name_col` (..., n), float32 under every codec.
    """

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        *stack, m, n = shape
        axes = tuple(range(len(stack)))
        return {
            f"{name}_row": TensorSpec((*stack, m), (*axes, len(stack)), signed=False),
            f"{name}_col": TensorSpec((*stack, n), (*axes, len(stack) + 1), signed=False),
        }

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        row, col = state[f"{name}_row"], state[f"{name}_col"]
        row.copy_(beta * row + (1 - beta) * value.mean(-1))
        col.copy_(beta * col + (1 - beta) * value.mean(-2))
        estimate: Tensor = (row / row.mean(-1, keepdim=True)).unsqueeze(-1) * col.unsqueeze(-2)
        return estimate.clamp(min=torch.finfo(torch.float32).tiny)  # keeps an update from dividing by an underflow

    def describe(self, name: str) -> str:
        return f"{name} by rows and columns"
