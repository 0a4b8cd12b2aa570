"""What a parameter's optimizer state is, declared before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch
from torch import Tensor

State = dict[str, Tensor]
KAHAN_COMP = "kahan_comp"


@dataclass(frozen=True)
class TensorSpec:
    """One state tensor: the allocator, the planner, the checkpoint loader and the tests read this and nothing else.

    Args:
        shape: global shape.
        param_dims: for each axis of the state, the parameter axis it runs along entry by entry; None where it does
            not (averaged axes, blocks).
        dtype: storage dtype.
        signed: False for tensors that are never negative; picks the 8-bit code map.
        on_host: stays on the CPU, because every step reads it.
        block: consecutive entries of the parameter's last axis that one entry of the state's last axis stands for,
            where `param_dims` names no axis for it.
    """

    shape: tuple[int, ...]
    param_dims: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    signed: bool = True
    on_host: bool = False
    block: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def place(self, device: torch.device) -> torch.device:
        """Return where the tensor lives, for a parameter on `device`."""
        return torch.device("cpu") if self.on_host else device

    def zeros(self, device: torch.device, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a contiguous tensor of zeros as declared, or a part of it of `shape`, for a parameter on `device`."""
        return torch.zeros(self.shape if shape is None else shape, dtype=self.dtype, device=self.place(device))


STEP = TensorSpec((), (), on_host=True)


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that weights of `dtype` are stepped in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype of its arithmetic: float32, or float64 where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Codec(Protocol):
    """How the numbers of a full moment are stored."""

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Return the tensors that store a float32 tensor declared by `spec`."""

    def decode(self, state: State, name: str, spec: TensorSpec) -> Tensor:
        """Return the stored tensor as float32, of shape `spec.shape`: itself, or a new one that may be overwritten."""

    def encode(self, state: State, name: str, spec: TensorSpec, value: Tensor) -> None:
        """Store `value` (float32, shape `spec.shape`) in place."""


class Moment(Protocol):
    """How one moment of a parameter is represented, or what several moments are rebuilt from."""

    def specs(self, name: str, shape: tuple[int, ...], codec: Codec) -> dict[str, TensorSpec]:
        """Return the state tensors of the moment `name` for a parameter of `shape`."""

    def describe(self, name: str) -> str:
        """Return how the moment `name` is kept, in a few words for a person, or "" if every entry is."""


class AveragedMoment(Moment, Protocol):
    """A moment that is an exponential moving average.

    Two moments of a plan may share a state tensor: both declare it alike, and rules average the first moment before
    the second.
    """

    def ema(self, state: State, name: str, codec: Codec, value: Tensor, beta: float | Tensor) -> Tensor:
        """Average `value` (float32, the parameter's shape) in, store, and return the estimate, broadcastable to it."""


class FullMoment(AveragedMoment, Protocol):
    """A moment with one number per entry, which can be read and rewritten as a whole."""

    def spec(self, shape: tuple[int, ...]) -> TensorSpec:
        """Return the tensor that the codec stores."""


@dataclass(frozen=True)
class BoundMoment:
    """One moment of one parameter, with its state, the shape of its space, and the dtype of the arithmetic."""

    moment: Moment
    state: State
    name: str
    codec: Codec
    shape: tuple[int, ...]
    arithmetic: torch.dtype = torch.float32

    def ema(self, value: Tensor, beta: float | Tensor) -> Tensor:
        """Load the moment, average `value` in, store it and return the estimate."""
        return cast(AveragedMoment, self.moment).ema(self.state, self.name, self.codec, value, beta)

    def load(self) -> Tensor:
        """Return a full moment in the dtype of the arithmetic; it may be the stored tensor itself."""
        return self.codec.decode(self.state, self.name, self._spec()).to(self.arithmetic)

    def store(self, value: Tensor) -> None:
        """Overwrite a full moment."""
        self.codec.encode(self.state, self.name, self._spec(), value)

    def _spec(self) -> TensorSpec:
        return cast(FullMoment, self.moment).spec(self.shape)


Moments = Mapping[str, BoundMoment]
Space = tuple[tuple[int, ...], tuple[int | None, ...]]  # a shape, and the parameter axis that each axis runs along


class Projection(Protocol):
    """The space that the moments live in, and when its basis changes.

    `before_step` and `after_step` run outside any compiled region, with `step` counting the current step; they may
    change the basis and rewrite the moments. Gradients come in the parameter's dtype; the arithmetic is the plan's.
    """

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the state tensors of the projection itself."""

    def space(self, shape: tuple[int, ...], moment: str) -> Space:
        """Return the space of one moment of a parameter of `shape`."""

    def describe(self, shape: tuple[int, ...]) -> str:
        """Return what is projected, in a few words for a person, or "" if nothing is."""

    def takes_gradient(self, state: State) -> bool:
        """Return whether this step's `before_step` or `after_step` reads the gradient."""

    def before_step(self, grad: Tensor, state: State, moments: Moments) -> None:
        """Change the basis where that is due before the update."""

    def after_step(self, grad: Tensor, state: State, moments: Moments, beta2: float) -> None:
        """Change the basis where that is due after it; `beta2` is the second moment's decay."""

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape in the space of the moments, in float32."""

    def project_back(self, state: State, update: Tensor) -> Tensor:
        """Return a tensor of the moments' space as one of the parameter's shape, in float32."""


class Subspace(Projection, Protocol):
    """A projection in whose space an elementwise rule can be run by the kernel for unprojected weights."""

    def add_back(self, state: State, param: Tensor, update: Tensor, decay: float) -> bool:
        """Take param <- decay * param + project_back(update) where one product does that and rounds to nearest.

        Returns:
            Whether it was taken.
        """


@dataclass(frozen=True)
class FullSpace:
    """No projection: the moments have the parameter's shape."""

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        return {}

    def space(self, shape: tuple[int, ...], moment: str) -> Space:
        return shape, tuple(range(len(shape)))

    def describe(self, shape: tuple[int, ...]) -> str:
        return ""

    def takes_gradient(self, state: State) -> bool:
        return False

    def before_step(self, grad: Tensor, state: State, moments: Moments) -> None:
        pass

    def after_step(self, grad: Tensor, state: State, moments: Moments, beta2: float) -> None:
        pass

    def project(self, state: State, grad: Tensor) -> Tensor:
        return grad

    def project_back(self, state: State, update: Tensor) -> Tensor:
        return update


FULL_SPACE = FullSpace()


@dataclass(frozen=True)
class Rounding:
    """How a weight takes its update: "nearest", "stochastic" or "kahan"; see `rounding.py`."""

    kind: str = "nearest"

    @classmethod
    def of(cls, kind: str, dtype: torch.dtype) -> Rounding:
        """Return the rounding of a weight; one that is not narrower than the arithmetic loses nothing."""
        return cls(kind) if dtype.itemsize < torch.float32.itemsize else cls()

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return the tensor of what rounding has cut off from each entry, if it is kept."""
        return {KAHAN_COMP: TensorSpec(shape, tuple(range(len(shape))), torch.int16)} if self.kind == "kahan" else {}


@dataclass(frozen=True, eq=False)
class StatePlan:
    """The state of one parameter: its moments by name, the codec that stores the full ones, the projection, how the
    weight is rounded, and the dtype of the arithmetic.

    `stacked` says that axis 0 counts matrices, which share no statistic. `statistics` declares state that is measured
    between steps and that no step reads. `arithmetic` is float64 for float64 weights,
    whose float32 state is declared as float64 too, and float32 for all others; under MicroAdam it may be bfloat16,
    whose roundings its rule then takes over from the authors' code.
    """

    moments: Mapping[str, Moment]
    codec: Codec
    projection: Projection = FULL_SPACE
    stacked: bool = False
    rounding: Rounding = Rounding()
    arithmetic: torch.dtype = torch.float32
    statistics: Mapping[str, TensorSpec] = field(default_factory=dict)

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Return every state tensor of a parameter of `shape`, `step` included."""
        declared = {**self.projection.specs(shape), **self.rounding.specs(shape), **self.statistics}
        for name, moment in self.moments.items():
            space, param_dims = self.projection.space(shape, name)
            for key, spec in moment.specs(name, space, self.codec).items():
                dims = tuple(None if dim is None else param_dims[dim] for dim in spec.param_dims)
                spec = replace(spec, param_dims=dims)
                if declared.setdefault(key, spec) != spec:
                    raise ValueError(
                        f"Two parts of a plan declare the state {key!r} differently: {declared[key]}, {spec}."
                    )
        return {"step": STEP, **{name: self._in_arithmetic(name, spec) for name, spec in declared.items()}}

    def _in_arithmetic(self, name: str, spec: TensorSpec) -> TensorSpec:
        kept = spec.on_host or spec.dtype != torch.float32 or name.endswith("_absmax")
        return spec if kept else replace(spec, dtype=torch.promote_types(spec.dtype, self.arithmetic))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(spec.nbytes for spec in self.specs(shape).values())

    def bind(self, state: State, shape: tuple[int, ...]) -> dict[str, BoundMoment]:
        """Return the moments with the state of one parameter of `shape`, or of a tile of one that is not projected."""
        return {
            name: BoundMoment(moment, state, name, self.codec, self.projection.space(shape, name)[0], self.arithmetic)
            for name, moment in self.moments.items()
        }
