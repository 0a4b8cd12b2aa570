"""Steps on the CPU by the compiled kernels of `native.c`: one pass over memory where there can be, on all threads.

The library is built when the package is installed, where there is a C compiler. Slots that it does not cover (float16
or non-contiguous weights, groups of an unusual shape) are left to the kernels of `eager.py`.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hf_lowmem.codecs import Float32, Int8Blockwise
from hf_lowmem.codecs.dynamic_map import DECADES, FIRST_COUNT, count_lines
from hf_lowmem.kernels.eager import Form, Scalars, adamw_form
from hf_lowmem.kernels.geometry import Geometry, elementwise, geometries
from hf_lowmem.kernels.reinstall import reinstall_command
from hf_lowmem.kernels.seam import Hyper, Kernel, Slot
from hf_lowmem.log import get_logger
from hf_lowmem.moments import GroupMean
from hf_lowmem.state import KAHAN_COMP

logger = get_logger(__name__)

LIBRARY = Path(__file__).with_name("_native.so")
ADAMW_FULL, ADAMW_MEAN, SIGNUM = range(3)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}

_FLOATS, _INTS = ctypes.c_float * 8, ctypes.c_int32 * 8


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, _FLOATS) for name in ("slopes", "intercepts", "starts", "count_slopes", "count_intercepts")),
        ("last_counts", _INTS),
        ("first_count", ctypes.c_int32),
    ]


class _Moment(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("map", ctypes.POINTER(_Map)),
    ]


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad", "kahan_comp", "means")),
        *((name, _Moment) for name in ("exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_int64) for name in ("groups", "inner_groups", "outer_group_stride", "inner_group_stride")),
        *((name, ctypes.c_int64) for name in ("rows", "inner_rows", "outer_row_stride", "inner_row_stride")),
        *((name, ctypes.c_int64) for name in ("columns", "per_column", "start")),
        *((name, ctypes.c_int64) for name in ("dtype", "rule", "rounding", "noise_key")),
        *((name, ctypes.c_double) for name in ("grad_scale", "decay", "step_size", "eps", "beta1", "beta2")),
    ]


def kernel(rule: int, otherwise: Kernel, form: Form = adamw_form) -> Kernel:
    """Steps by the library what that covers, and the rest by `otherwise`."""

    def step(slots: Sequence[Slot], hyper: Hyper) -> None:
        steps = library()
        parts: list[_Part] = []
        left = []
        scalars: dict[float, Scalars] = {}  # by the number of the step, which most slots share
        for slot in slots:
            if slot.step not in scalars:
                scalars[slot.step] = form(slot, hyper)
            covered = None if steps is None else parts_of(slot, hyper, rule, scalars[slot.step])
            if covered is None:
                left.append(slot)
            else:
                parts += covered
        if parts and steps is not None and steps((_Part * len(parts))(*parts), len(parts), torch.get_num_threads()):
            raise MemoryError("There is no memory left for the sums of the optimizer's step.")
        if left:
            otherwise(left, hyper)

    return step


@cache
def library() -> ctypes._NamedFuncPointer | None:
    """The library's function; None, said once, where it was not built, or from another version of its source."""
    function, fault = loaded()
    if function is None:
        logger.warning(
            "Optimizer steps on the CPU take several times longer than they could, as the compiled kernels are %s run "
            "`%s`.",
            fault,
            reinstall_command(),
        )
    return function


def loaded() -> tuple[ctypes._NamedFuncPointer | None, str]:
    """The library's function, or None and what is wrong with the library."""
    built, fault = None, "missing: install a C compiler, such as gcc, and then"
    if LIBRARY.is_file():
        try:
            built = _load()
            fault = "" if _is_of_this_source(built) else "of another version:"
        except OSError as error:
            fault = f"not loadable ({error}):"
    if built is None or fault:
        return None, fault
    function = built.hf_lowmem_step
    function.argtypes = [ctypes.POINTER(_Part), ctypes.c_int64, ctypes.c_int]
    return function, ""


def _load() -> ctypes.CDLL:
    """The library takes OpenMP from the process, in which torch has put its own: a second one has other threads."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:  # this torch keeps it to itself, or has none
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(LIBRARY))


def _is_of_this_source(built: ctypes.CDLL) -> bool:
    """Structures of another version would be read wrongly; a wheel, which has no source, holds one version only."""
    built.hf_lowmem_checksum.restype = ctypes.c_uint32
    source = Path(__file__).with_name("native.c")
    return not source.is_file() or built.hf_lowmem_checksum() == zlib.crc32(source.read_bytes())


def parts_of(slot: Slot, hyper: Hyper, rule: int, scalars: Scalars) -> list[_Part] | None:
    """The parts of a slot, or None where the library does not cover it."""
    param, grad, codec = slot.param, slot.grad, slot.plan.codec
    if param.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != param.dtype:
        return None
    if not (param.is_contiguous() and grad.is_contiguous()):
        return None
    if rule == ADAMW_FULL and param.dtype == torch.float32 and isinstance(codec, Float32) and slot.clip is None:
        return None  # torch's fused AdamW is as fast
    moment = slot.plan.moments.get("exp_avg_sq")
    shape, block_size, row = tuple(param.shape), 1, None
    if isinstance(codec, Int8Blockwise):
        block_size, row = codec.block_size, codec.ragged_row(shape)
    if not isinstance(moment, GroupMean):
        return [_part(slot, elementwise(param.numel(), row), None, row, rule, scalars, hyper)]
    found = geometries(moment, shape, block_size, row)
    if found is None:
        return None
    means = [slot.state[moment.state_name("exp_avg_sq", segment)] for segment in moment.segments]
    return [_part(slot, *part, row, rule, scalars, hyper) for part in zip(found, means, strict=True)]


def _part(
    slot: Slot,
    found: Geometry,
    means: Tensor | None,
    row: int | None,
    rule: int,
    scalars: Scalars,
    hyper: Hyper,
) -> _Part:
    param, start = slot.param, found.start
    rounding = "nearest" if param.dtype == torch.float32 else slot.plan.rounding.kind
    return _Part(
        _address(param, start),
        _address(slot.grad, start),
        _address(slot.state[KAHAN_COMP], start) if rounding == "kahan" else None,
        None if means is None else means.data_ptr(),
        _moment(slot, "exp_avg", start, row),
        _moment(slot, "exp_avg_sq", start, row, signed=False) if rule == ADAMW_FULL else _Moment(),
        *found,
        _DTYPES[param.dtype],
        rule,
        _ROUNDINGS[rounding],
        slot.noise_key,
        1.0 if slot.clip is None else slot.clip.scale.item(),
        scalars.decay,
        scalars.step_size,
        scalars.eps,
        hyper.beta1,
        hyper.beta2,
    )


def _moment(slot: Slot, name: str, start: int, ragged_row: int | None, signed: bool = True) -> _Moment:
    data, codec = slot.state[name], slot.plan.codec
    if not isinstance(codec, Int8Blockwise):
        return _Moment(_address(data, start), None, _DTYPES[data.dtype], 1, 1, None)
    absmax, size = slot.state[f"{name}_absmax"], codec.block_size
    row = ragged_row or size  # whole blocks are rows of their own
    scales = _address(absmax, start // row * -(-row // size))
    return _Moment(_address(data, start), scales, _DTYPES[data.dtype], size, row, _map(signed))


def _address(tensor: Tensor, start: int) -> int:
    return tensor.data_ptr() + start * tensor.itemsize


@cache
def _map(signed: bool) -> ctypes._Pointer[_Map]:
    """The code map's lines, kept for as long as the library may read them."""
    lines = DECADES[signed]
    if signed:  # counts 0 and 1 share a line, as do 1 and 256 of the other map; the top count is alone on one
        lines = (sum(lines[0]), 0.0), *lines[1:], (0.0, 1.0)
    else:
        lines = (1 / 255, -1 / 255), *lines
    halved = ((slope / 2, intercept) for slope, intercept in lines)  # counts are doubled
    tables = *zip(*halved, strict=True), *zip(*count_lines(signed), strict=True)
    arrays = [(_FLOATS if isinstance(table[0], float) else _INTS)(*table) for table in tables]
    return ctypes.pointer(_Map(*arrays, FIRST_COUNT[signed]))
