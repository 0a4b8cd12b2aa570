"""MicroAdam on a GPU, in parts of a weight: Triton kernels, with torch's own top-k between them."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.in_place.micro_adam import parts_of
from hf_lowmem.kernels.passes import Passes, RulePasses
from hf_lowmem.kernels.triton.variants import WEIGHTS
from hf_lowmem.moments import TopKWindow
from hf_lowmem.moments.top_k_window import CODES, HIGH, INDEX, LOW, VALUE
from hf_lowmem.rounding import rounded

SIZE = 1024  # entries of a program
LARGEST_BUCKET = 4096  # entries, which one program holds
UNFUSED = {"num_warps": 4, "enable_fp_fusion": False}


def covers(step: ParamStep) -> bool:
    """Return whether the kernels step a parameter, a part of which can be whole blocks and whole buckets."""
    param, grad, window = step.param, step.grad, cast(TopKWindow, step.plan.moments["window"])
    if param.dtype not in WEIGHTS or grad.dtype != param.dtype or isinstance(step.step, Tensor):
        return False
    fits = window.block_size % window.bucket_size == 0 or param.numel() <= window.block_size
    return fits and window.bucket_size <= LARGEST_BUCKET and param.is_contiguous() and grad.is_contiguous()


@cache
def micro_adam_kernels() -> Any:
    """Return the module of the kernels, which imports Triton."""
    from hf_lowmem.kernels.triton import micro_adam_kernels

    return micro_adam_kernels


def micro_adam(step: ParamStep, hyper: Hyper) -> Passes:
    """Take `micro_adam_rule` without a temporary of the weight's size; no sum runs over the weight."""
    device = step.param.device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for part in parts_of(step.param, cast(TopKWindow, step.plan.moments["window"]).block_size):
            step_part(step, hyper, part)
    yield from ()


def step_part(step: ParamStep, hyper: Hyper, part: slice) -> None:
    """Step the entries of a part."""
    window, state, number = cast(TopKWindow, step.plan.moments["window"]), step.state, int(step.step)
    weight, follows, alpha = step.weight(), step.plan.arithmetic == torch.bfloat16, hyper.flags["alpha"]
    entries, bucket, device = part.stop - part.start, window.bucket_size, step.param.device
    grad, scale = step.grad.view(-1)[part], step.grad if step.clip is None else step.clip.scale
    packed, (low, high) = (
        state[CODES][part.start // 2 :],
        (state[name][part.start // bucket :] for name in (LOW, HIGH)),
    )
    columns = slice(window.columns(part.start), window.columns(part.stop))
    index, values = state[INDEX][:, columns], state[VALUE][:, columns]
    run, programs = micro_adam_kernels(), (-(-entries // SIZE),)
    width = 1 << (bucket // 2 - 1).bit_length()
    rows = max(SIZE // 2 // width, 1)
    buckets = (-(-entries // (bucket * rows)),)

    sums = torch.empty(entries, dtype=step.plan.arithmetic, device=device)
    clipped = step.clip is not None
    run.accumulate[programs](
        grad, scale, packed, low, high, sums, entries, CLIP=clipped, BUCKET=bucket, SIZE=SIZE, **UNFUSED
    )
    sums[window.push(state, sums, part.start, number)] = 0
    run.encode[buckets](sums, packed, low, high, entries, BUCKET=bucket, WIDTH=width, ROWS=rows, **UNFUSED)

    ages = [(number - 1 - row) % window.length for row in range(window.length)]
    powers = [beta**age for beta in (hyper.beta1, hyper.beta2) for age in ages]
    table = torch.tensor(powers, dtype=torch.float32, device="cpu").to(device, non_blocking=True)
    first, second = torch.zeros(2, entries, dtype=torch.float32, device=device)
    block, blocks = window.block_size, (-(-entries // window.block_size),)
    run.add_window[blocks](
        index, values, table, first, second, index.stride(0), index.shape[1], window.length, window.kept(block), block,
        **UNFUSED,
    )  # fmt: skip
    corrections = [(1 - beta) / (1 - beta**number) for beta in (hyper.beta1, hyper.beta2)]
    lr = rounded(float(hyper.lr), step.plan.arithmetic)
    comps = weight.data if weight.kahan_comp is None else weight.kahan_comp
    run.update[programs](
        weight.data, comps, grad, first, second, packed, low, high, entries, part.start,
        1 - hyper.lr * hyper.weight_decay, lr, hyper.eps, *corrections, alpha, step.noise_key,
        FOLLOWS=follows, ALPHA=alpha > 0, BUCKET=bucket, ROUNDING=step.plan.rounding.kind, SIZE=SIZE, **UNFUSED,
    )  # fmt: skip
    if alpha:
        run.shrink[programs](packed, low, high, sums, 1 - alpha, entries, BUCKET=bucket, SIZE=SIZE, **UNFUSED)
        run.encode[buckets](sums, packed, low, high, entries, BUCKET=bucket, WIDTH=width, ROWS=rows, **UNFUSED)


MICRO_ADAM = RulePasses(covers, micro_adam)
