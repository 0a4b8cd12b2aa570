"""The update rule run as it is written: the path without a kernel, and the one that torch.compile takes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels import Hyper, Slot
from hf_lowmem.state import State, StatePlan
from hf_lowmem.update_rules import RULES, BoundMoment


def composed_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """Step one parameter by its rule, in float32."""
    step = slot.state["step"].item()
    _apply(rule, slot.plan, slot.param, slot.grad, slot.state, step, **vars(hyper))


def compiled_step(rule: str, slot: Slot, hyper: Hyper) -> None:
    """The same through torch.compile: one graph per plan and shape, never another as the hyperparameters change."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in vars(hyper).items()}
    step = slot.state["step"].double()
    with torch._dynamo.utils.disable_cache_limit():
        _compiled()(rule, slot.plan, slot.param, slot.grad, slot.state, step, **numbers)


def _apply(rule: str, plan: StatePlan, param: Tensor, grad: Tensor, state: State, step: Any, **hyper: Any) -> None:
    moments = {name: BoundMoment(moment, state, name, plan.codec) for name, moment in plan.moments.items()}
    param.copy_(RULES[rule](param.float(), grad.float(), moments, step, **hyper))


@cache
def _compiled() -> Any:
    return torch.compile(_apply, dynamic=False, fullgraph=True)
