"""The update rule run as it is written: the path without a kernel, and the one that torch.compile takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels import Hyper, Slot
from hf_lowmem.rounding import StoredWeight
from hf_lowmem.state import Projection, State, StatePlan
from hf_lowmem.update_rules import RULES


def composed_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """Step one parameter by its rule, in float32."""
    weight, grad = slot.weight(), slot.grad if slot.clip is None else slot.grad.float() * slot.clip.scale
    step = slot.step.double() if isinstance(slot.step, Tensor) else slot.step
    weight.store(_new_param(rule, slot.plan, weight, grad, slot.state, step, **hyper.numbers, **hyper.flags))


def compiled_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """The same through torch.compile: one graph per plan and shape, never another as the hyperparameters change."""
    slot = slot.clipped()
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.numbers.items()}
    step = torch.tensor(slot.step, dtype=torch.float64)
    key = torch.tensor(slot.noise_key, dtype=torch.int32, device=slot.param.device)
    weight, values = slot._replace(noise_key=key).weight(), {**numbers, **hyper.flags}
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
    new_param: Tensor = RULES[rule](weight.load(), grad.float(), plan.bind(state), space, step, **hyper)
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
