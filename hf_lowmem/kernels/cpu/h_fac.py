"""H-Fac by the compiled kernels: a call for each pass over a weight, on all threads."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.cpu.library import library
from hf_lowmem.kernels.cpu.step import DTYPES, ROUNDINGS
from hf_lowmem.kernels.in_place import h_fac
from hf_lowmem.kernels.in_place.h_fac import Side
from hf_lowmem.kernels.in_place.updates import matrix_dims
from hf_lowmem.kernels.passes import RulePasses


class _Call(ctypes.Structure):
    """The arguments of one call, laid out as `HFac` in h_fac.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("param", "grad", "kahan_comp", "dtype", "rounding")),
        *((name, ctypes.c_int64) for name in ("row_sums", "row_squares", "col_sums", "col_squares")),
        *((name, ctypes.c_int64) for name in ("row_factors", "row_shifts", "col_factors", "col_shifts", "step_sizes")),
        *((name, ctypes.c_int64) for name in ("energies", "count", "rows", "columns")),
        *((name, ctypes.c_double) for name in ("noise_key", "grad_scale", "decay")),
    ]


def covers(step: ParamStep) -> bool:
    """Return whether the library steps a parameter: float32 or bfloat16, with a gradient of the same dtype."""
    param, grad = step.param, step.grad
    if param.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != param.dtype:
        return False
    return param.is_contiguous() and grad.is_contiguous() and h_fac.covers(step)


class InLibrary:
    """The sweeps as calls of the library."""

    def __init__(self, step: ParamStep, hyper: Hyper) -> None:
        weight, self.state, matrix = step.weight(), step.state, matrix_dims(step)
        count = step.param.shape[0] if step.plan.stacked else 1
        rows = step.param.shape[matrix[0]]
        self.call = _Call(
            param=weight.data.data_ptr(),
            grad=step.grad.data_ptr(),
            kahan_comp=0 if weight.kahan_comp is None else weight.kahan_comp.data_ptr(),
            dtype=DTYPES[step.param.dtype],
            rounding=ROUNDINGS[step.plan.rounding.kind],
            count=count,
            rows=rows,
            columns=math.prod(step.param.shape[axis] for axis in matrix[1:]),
            noise_key=step.noise_key,
            grad_scale=1.0 if step.clip is None else step.clip.scale.item(),
            decay=1 - hyper.lr * hyper.weight_decay,
        )
        self.energy_shape = [1 if axis in matrix else size for axis, size in enumerate(step.param.shape)]

    def sum_sides(self) -> list[Tensor]:
        sums = {
            f"{side}_{what}": torch.zeros_like(self.state[f"exp_avg_{side}"])
            for side in ("row", "col")
            for what in ("sums", "squares")
        }
        self._take(0, **sums)
        return list(sums.values())

    def sum_energy(self, row: Side, col: Side) -> Tensor:
        energies = torch.zeros(self.energy_shape, dtype=torch.float64, device="cpu")
        self._take(1, row_factors=row.factor, col_factors=col.factor, energies=energies)
        return energies

    def update(self, row: Side, col: Side, step_size: Tensor) -> None:
        factors = {"row_factors": row.factor, "col_factors": col.factor}
        shifts = {"row_shifts": row.shift, "col_shifts": col.shift}
        self._take(2, **factors, **shifts, step_sizes=step_size.float())

    def _take(self, number: int, **tensors: Tensor) -> None:
        """Take a pass, which reads or writes these contiguous tensors."""
        for name, tensor in tensors.items():
            setattr(self.call, name, tensor.data_ptr())
        compiled = library()
        assert compiled is not None
        if compiled.hf_lowmem_h_fac(ctypes.byref(self.call), number, torch.get_num_threads()):
            raise MemoryError("There is no memory left for the sums of the optimizer's step.")


H_FAC = RulePasses(covers, h_fac.in_passes(InLibrary))
