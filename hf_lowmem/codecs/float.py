"""Moments stored as plain floats."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowmem.state import State, TensorSpec


@dataclass(frozen=True)
class Float32:
    """Moments stored in float32."""

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {name: spec}

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        return state[name]

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        state[name].copy_(value)


@dataclass(frozen=True)
class BFloat16:
    """Signed moments stored in bfloat16, unsigned ones in float32.

    A bfloat16 average of squares with beta2 = 0.999 would never move, because one step changes it by less than half a
    unit in the last place.
    """

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {name: replace(spec, dtype=torch.bfloat16) if spec.signed else spec}

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        return state[name].float()

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        state[name].copy_(value)
