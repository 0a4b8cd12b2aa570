"""MicroAdam in plain torch, in parts of a weight: a pass for the window, one for the error, one for the update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.means import scaled_grad, tile_size
from hf_lowmem.kernels.passes import Passes, RulePasses
from hf_lowmem.moments import TopKWindow
from hf_lowmem.rounding import rounded

MOST = 1 << 22  # entries of a part, which take some 40 bytes each while their largest are found


def covers(step: ParamStep) -> bool:
    """Return whether the entries of weight and gradient can be counted in memory order."""
    return step.param.is_contiguous() and step.grad.is_contiguous()


def micro_adam(step: ParamStep, hyper: Hyper) -> Passes:
    """Take `micro_adam_rule`; no sum runs over the weight, but a bucket may have entries of two blocks."""
    window, state, dtype = cast(TopKWindow, step.plan.moments["window"]), step.state, step.plan.arithmetic
    flat, weight = step._replace(grad=step.grad.view(-1)), step.weight().map(lambda tensor: tensor.view(-1))
    number = step.step.double() if isinstance(step.step, Tensor) else step.step
    betas, alpha, decay = (hyper.beta1, hyper.beta2), hyper.flags["alpha"], 1 - hyper.lr * hyper.weight_decay
    blocks, buckets = (list(parts_of(step.param, unit)) for unit in (window.block_size, window.bucket_size))

    def error(part: slice, share: float = 1.0) -> Tensor:
        return window.error(state, part.start, part.stop, dtype, share)

    for part in blocks:
        window.push(state, scaled_grad(flat, (part,)) + error(part), part.start, number)
    for part in buckets:
        window.set_error(state, scaled_grad(flat, (part,)) + error(part), part.start, number)
    for part in blocks:
        sums = window.sums(state, part.start, part.stop, betas, number, dtype)
        m_hat, v_hat = (z.mul_((1 - beta) / (1 - beta**number)) for z, beta in zip(sums, betas, strict=True))
        update = m_hat.div_(v_hat.sqrt_().add_(hyper.eps)).add_(scaled_grad(flat, (part,)), alpha=0).to(dtype)
        if alpha:
            update += error(part, alpha)
        tile = weight[(part,)]
        decayed, lr = (tile.load() * decay).to(dtype), hyper.lr
        tile.store(
            decayed - lr * update if isinstance(lr, Tensor) else decayed.add_(update, alpha=-rounded(lr, dtype))
        )
    for part in buckets if alpha else ():
        window.encode_error(state, error(part, 1 - alpha), part.start)
    yield from ()


def parts_of(param: Tensor, unit: int) -> Iterator[slice]:
    """Divide the entries of a weight into parts of whole units, each of which starts at an even entry."""
    unit *= 1 + unit % 2
    limit = min(tile_size(param.device), MOST)
    size = max(limit - limit % unit, unit)
    for start in range(0, param.numel(), size):
        yield slice(start, min(start + size, param.numel()))


MICRO_ADAM = RulePasses(covers, micro_adam)
