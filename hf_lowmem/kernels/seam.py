"""What a kernel is given and what it is found by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.moments import Full
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
    """What a kernel is written for: the rule, the kinds of second moment, of codec and of space, and the device.

    A second moment that the rule does not have is "none". `others` is empty for plans that kernels are written for: a
    full first moment called exp_avg, a second one called exp_avg_sq, and float32 arithmetic. For any other plan it
    says what is different, so that no kernel is found.
    """

    rule: str
    second_moment: str
    codec: str
    projection: str
    device: str
    others: str = ""


Kernel = Callable[[Sequence[Slot], Hyper], None]


@lru_cache(maxsize=1 << 12)
def key_of(rule: str, plan: StatePlan, device: str) -> KernelKey:
    """What a kernel for this plan is found by."""
    moments = dict(plan.moments)
    first, second = moments.pop("exp_avg", None), moments.pop("exp_avg_sq", None)
    others = [f"{name}: {type(moment).__name__}" for name, moment in moments.items()]
    if first != Full():
        others.append(f"exp_avg: {first}")
    if isinstance(second, Full) and second.signed:
        others.append(f"exp_avg_sq: {second}")
    if plan.arithmetic != torch.float32:
        others.append(str(plan.arithmetic))
    kind = "none" if second is None else type(second).__name__
    return KernelKey(rule, kind, type(plan.codec).__name__, type(plan.projection).__name__, device, ", ".join(others))
