"""MicroAdam: Adam by the largest entries of the last gradients, the rest of which goes into the next gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hf_lowmem.codecs import Float32
from hf_lowmem.moments import TopKWindow
from hf_lowmem.moments.top_k_window import MAX_BLOCK
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import DECAY, Legal, Options, at_least, flag, layout, recipe_only
from hf_lowmem.param_groups import Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.rounding import rounded
from hf_lowmem.state import Moments, StatePlan
from hf_lowmem.update_rules import BoundProjection, Number, update_rule

BITS = {16: torch.bfloat16, 32: torch.float32}
MAX_BUCKET = 1 << 17  # a bucket is encoded as a whole
SHARE = Legal("above 0 and at most 1", lambda value: 0 < value <= 1)
BLOCK = Legal(f"a whole number from 1 to {MAX_BLOCK}", lambda value: type(value) is int and 1 <= value <= MAX_BLOCK)
BUCKET = Legal(
    f"an even number from 2 to {MAX_BUCKET}",
    lambda value: type(value) is int and 2 <= value <= MAX_BUCKET and value % 2 == 0,
)


@update_rule("micro_adam", elementwise=False)
def micro_adam_rule(
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
    alpha: float,
) -> Tensor:
    """MicroAdam (arXiv:2405.15593, algorithm 1), rounded as the authors' code does where the gradient is bfloat16."""
    window, state = cast(TopKWindow, moments["window"].moment), moments["window"].state
    whole, dtype = (0, grad.numel()), grad.dtype
    g = grad.flatten() + window.error(state, *whole, dtype)
    window.push(state, g, 0, step)
    window.set_error(state, g, 0, step)
    sums = window.sums(state, *whole, (beta1, beta2), step, dtype)
    m_hat, v_hat = (z * ((1 - beta) / (1 - beta**step)) for z, beta in zip(sums, (beta1, beta2), strict=True))
    update = torch.add(m_hat / (v_hat.sqrt() + eps), g, alpha=0).to(dtype)  # NaN where g is not finite
    if alpha:
        update = update + window.error(state, *whole, dtype, alpha)
        window.encode_error(state, window.error(state, *whole, dtype, 1 - alpha), 0)
    decayed, update = (param * (1 - lr * weight_decay)).to(dtype), update.view(param.shape)
    alike = lr if isinstance(lr, Tensor) else rounded(lr, dtype)  # torch.add does so on a CPU alone
    new_param: Tensor = decayed - alike * update if isinstance(lr, Tensor) else decayed.add(update, alpha=-alike)
    return new_param


@dataclass(frozen=True)
class MicroAdamOptions(Options):
    """The options of MicroAdam."""

    state_bits: int = layout(
        16,
        "bits per number of the window and of the bounds of the error, whose entries always have 4 bits: 16, which is "
        "bfloat16; or 32.",
        choices=BITS,
    )
    m: int = layout(10, "gradients in the window.", at_least(1))
    density: float = layout(0.01, "share of each block of a gradient that the window keeps.", SHARE)
    top_k_block_size: int = layout(
        MAX_BLOCK,
        "entries of a block, in memory order, from which the largest are kept; the last block of a weight may be "
        "shorter.",
        BLOCK,
    )
    quant_block_size: int = layout(
        64,
        "entries of the error that share their bounds; the authors' default is 100000, in which a bucket spans many "
        "rows of an embedding, and rows without a gradient compete for the window.",
        BUCKET,
    )
    alpha: float = flag(
        0.0,
        "share of the error that each step adds to the update, which is then dense, and takes off the error.",
        DECAY,
    )


class MicroAdam(LowMemOptimizer):
    """Adam whose moments are rebuilt at each step from the largest entries of the last m gradients.

        a <- g + Q^-1(e)
        G_t <- the largest ceil(density n) entries of each block of n entries of a;  e <- Q(a - G_t)
        m <- (1 - b1) sum_i b1^(t - i) G_i
        v <- (1 - b2) sum_i b2^(t - i) G_i^2                      (over the last m gradients, i from t - m + 1 to t)
        w <- w - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay w)

    Source: arXiv:2405.15593, algorithm 1; authors' code IST-DASLab/ISTA-DASLab-Optimizers@4c98e6e.
    Q keeps the smallest and the largest entry of each bucket and the nearest of 16 levels between them. With `alpha`,
    a share of e is added to the update and taken off e. It departs from the code in these ways: each weight counts its
    own steps; blocks have 32768 entries whatever the device; buckets have 64; an entry that is not finite makes its
    weight NaN and does not enter e. bfloat16 weights that are rounded to nearest are stepped in bfloat16, as in the
    code; all others are stepped in float32 and rounded once. Neither has AMSGrad's maximum.

    The sums have m terms while the bias corrections assume t, so the step grows with t: an entry that is kept at every
    step moves by lr at first, 2 lr after 100 steps, 5.2 lr after 1000 and 6.5 lr in the end; see docs/micro_adam.md.

    The state of a weight of n entries, of which the window keeps k per gradient, is window_index (m, k) in int16;
    window_value (m, k), error_lo and error_hi (ceil(n / quant_block_size)) in bfloat16, or in float32 with
    `state_bits=32`; error_codes (ceil(n / 2)) in uint8; and step. Each is laid out over the entries in memory order.

    >>> weight = torch.nn.Parameter(torch.ones(64, 128))
    >>> optimizer = MicroAdam([weight], lr=1e-4)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> {name: tuple(tensor.shape) for name, tensor in optimizer.state[weight].items() if "window" in name}
    {'window_index': (10, 82), 'window_value': (10, 82)}
    """

    algorithm = "micro_adam"
    rule = "micro_adam"
    options_cls = MicroAdamOptions

    @classmethod
    def check_values(cls, values: Mapping[str, Any]) -> None:
        super().check_values(values)
        if values.get("compile"):
            raise ValueError("compile=true does not go with micro_adam, which rewrites its window: leave it out.")
        if values.get("eps", 1.0) == 0:
            raise ValueError("eps=0 must be above 0 for micro_adam, which divides zero by it outside of its window.")

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        window = TopKWindow(
            length=options["m"],
            density=options["density"],
            block_size=options["top_k_block_size"],
            bucket_size=options["quant_block_size"],
            dtype=BITS[options["state_bits"]],
        )
        return StatePlan({"window": window}, Float32())

    @classmethod
    def state_plan(cls, shape: tuple[int, ...], dtype: torch.dtype, values: Mapping[str, Any]) -> StatePlan:
        plan = super().state_plan(shape, dtype, values)
        follows = dtype == torch.bfloat16 and plan.rounding.kind == "nearest"
        return replace(plan, arithmetic=dtype) if follows else plan


@dataclass(frozen=True)
class MicroAdamRecipe(MicroAdamOptions, Recipe):
    """MicroAdam, whose window and error are the same for weights of every role."""

    embedding_bits: int | None = recipe_only(
        None, "`state_bits` of embeddings; by default that of all weights.", choices=BITS
    )

    optimizer_cls = MicroAdam
    without_roles = "every parameter has its window"

    def options_of(self, role: ParamRole) -> RoleOptions:
        return {}, "the largest entries of its last gradients"
