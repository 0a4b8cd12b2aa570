"""The update rule run as it is written, on whole weights: what torch.compile takes, and the last resort without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.means import TileMean, means_of
from hf_lowmem.kernels.registry import Backend
from hf_lowmem.rounding import StoredWeight
from hf_lowmem.state import Projection, State, StatePlan
from hf_lowmem.update_rules import RULES


class Rule(Backend):
    """The rule on whole weights, with temporaries as large as they are.

    `step` lets the rule average the means; `apply` takes them as they are stored.
    """

    name = "rule"
    is_slow = True

    def covers(self, rule: str, step: ParamStep) -> bool:
        return True

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        self._run(bucket, hyper, averaged=False)

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        self._run(bucket, hyper, averaged=True)

    def _run(self, bucket: Bucket, hyper: Hyper, averaged: bool) -> None:
        for step in bucket:
            number = step.step.double() if isinstance(step.step, Tensor) else step.step
            weight, grad = step.weight(), step.grad.to(step.plan.arithmetic)
            if step.clip is not None:
                grad = grad * step.clip.scale
            found = means_of(step.plan) if averaged else []
            means = {name: TileMean.of(moment, step, name, averaged) for name, moment in found}
            values = {**hyper.numbers, **hyper.flags}
            weight.store(_new_param(bucket.rule, step.plan, weight, grad, step.state, number, means, **values))


class Compiled(Rule):
    """The rule through torch.compile: one graph per plan and shape, whatever the hyperparameters' values are."""

    name = "compiled"
    is_slow = False

    def covers(self, rule: str, step: ParamStep) -> bool:
        return False  # it is never asked

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        for step in map(ParamStep.clipped, bucket):
            compiled_step(bucket.rule, step, hyper)


def compiled_step(rule: str, step: ParamStep, hyper: Hyper) -> None:
    numbers = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in hyper.numbers.items()}
    number = torch.tensor(step.step, dtype=torch.float64, device="cpu")
    key = torch.tensor(step.noise_key, dtype=torch.int32, device=step.param.device)
    weight, values = step._replace(noise_key=key, param=step.param.detach()).weight(), {**numbers, **hyper.flags}
    with torch._dynamo.utils.disable_cache_limit():
        if step.plan.rounding.kind == "kahan":
            # A compiled store would leave out the rounding to the weight's dtype, whose error it is to keep.
            weight.store(_compiled(_new_param)(rule, step.plan, weight, step.grad, step.state, number, {}, **values))
        else:
            _compiled(_store_new_param)(rule, step.plan, weight, step.grad, step.state, number, **values)


def _new_param(
    rule: str,
    plan: StatePlan,
    weight: StoredWeight,
    grad: Tensor,
    state: State,
    step: Any,
    means: dict[str, Any],
    **hyper: Any,
) -> Tensor:
    space = BoundProjection(plan.projection, state, plan.stacked)
    moments = {**plan.bind(state, tuple(grad.shape)), **means}
    new_param: Tensor = RULES[rule].function(weight.load(), grad.to(plan.arithmetic), moments, space, step, **hyper)
    return new_param


def _store_new_param(
    rule: str, plan: StatePlan, weight: StoredWeight, grad: Tensor, state: State, step: Any, **hyper: Any
) -> None:
    weight.store(_new_param(rule, plan, weight, grad, state, step, {}, **hyper))


@dataclass(frozen=True)
class BoundProjection:
    """The projection of one parameter with its state, as a rule takes it."""

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


RULE, COMPILED = Rule(), Compiled()
