"""MicroAdam by the compiled kernels: one call for a weight, one pass over memory, its blocks on all threads."""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.cpu.library import library
from hf_lowmem.kernels.cpu.step import DTYPES, ROUNDINGS
from hf_lowmem.kernels.passes import Passes, RulePasses
from hf_lowmem.moments import TopKWindow
from hf_lowmem.moments.top_k_window import CODES, HIGH, INDEX, LOW, VALUE
from hf_lowmem.rounding import rounded

# torch.add takes so many bfloat16 numbers at once, and of those left over it rounds the product by itself.
AT_ONCE = 32
HAS_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")


class _Call(ctypes.Structure):
    """The arguments of one call, laid out as `MicroAdam` in micro_adam.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("param", "grad", "kahan_comp", "dtype", "rounding")),
        *((name, ctypes.c_int64) for name in ("index", "value", "codes", "low", "high", "state_dtype")),
        *((name, ctypes.c_int64) for name in ("first_powers", "second_powers")),
        *((name, ctypes.c_int64) for name in ("numel", "block", "kept", "columns", "bucket", "row", "filled")),
        *((name, ctypes.c_int64) for name in ("follows", "rest")),
        *((name, ctypes.c_double) for name in ("noise_key", "grad_scale", "decay", "lr", "eps")),
        *((name, ctypes.c_double) for name in ("first_correction", "second_correction", "alpha")),
    ]


def covers(step: ParamStep) -> bool:
    """Return whether the library steps a parameter, no bucket of which has entries of two blocks."""
    param, grad, window = step.param, step.grad, cast(TopKWindow, step.plan.moments["window"])
    if (
        param.dtype not in (torch.float32, torch.bfloat16)
        or grad.dtype != param.dtype
        or isinstance(step.step, Tensor)
    ):
        return False
    in_blocks = param.numel() <= window.block_size or window.block_size % window.bucket_size == 0
    return in_blocks and param.is_contiguous() and grad.is_contiguous()


def micro_adam(step: ParamStep, hyper: Hyper) -> Passes:
    """Take `micro_adam_rule`; no sum runs over the weight."""
    window, state, weight = cast(TopKWindow, step.plan.moments["window"]), step.state, step.weight()
    numel, number, follows = step.param.numel(), int(step.step), step.plan.arithmetic == torch.bfloat16
    ages = [(number - 1 - row) % window.length for row in range(window.length)]
    powers = [(ctypes.c_float * window.length)(*(beta**age for age in ages)) for beta in (hyper.beta1, hyper.beta2)]
    lr = float(hyper.lr)
    call = _Call(
        param=weight.data.data_ptr(),
        grad=step.grad.data_ptr(),
        kahan_comp=0 if weight.kahan_comp is None else weight.kahan_comp.data_ptr(),
        dtype=DTYPES[step.param.dtype],
        rounding=ROUNDINGS[step.plan.rounding.kind],
        index=state[INDEX].data_ptr(),
        value=state[VALUE].data_ptr(),
        codes=state[CODES].data_ptr(),
        low=state[LOW].data_ptr(),
        high=state[HIGH].data_ptr(),
        state_dtype=DTYPES[window.dtype],
        first_powers=ctypes.addressof(powers[0]),
        second_powers=ctypes.addressof(powers[1]),
        numel=numel,
        block=min(window.block_size, numel),
        kept=window.kept(min(window.block_size, numel)),
        columns=window.columns(numel),
        bucket=window.bucket_size,
        row=(number - 1) % window.length,
        filled=min(number, window.length),
        follows=follows,
        rest=numel - numel % AT_ONCE if HAS_VECTORS else 0,
        noise_key=step.noise_key,
        grad_scale=1.0 if step.clip is None else step.clip.scale.item(),
        decay=1 - lr * hyper.weight_decay,
        lr=rounded(lr, step.plan.arithmetic),
        eps=hyper.eps,
        first_correction=(1 - hyper.beta1) / (1 - hyper.beta1**number),
        second_correction=(1 - hyper.beta2) / (1 - hyper.beta2**number),
        alpha=hyper.flags["alpha"],
    )
    compiled = library()
    assert compiled is not None
    if compiled.hf_lowmem_micro_adam(ctypes.byref(call), torch.get_num_threads()):
        raise MemoryError("There is no memory left for the blocks of the optimizer's step.")
    yield from ()


MICRO_ADAM = RulePasses(covers, micro_adam)
