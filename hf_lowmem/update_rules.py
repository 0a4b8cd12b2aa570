"""The update rules as the papers write them: pure functions of tensors, the reference for every kernel.

Each takes the parameter, its gradient, its moments and its projection, the number of the step, and the
hyperparameters as keywords (numbers, or 0-D tensors where a compiled step must not recompile as they change; flags
are plain values). It returns the new parameter, all in float32, or in float64 for float64 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from hf_lowmem.state import Moments

Number = Any  # a float or a 0-D tensor


class BoundProjection(Protocol):
    """The projection of one parameter, with its state; whether axis 0 counts matrices."""

    @property
    def stacked(self) -> bool: ...

    def project(self, grad: Tensor) -> Tensor: ...

    def project_back(self, update: Tensor) -> Tensor: ...


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
    """Signum (arXiv:2407.07972): the sign of the momentum."""
    m = moments["exp_avg"].ema(space.project(grad), beta1)
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * space.project_back(m.sign())
    return new_param


def root_mean_square(tensor: Tensor, stacked: bool) -> Tensor:
    """Of the whole tensor, 0-D, or of each matrix of a stack, broadcastable to it."""
    dims = tuple(range(1 if stacked else 0, tensor.ndim))
    return tensor.square().mean(dims, keepdim=stacked).sqrt()


UpdateRule = Callable[..., Tensor]
RULES: dict[str, UpdateRule] = {
    "adamw": adamw_rule,
    "transformers_adamw": transformers_adamw_rule,
    "adafactor": adafactor_rule,
    "soap": soap_rule,
    "signum": signum_rule,
}

# The rules under which an entry's step depends on nothing but the entry's own gradient and moments.
ELEMENTWISE = ("adamw", "transformers_adamw", "signum")

# The hyperparameters that only one rule has: flags, plain values of the group.
RULE_FLAGS: dict[str, tuple[str, ...]] = {
    "transformers_adamw": ("correct_bias",),
    "adafactor": ("decay_rate", "clip_threshold", "scale_parameter"),
    "soap": ("correct_bias", "normalize_grads"),
}
