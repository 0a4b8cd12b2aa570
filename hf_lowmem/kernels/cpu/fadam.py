"""FAdam by the compiled kernels: a call for each pass over a weight, on all threads."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hf_lowmem.codecs import BFloat16, Float32, Int8Blockwise
from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.cpu.library import code_maps, library
from hf_lowmem.kernels.cpu.step import DTYPES, ROUNDINGS
from hf_lowmem.kernels.in_place import fadam
from hf_lowmem.kernels.in_place.updates import entries_of_matrix, matrix_dims
from hf_lowmem.kernels.passes import RulePasses
from hf_lowmem.update_rules import unbiased_decay

MOMENTS = ("exp_avg", "fim")


class _Call(ctypes.Structure):
    """The arguments of one call, laid out as `FAdam` in fadam.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("param", "grad", "kahan_comp", "dtype", "rounding")),
        *((name + part, ctypes.c_int64) for name in MOMENTS for part in ("", "_absmax", "_dtype")),
        *((name, ctypes.c_int64) for name in ("block_size", "row", "count", "entries", "columns", "whole")),
        *((name, ctypes.c_int64) for name in ("mask_decay", "sums", "maps")),
        *((name, ctypes.c_double) for name in ("noise_key", "grad_scale", "lr", "beta1", "keep", "eps")),
        *((name, ctypes.c_double) for name in ("weight_decay", "clip_threshold")),
    ]


def covers(step: ParamStep) -> bool:
    """Return whether the library steps a parameter: float32 or bfloat16, with a gradient of the same dtype."""
    param, grad, codec = step.param, step.grad, step.plan.codec
    if param.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != param.dtype:
        return False
    if not (param.is_contiguous() and grad.is_contiguous() and fadam.covers(step)):
        return False
    if isinstance(codec, Int8Blockwise):  # no block may belong to two weights of a stack
        return not step.plan.stacked or codec.row_axes < param.ndim
    return type(codec) in (Float32, BFloat16)


class InLibrary:
    """The sweeps as calls of the library."""

    def __init__(self, step: ParamStep, hyper: Hyper) -> None:
        weight, state, shape, codec = step.weight(), step.state, tuple(step.param.shape), step.plan.codec
        count = shape[0] if step.plan.stacked else 1
        entries = math.prod(shape[1:] if step.plan.stacked else shape)
        block_size, row = 1, None
        if isinstance(codec, Int8Blockwise):
            block_size, row = codec.block_size, codec.ragged_row(shape)
        kept = [1 if axis in matrix_dims(step) else size for axis, size in enumerate(shape)]
        self.sums = torch.zeros(*kept, 3, dtype=torch.float64, device="cpu")
        self.decays = hyper.weight_decay > 0
        moments = {name: state[name].data_ptr() for name in MOMENTS}
        scales = {name: state[name].data_ptr() for name in (f"{each}_absmax" for each in MOMENTS) if name in state}
        self.call = _Call(
            param=weight.data.data_ptr(),
            grad=step.grad.data_ptr(),
            kahan_comp=0 if weight.kahan_comp is None else weight.kahan_comp.data_ptr(),
            dtype=DTYPES[step.param.dtype],
            rounding=ROUNDINGS[step.plan.rounding.kind],
            **moments,
            **scales,
            exp_avg_dtype=DTYPES[state["exp_avg"].dtype],
            fim_dtype=DTYPES[state["fim"].dtype],
            block_size=block_size,
            row=row or block_size,
            count=count,
            entries=entries,
            columns=row or entries,
            whole=entries_of_matrix(step),
            mask_decay=hyper.flags["mask_decay"],
            sums=self.sums.data_ptr(),
            maps=ctypes.addressof(code_maps()),
            noise_key=step.noise_key,
            grad_scale=1.0 if step.clip is None else step.clip.scale.item(),
            lr=hyper.lr,
            beta1=hyper.beta1,
            keep=unbiased_decay(hyper.beta2, step.step),
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            clip_threshold=hyper.flags["clip_threshold"],
        )

    def sum_gradient(self) -> Tensor:
        self._take(0)
        return self.sums[..., 0]

    def sum_quotients(self) -> list[Tensor]:
        self._take(1)
        return [self.sums[..., number] for number in range(1, 3 if self.decays else 2)]

    def update(self) -> None:
        self._take(2)

    def _take(self, number: int) -> None:
        """Take a pass."""
        compiled = library()
        assert compiled is not None
        if compiled.hf_lowmem_fadam(ctypes.byref(self.call), number, torch.get_num_threads()):
            raise MemoryError("There is no memory left for the sums of the optimizer's step.")


FADAM = RulePasses(covers, fadam.in_passes(InLibrary))
