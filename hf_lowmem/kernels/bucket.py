"""The input of a backend: the parameters that it steps together, and the numbers of their step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.rounding import StoredWeight, noise_key
from hf_lowmem.sharding import Groups
from hf_lowmem.state import State, StatePlan

if TYPE_CHECKING:
    from hf_lowmem.kernels.registry import Backend
    from hf_lowmem.shards import Shard


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of a group at this step; `flags` are those that only its update rule has.

    The learning rate may be a 0-D tensor on the device under `capturable`.
    """

    lr: Any
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "flags"}


class Clip(NamedTuple):
    """How gradients are clipped: `scale` (0-D, on their device) multiplies each gradient as its step reads it.

    `partial_sums` keeps, by launch, what the norm's pass over the gradients has found and the step needs too.
    """

    scale: Tensor
    partial_sums: dict[Any, tuple[Any, Tensor]]


class ParamStep(NamedTuple):
    """The step of one parameter: weight, gradient, state and plan, and the number of the step, from 1.

    Under `capturable` the number is a 0-D tensor, and `noise_key` is (seed, number of the parameter). `whole` is the
    shape of the weight that `param` is a shard of, or None where it is the weight itself.
    """

    param: Tensor
    grad: Tensor
    state: State
    plan: StatePlan
    step: Any
    noise_key: Any = 0
    clip: Clip | None = None
    whole: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight, whose entries means are taken over."""
        return tuple(self.param.shape) if self.whole is None else self.whole

    def clipped(self) -> ParamStep:
        """Scale the gradient in place, for what cannot scale it as it reads it; one that overlaps itself is copied."""
        if self.clip is None:
            return self
        overlaps = torch._debug_has_internal_overlap(self.grad) == 1
        grad = self.grad * self.clip.scale if overlaps else self.grad.mul_(self.clip.scale)
        return self._replace(grad=grad, clip=None)

    def weight(self) -> StoredWeight:
        """Return the parameter as it is read and written in the plan's arithmetic."""
        key = self.noise_key
        if isinstance(key, tuple):
            seed, number = key
            key = noise_key(seed, number, self.step.long()).int()
        return StoredWeight.of(self.param, self.plan.rounding, self.state, key)


@dataclass(eq=False)
class Bucket:
    """Parameters of one group that one backend steps together, all on one device and under one update rule.

    What is listed has one entry per parameter. A bucket lives for as long as no weight, state or set of gradients
    changes; `kept` is where its backend keeps what it has derived from them, such as a table of addresses.

    Args:
        grads: the gradients as dense tensors; they may be other ones at each step.
        steps: the numbers of this step, from 1: floats, or 0-D tensors on the device under `capturable`.
        noise_keys: the keys of this step's noise under stochastic rounding, else zeros.
        clip: how all of the gradients are clipped, if they are.
        owners: the optimizer's own parameters, of which `params` may be pieces.
        pieces: for each of them the shard that it is a piece of, and its number there, where the means of the shard
            are averaged before the step; else nothing.
        solo: the shard of the only parameter, where its step takes collectives of its own.
        spread: the process groups over which the parameters are cut.
    """

    rule: str
    backend: Backend
    device: torch.device
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[State]
    plans: Sequence[StatePlan]
    steps: Sequence[Any]
    noise_keys: Sequence[Any]
    clip: Clip | None = None
    owners: Sequence[Tensor] = ()
    pieces: Sequence[tuple[Shard, int]] = ()
    solo: Shard | None = None
    spread: Groups = ()
    kept: dict[Any, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[ParamStep]:
        whole = self.solo.tile.whole if self.solo else None
        columns = (self.params, self.grads, self.states, self.plans, self.steps, self.noise_keys)
        for param, grad, state, plan, step, key in zip(*columns, strict=True):
            yield ParamStep(param, grad, state, plan, step, key, self.clip, whole)

    @property
    def arithmetic(self) -> torch.dtype:
        return self.plans[0].arithmetic

    def part(self, numbers: Sequence[int]) -> Bucket:
        """Return a bucket of some of the parameters for this step alone."""
        listed = ("params", "grads", "states", "plans", "steps", "noise_keys", "owners", "pieces")
        chosen: dict[str, Any] = {name: [each[n] for n in numbers] for name in listed if (each := getattr(self, name))}
        return replace(self, **chosen, kept={})

    def gradient_addresses(self) -> list[int]:
        """Return the address of each gradient."""
        return list(map(Tensor.data_ptr, self.grads))

    @classmethod
    def of(cls, steps: Sequence[ParamStep], rule: str, backend: Backend) -> Bucket:
        """Make a bucket for this step alone."""
        params, grads, states, plans, numbers, keys, *_ = zip(*steps, strict=True)
        return cls(rule, backend, params[0].device, params, grads, states, plans, numbers, keys, steps[0].clip)
