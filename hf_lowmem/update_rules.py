"""The update rules as the papers write them: pure functions of tensors, which every backend must match.

Each takes the parameter, its gradient, its moments and its projection, the number of the step, and the
hyperparameters as keywords (numbers, or 0-D tensors where a compiled step must not recompile as they change; flags
are plain values). It returns the new parameter, all in float32, or in float64 for float64 weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lowmem.state import Moments

Number = Any  # a float or a 0-D tensor
SMALLEST = 1e-30  # what rules add so that zeros are not divided by zero
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay")  # what every rule takes


class BoundProjection(Protocol):
    """The projection of one parameter, with its state; `stacked` says whether axis 0 counts matrices."""

    @property
    def stacked(self) -> bool: ...

    def project(self, grad: Tensor) -> Tensor: ...

    def project_back(self, update: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class UpdateRule:
    """An update rule, and what a backend must know of it.

    Args:
        function: the rule itself.
        elementwise: whether an entry's step depends only on the entry's own gradient and moments, so that the rule
            can be run on slices of the weight.
        averages_squares: whether its second moment averages the square of the projected gradient by `beta2`, so that
            the means of a weight can be found before the rule is run on its slices.
    """

    function: Callable[..., Tensor]
    elementwise: bool
    averages_squares: bool


RULES: dict[str, UpdateRule] = {}
RULE_FLAGS: dict[str, tuple[str, ...]] = {}  # the hyperparameters that only one rule has, plain values of a group


def update_rule(
    name: str, *, elementwise: bool, averages_squares: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the decorated function as the update rule `name`; see `UpdateRule` for the others."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        keywords = inspect.signature(function).parameters.values()
        named = [each.name for each in keywords if each.kind is inspect.Parameter.KEYWORD_ONLY]
        RULE_FLAGS[name] = tuple(flag for flag in named if flag not in HYPERPARAMETERS)
        RULES[name] = UpdateRule(function, elementwise, averages_squares)
        return function

    return register


@update_rule("adamw", elementwise=True, averages_squares=True)
def adamw_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
) -> Tensor:
    """AdamW (arXiv:1711.05101, algorithm 2), for any representation of the moments."""
    g = space.project(grad)
    m_hat = moments["exp_avg"].ema(g, beta1) / (1 - beta1**step)
    v_hat = moments["exp_avg_sq"].ema(g.square(), beta2) / (1 - beta2**step)
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * space.project_back(m_hat / (v_hat.sqrt() + eps))
    return new_param


@update_rule("limited_adamw", elementwise=True, averages_squares=True)
def limited_adamw_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    update_limit: Number,
) -> Tensor:
    """AdamW whose second moment includes the first, so that no update exceeds `update_limit` times lr.

    A second moment that is an average over entries may be far below an entry's own, whose update would then be far
    above those of AdamW.
    """
    g = space.project(grad)
    m_hat = moments["exp_avg"].ema(g, beta1) / (1 - beta1**step)
    v_hat = moments["exp_avg_sq"].ema(g.square(), beta2) / (1 - beta2**step) + (m_hat / update_limit).square()
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * space.project_back(m_hat / (v_hat.sqrt() + eps))
    return new_param


@update_rule("transformers_adamw", elementwise=True, averages_squares=True)
def transformers_adamw_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    correct_bias: bool,
) -> Tensor:
    """AdamW as `transformers.AdamW` was, which the code of GaLore and COAP grew from.

    It differs from `adamw_rule` by eps, which is added to the uncorrected root, and by decaying the updated weight.
    """
    g = space.project(grad)
    m = moments["exp_avg"].ema(g, beta1)
    v = moments["exp_avg_sq"].ema(g.square(), beta2)
    alpha = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if correct_bias else lr
    new_param: Tensor = (param - alpha * space.project_back(m / (v.sqrt() + eps))) * (1 - lr * weight_decay)
    return new_param


@update_rule("soap", elementwise=False)
def soap_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    correct_bias: bool,
    normalize_grads: bool,
) -> Tensor:
    """SOAP (arXiv:2409.11321, algorithm 3): Adam in the eigenbasis, its first moment kept outside of it."""
    m = moments["exp_avg"].ema(grad, beta1)
    v = moments["exp_avg_sq"].ema(space.project(grad).square(), beta2)
    update = space.project_back(space.project(m) / (v.sqrt() + eps))
    if normalize_grads:
        update = update / (1e-30 + root_mean_square(update, space.stacked))
    alpha = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if correct_bias else lr
    new_param: Tensor = (param - alpha * update) * (1 - lr * weight_decay)
    return new_param


@update_rule("adafactor", elementwise=False)
def adafactor_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
    decay_rate: float,
    clip_threshold: float,
    scale_parameter: bool,
) -> Tensor:
    """Adafactor (arXiv:1804.04235, algorithm 4) with the momentum of fairseq's, an average of finished updates.

    `beta2` and `eps` are not used: the second moment's decay comes from `decay_rate`, and its floor is 1e-30.
    """
    alpha = lr * root_mean_square(param, space.stacked).clamp(min=1e-3) if scale_parameter else lr
    g = space.project(grad)
    v = moments["exp_avg_sq"].ema(g.square() + 1e-30, 1 - step**decay_rate)
    u = g * v.rsqrt()
    u = u / (root_mean_square(u, space.stacked) / clip_threshold).clamp(min=1.0)
    update = moments["exp_avg"].ema(alpha * u, beta1)
    new_param: Tensor = param * (1 - alpha * weight_decay) - space.project_back(update)
    return new_param


@update_rule("signum", elementwise=True)
def signum_rule(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    space: BoundProjection,
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
) -> Tensor:
    """Signum (arXiv:2407.07972): the sign of the momentum, and NaN where that is not finite, as AdamW's update is."""
    m = moments["exp_avg"].ema(space.project(grad), beta1)
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * space.project_back(torch.add(m.sign(), m, alpha=0))
    return new_param


def root_mean_square(tensor: Tensor, stacked: bool) -> Tensor:
    """Return the root mean square of a tensor, 0-D, or that of each matrix of a stack, broadcastable to it."""
    dims = tuple(range(1 if stacked else 0, tensor.ndim))
    return tensor.square().mean(dims, keepdim=stacked).sqrt()


def finite_root_mean_square(tensor: Tensor, stacked: bool) -> Tensor:
    """Return what `root_mean_square` does, where a square that is not finite counts as zero.

    A gradient that is not finite then spoils its own entry only.
    """
    squares = tensor.square()
    return root_mean_square(torch.where(squares.isfinite(), tensor, 0.0), stacked)


def unbiased_decay(beta: Number, step: Number) -> Number:
    """Return the decay rate at a step by which an average equals Adam's after the correction of its bias.

    At the first step it is 0, so that what the average starts from does not matter.
    """
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
