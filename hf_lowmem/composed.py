"""The update rule run as it is written: the path without a kernel, and the one that torch.compile takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels import Hyper, Slot
from hf_lowmem.moments import Full
from hf_lowmem.rounding import StoredWeight
from hf_lowmem.state import FULL_SPACE, Projection, State, StatePlan
from hf_lowmem.update_rules import ELEMENTWISE, RULES

TILE = 1 << 18  # entries that an elementwise rule is run on at a time, so that its temporaries stay small


def composed_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """Step one parameter by its rule, in the plan's arithmetic: float32, or float64 for float64 weights."""
    step = slot.step.double() if isinstance(slot.step, Tensor) else slot.step
    whole = slot.weight()
    for rows in _tiles(rule, slot):
        weight, grad = whole[rows], slot.grad[rows].to(slot.plan.arithmetic)
        if slot.clip is not None:
            grad = grad * slot.clip.scale
        state = {name: tensor[rows] if tensor.ndim else tensor for name, tensor in slot.state.items()}
        weight.store(_new_param(rule, slot.plan, weight, grad, state, step, **hyper.numbers, **hyper.flags))


def _tiles(rule: str, slot: Slot) -> Iterator[tuple[slice, ...]]:
    """Slices of axis 0 where each entry's step depends on its own state alone, else the whole weight."""
    shape = slot.param.shape
    by_entry = rule in ELEMENTWISE and slot.plan.projection is FULL_SPACE
    by_entry &= all(isinstance(moment, Full) for moment in slot.plan.moments.values())
    by_entry &= all(tensor.shape[:1] == shape[:1] for tensor in slot.state.values() if tensor.ndim)
    if not shape or not by_entry:
        yield ()
        return
    rows = max(TILE // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        yield (slice(start, start + rows),)


def compiled_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """The same through torch.compile: one graph per plan and shape, never another as the hyperparameters change."""
    slot = slot.clipped()
    numbers = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in hyper.numbers.items()}
    step = torch.tensor(slot.step, dtype=torch.float64, device="cpu")
    key = torch.tensor(slot.noise_key, dtype=torch.int32, device=slot.param.device)
    weight, values = slot._replace(noise_key=key, param=slot.param.detach()).weight(), {**numbers, **hyper.flags}
    with torch._dynamo.utils.disable_cache_limit():
        if slot.plan.rounding.kind == "kahan":
            # A compiled store would leave out the rounding to the weight's dtype, whose error it is to keep.
            weight.store(_compiled(_new_param)(rule, slot.plan, weight, slot.grad, slot.state, step, **values))
        else:
            _compiled(_store_new_param)(rule, slot.plan, weight, slot.grad, slot.state, step, **values)


def _new_param(
    rule: str, plan: StatePlan, weight: StoredWeight, grad: Tensor, state: State, step: Any, **hyper: Any
) -> Tensor:
    space = _BoundProjection(plan.projection, state, plan.stacked)
    new_param: Tensor = RULES[rule](weight.load(), grad.to(plan.arithmetic), plan.bind(state), space, step, **hyper)
    return new_param


def _store_new_param(
    rule: str, plan: StatePlan, weight: StoredWeight, grad: Tensor, state: State, step: Any, **hyper: Any
) -> None:
    weight.store(_new_param(rule, plan, weight, grad, state, step, **hyper))


@dataclass(frozen=True)
class _BoundProjection:
    projection: Projection
    state: State
    stacked: bool

    def project(self, grad: Tensor) -> Tensor:
        return self.projection.project(self.state, grad)

    def project_back(self, update: Tensor) -> Tensor:
        return self.projection.project_back(self.state, update)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=True)
