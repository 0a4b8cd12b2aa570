"""Lion as a test-only algorithm: what CONTRIBUTING.md says that an algorithm takes, in one file.

With `pytest -p tests.support.lion` the tests of every optim name run on it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.algorithms.adamw import codec_of
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import Hyperparameters
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import StatePlan
from hf_lowmem.trainer.names import OPTIM_NAMES, OptimName
from hf_lowmem.update_rules import update_rule


@update_rule("lion", elementwise=True)
def lion_rule(param, grad, moments, space, step, *, lr, beta1, beta2, eps, weight_decay) -> Tensor:
    """Lion (arXiv:2302.06675, program 1): the sign of a mix of momentum and gradient."""
    m = moments["exp_avg"].load()
    update = (beta1 * m + (1 - beta1) * grad).sign()
    moments["exp_avg"].store(beta2 * m + (1 - beta2) * grad)
    return param * (1 - lr * weight_decay) - lr * update


class Lion(LowMemOptimizer):
    """Lion, whose one moment is stored like any other."""

    algorithm = "lion"
    rule = "lion"
    hyperparameters = Hyperparameters(lr=1e-4, betas=(0.9, 0.99))

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        return StatePlan({"exp_avg": Full()}, codec_of(shape, options))


@dataclass(frozen=True)
class LionRecipe(Recipe):
    """Lion, whose one moment keeps every entry."""

    optimizer_cls = Lion

    def options_of(self, role: ParamRole) -> RoleOptions:
        return {}, "no second moment"


def pytest_configure() -> None:
    RECIPES["lion"] = LionRecipe
    OPTIM_NAMES["lowmem_lion"] = OptimName("lion", None, 4.000, "Lion: the sign of a mix of momentum and gradient")
    OPTIM_NAMES["lowmem_lion_8bit"] = OptimName("lion", 8, 1.016, "Lion, its moment in 8 bit")
