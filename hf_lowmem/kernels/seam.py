"""What a kernel is given and what it is found by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hf_lowmem.state import State, StatePlan


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of a group at this step; `flags` are those that only its rule has, plain values."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if name != "flags"}


class Slot(NamedTuple):
    """One parameter to step: its gradient, its state, its plan, the number of this step, from 1, and the key of the
    noise that stochastic rounding takes."""

    param: Tensor
    grad: Tensor
    state: State
    plan: StatePlan
    step: float
    noise_key: int = 0


class KernelKey(NamedTuple):
    """What a kernel is written for: the rule, and the kinds of second moment (or "none"), of codec and of space."""

    rule: str
    second_moment: str
    codec: str
    projection: str
    device: str


Kernel = Callable[[Sequence[Slot], Hyper], None]


def key_of(rule: str, plan: StatePlan, device: str) -> KernelKey:
    second = plan.moments.get("exp_avg_sq")
    kind = type(second).__name__ if second else "none"
    return KernelKey(rule, kind, type(plan.codec).__name__, type(plan.projection).__name__, device)
