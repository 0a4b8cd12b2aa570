"""What a kernel is given and what it is found by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hf_lowmem.state import State, StatePlan


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of a group at this step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Slot(NamedTuple):
    """One parameter to step: its gradient, its state (`step` already counted) and its plan."""

    param: Tensor
    grad: Tensor
    state: State
    plan: StatePlan


class KernelKey(NamedTuple):
    """What a kernel is written for: the rule, and the kinds of second moment ("none" if there is none) and codec."""

    rule: str
    second_moment: str
    codec: str
    device: str


Kernel = Callable[[Sequence[Slot], Hyper], None]


def key_of(rule: str, plan: StatePlan, device: str) -> KernelKey:
    second = plan.moments.get("exp_avg_sq")
    return KernelKey(rule, type(second).__name__ if second else "none", type(plan.codec).__name__, device)
