"""The update rule run as it is written: the path without a kernel, and the one that torch.compile takes."""

from __future__ import annotations

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
    key = slot.noise_key
    _apply(rule, slot.plan, slot.param, slot.grad, slot.state, slot.step, key, **hyper.numbers, **hyper.flags)


def compiled_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """The same through torch.compile: one graph per plan and shape, never another as the hyperparameters change."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.numbers.items()}
    step = torch.tensor(slot.step, dtype=torch.float64)
    key = torch.tensor(slot.noise_key, dtype=torch.int32, device=slot.param.device)
    with torch._dynamo.utils.disable_cache_limit():
        _compiled()(rule, slot.plan, slot.param, slot.grad, slot.state, step, key, **numbers, **hyper.flags)


def _apply(
    rule: str, plan: StatePlan, param: Tensor, grad: Tensor, state: State, step: Any, noise_key: Any, **hyper: Any
) -> None:
    space = _BoundProjection(plan.projection, state, plan.stacked)
    weight = StoredWeight.of(param, plan.rounding, state, noise_key)
    new_param = RULES[rule](weight.load(), grad.float(), plan.bind(state), space, step, **hyper)
    weight.store(new_param)


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
def _compiled() -> Any:
    return torch.compile(_apply, dynamic=False, fullgraph=True)
