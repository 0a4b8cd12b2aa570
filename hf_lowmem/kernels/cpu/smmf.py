"""SMMF by the compiled kernels: one call for a weight, one pass over memory, on all threads."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.cpu.library import library
from hf_lowmem.kernels.cpu.step import DTYPES, ROUNDINGS
from hf_lowmem.kernels.in_place.smmf import Numbers, Square, Sums, first_moment, in_one_pass, is_contiguous_square
from hf_lowmem.kernels.passes import RulePasses

FACTORS = ("exp_avg_row", "exp_avg_col", "exp_avg_sq_row", "exp_avg_sq_col")


class _Call(ctypes.Structure):
    """The arguments of one call, laid out as `Smmf` in smmf.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("param", "grad", "kahan_comp", "dtype", "rounding", "signs")),
        *((name, ctypes.c_int64) for name in FACTORS),
        *((f"{name}_sums", ctypes.c_int64) for name in FACTORS),
        *((name, ctypes.c_int64) for name in (*Square._fields, "mask_zeros", "rounds_decay")),
        *((name, ctypes.c_double) for name in ("noise_key", "grad_scale", *Numbers._fields)),
    ]


def covers(step: ParamStep) -> bool:
    """Return whether the library steps a parameter: float32 or bfloat16, with a gradient of the same dtype."""
    if step.param.dtype not in (torch.float32, torch.bfloat16) or step.grad.dtype != step.param.dtype:
        return False
    return is_contiguous_square(step) and not isinstance(step.step, Tensor)


def by_library(step: ParamStep, numbers: Numbers, sums: Sums) -> None:
    """Go over a weight in one call of the library."""
    weight, state = step.weight(), step.state
    call = _Call(
        weight.data.data_ptr(),
        step.grad.data_ptr(),
        0 if weight.kahan_comp is None else weight.kahan_comp.data_ptr(),
        DTYPES[step.param.dtype],
        ROUNDINGS[step.plan.rounding.kind],
        state["exp_avg_sign"].data_ptr(),
        *(state[name].data_ptr() for name in FACTORS),
        *(sums[name].data_ptr() for name in FACTORS),
        *Square.of(step),
        first_moment(step).mask_zeros,
        step.plan.arithmetic == torch.bfloat16,
        step.noise_key,
        1.0 if step.clip is None else step.clip.scale.item(),
        *numbers,
    )
    compiled = library()
    assert compiled is not None
    if compiled.hf_lowmem_smmf(ctypes.byref(call), torch.get_num_threads()):
        raise MemoryError("There is no memory left for the sums of the optimizer's step.")


SMMF = RulePasses(covers, in_one_pass(by_library))
