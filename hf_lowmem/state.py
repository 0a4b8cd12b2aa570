"""What a parameter's optimizer state is, declared before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor: the allocator, the planner, the checkpoint loader and the tests read this and nothing else.

    Args:
        shape: global shape.
        param_dims: for each axis of the state, the parameter axis it runs along entry by entry; None where it does
            not (averaged axes, blocks).
        dtype: storage dtype.
        signed: False for tensors that are never negative; picks the 8-bit code map.
    """

    shape: tuple[int, ...]
    param_dims: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    signed: bool = True

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


STEP = TensorSpec((), ())


class Codec(Protocol):
    """How the numbers of a full moment are stored."""

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors that store a float32 tensor declared by `spec`."""

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        """The stored tensor as float32, shape `spec.shape`."""

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        """Store `value` (float32, shape `spec.shape`) in place."""


class Moment(Protocol):
    """How one moment of a parameter is represented."""

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        """The state tensors of the moment `name` for a parameter of `shape`."""

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        """Average `value` (float32, the parameter's shape) in, store, and return the estimate, broadcastable to it."""


@dataclass(frozen=True, eq=False)
class StatePlan:
    """The state of one parameter: its moments by name and the codec that stores the full ones."""

    moments: Mapping[str, Moment]
    codec: Codec

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Every state tensor of a parameter of `shape`, `step` included."""
        declared = {"step": STEP}
        for name, moment in self.moments.items():
            declared.update(moment.specs(name, shape, self.codec))
        return declared

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(spec.nbytes for spec in self.specs(shape).values())
