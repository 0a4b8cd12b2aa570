"""What a kernel is given and what it is found by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from hf_lowmem.rounding import StoredWeight, noise_key
from hf_lowmem.state import State, StatePlan


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of a group at this step; `flags` are those that only its rule has, plain values.

    The learning rate may be a 0-D tensor under `capturable`.
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
    """How gradients are clipped: `scale` (0-D float32, on their device) multiplies each as its step reads it.

    Finding the norm has read all of them; `sums` has what the steps on a GPU need of that, by launch.
    """

    scale: Tensor
    sums: dict[Any, Tensor]


class Slot(NamedTuple):
    """One parameter to step: its gradient, its state, its plan, the number of this step, from 1, the key of the noise
    that stochastic rounding takes, and what clips the gradient, if anything does.

    Under `capturable` the step is a 0-D tensor, and the key is found from it and (seed, number of the parameter).
    """

    param: Tensor
    grad: Tensor
    state: State
    plan: StatePlan
    step: Any
    noise_key: Any = 0
    clip: Clip | None = None

    def clipped(self) -> Slot:
        """With the gradient scaled in place, for what cannot scale it as it reads it."""
        if self.clip is not None:
            self.grad.mul_(self.clip.scale)
        return self._replace(clip=None)

    def weight(self) -> StoredWeight:
        """The parameter, to be read and written as float32."""
        key = self.noise_key
        if isinstance(key, tuple):
            seed, number = key
            key = noise_key(seed, number, self.step.long()).int()
        return StoredWeight.of(self.param, self.plan.rounding, self.state, key)


class KernelKey(NamedTuple):
    """What a kernel is written for: the rule, and the kinds of second moment (or "none"), of codec and of space."""

    rule: str
    second_moment: str
    codec: str
    projection: str
    device: str


Kernel = Callable[[Sequence[Slot], Hyper], None]


@lru_cache(maxsize=1 << 12)
def key_of(rule: str, plan: StatePlan, device: str) -> KernelKey:
    second = plan.moments.get("exp_avg_sq")
    kind = type(second).__name__ if second else "none"
    return KernelKey(rule, kind, type(plan.codec).__name__, type(plan.projection).__name__, device)
