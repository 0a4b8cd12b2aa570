"""The update rules as the papers write them: pure functions of tensors, the reference for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lowmem.state import Codec, Moment, State


@dataclass(frozen=True)
class BoundMoment:
    """One moment of one parameter: `ema` loads it, averages a value in, stores it and returns the estimate."""

    moment: Moment
    state: State
    name: str
    codec: Codec

    def ema(self, value: Tensor, beta: float | Tensor) -> Tensor:
        return self.moment.ema(self.state, self.name, self.codec, value, beta)


Number = Any  # a float, or a 0-D tensor where a compiled step must not recompile as it changes


def adamw_rule(
    param: Tensor,
    grad: Tensor,
    moments: dict[str, BoundMoment],
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
) -> Tensor:
    """The new parameter under AdamW (arXiv:1711.05101, algorithm 2), for any representation of the moments."""
    m_hat = moments["exp_avg"].ema(grad, beta1) / (1 - beta1**step)
    v_hat = moments["exp_avg_sq"].ema(grad.square(), beta2) / (1 - beta2**step)
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps)
    return new_param


def signum_rule(
    param: Tensor,
    grad: Tensor,
    moments: dict[str, BoundMoment],
    step: Number,
    *,
    lr: Number,
    beta1: Number,
    beta2: Number,
    eps: Number,
    weight_decay: Number,
) -> Tensor:
    """The new parameter under Signum (arXiv:2407.07972): the sign of the momentum."""
    new_param: Tensor = param * (1 - lr * weight_decay) - lr * moments["exp_avg"].ema(grad, beta1).sign()
    return new_param


UpdateRule = Callable[..., Tensor]
RULES: dict[str, UpdateRule] = {"adamw": adamw_rule, "signum": signum_rule}
