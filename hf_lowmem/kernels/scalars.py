"""The scalars of an elementwise step, in one form for AdamW and Signum.

    param <- decay * param - step_size * exp_avg / (sqrt(exp_avg_sq + (momentum * exp_avg)^2) + eps)

Bias corrections and the order of decay and update, in which the update rules differ, are in these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.columns import SCALARS as COLUMNS

NOISE_KEY = COLUMNS.index("noise_key")


class Scalars(NamedTuple):
    """The numbers of one step: floats, or 0-D tensors on the device under `capturable`."""

    decay: Any
    step_size: Any
    eps: Any
    momentum: Any = 0.0


def adamw_scalars(step: Any, hyper: Hyper) -> Scalars:
    """Return the numbers of `adamw_rule`: the bias corrections of both moments are moved to the scalars."""
    root = (1 - hyper.beta2**step) ** 0.5
    step_size = hyper.lr * root / (1 - hyper.beta1**step)
    return Scalars(1 - hyper.lr * hyper.weight_decay, step_size, hyper.eps * root)


def limited_adamw_scalars(step: Any, hyper: Hyper) -> Scalars:
    """Return the numbers of `limited_adamw_rule`, whose second moment includes the first."""
    momentum = (1 - hyper.beta2**step) ** 0.5 / (1 - hyper.beta1**step) / hyper.flags["update_limit"]
    return adamw_scalars(step, hyper)._replace(momentum=momentum)


def transformers_adamw_scalars(step: Any, hyper: Hyper) -> Scalars:
    """Return the numbers of `transformers_adamw_rule`, which decays the update too."""
    decay = 1 - hyper.lr * hyper.weight_decay
    step_size = adamw_scalars(step, hyper).step_size if hyper.flags["correct_bias"] else hyper.lr
    return Scalars(decay, decay * step_size, hyper.eps)


def signum_scalars(step: Any, hyper: Hyper) -> Scalars:
    """Return the numbers of `signum_rule`: the sign takes the place of the quotient."""
    return Scalars(1 - hyper.lr * hyper.weight_decay, hyper.lr, 0.0)


SCALARS: dict[str, Callable[[Any, Hyper], Scalars]] = {
    "adamw": adamw_scalars,
    "limited_adamw": limited_adamw_scalars,
    "transformers_adamw": transformers_adamw_scalars,
    "signum": signum_scalars,
}


def rows_on_host(bucket: Bucket, hyper: Hyper, parts: Tensor, grad_scale: float = 1.0) -> Tensor:
    """Return a row of `columns.SCALARS` for each part of the bucket's weights, float64 on the CPU.

    Args:
        parts: int64 on the CPU, the place in the bucket of the weight that each part belongs to.
    """
    shares = (1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2)
    scalars_of, found = SCALARS[bucket.rule], dict[float, tuple[float, ...]]()
    for step in dict.fromkeys(bucket.steps):
        found[step] = (*scalars_of(step, hyper), *shares, 0, grad_scale)
    if len(found) == 1:
        rows = torch.tensor([*found.values()], dtype=torch.float64, device="cpu").expand(len(parts), -1).contiguous()
    else:
        every = torch.tensor([found[step] for step in bucket.steps], dtype=torch.float64, device="cpu")
        rows = every[parts]
    if any(bucket.noise_keys):
        keys: Sequence[int] = bucket.noise_keys
        rows[:, NOISE_KEY] = torch.tensor(keys, dtype=torch.float64, device="cpu")[parts]
    return rows
