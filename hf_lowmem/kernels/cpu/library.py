"""The compiled kernels of this folder: the library that holds them, and its code maps.

The library is built when the package is installed, where there is a C compiler.
"""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from hf_lowmem.codecs.dynamic_map import DECADES, FIRST_COUNT, count_lines
from hf_lowmem.kernels import columns
from hf_lowmem.kernels.cpu.reinstall import reinstall_command
from hf_lowmem.log import get_logger

logger = get_logger(__name__)

LIBRARY = Path(__file__).with_name("_native.so")
_FLOATS, _INTS = ctypes.c_float * 8, ctypes.c_int32 * 8


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, _FLOATS) for name in ("slopes", "intercepts", "starts", "count_slopes", "count_intercepts")),
        ("last_counts", _INTS),
        ("first_count", ctypes.c_int32),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None, logged once, where it was not built or is of another version."""
    built, fault = loaded()
    if built is None:
        logger.warning(
            "Optimizer steps on the CPU take several times longer than they could, as the compiled kernels are %s run "
            "`%s`.",
            fault,
            reinstall_command(),
        )
    return built


def loaded() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and what is wrong with it."""
    built, fault = None, "missing: install a C compiler, such as gcc, and then"
    if LIBRARY.is_file():
        try:
            built = _load()
            fault = "" if _is_of_this_source(built) else "of another version:"
        except OSError as error:
            fault = f"not loadable ({error}):"
    if built is None or fault:
        return None, fault
    built.hf_lowmem_step.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return built, ""


def _load() -> ctypes.CDLL:
    """Load the library, which takes OpenMP from the process: torch has put its own there, and a second one would have
    other threads."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError:  # this torch keeps it to itself, or has none
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(LIBRARY))


def _is_of_this_source(built: ctypes.CDLL) -> bool:
    """Return whether the library was built from the sources beside it; a wheel, which has none, holds one version."""
    built.hf_lowmem_checksum.restype = ctypes.c_uint32
    folder = Path(__file__).parent
    sources = [*sorted(folder.glob("*.[ch]")), Path(columns.__file__)]
    if len(sources) == 1:
        return True
    return bool(built.hf_lowmem_checksum() == zlib.crc32(b"".join(each.read_bytes() for each in sources)))


@cache
def code_maps() -> Any:
    """Return the lines of the signed and of the unsigned code map, as the library reads them."""
    return (_Map * 2)(_lines(True), _lines(False))


def _lines(signed: bool) -> _Map:
    lines = DECADES[signed]
    if signed:  # counts 0 and 1 share a line, as do 1 and 256 of the other map; the top count is alone on one
        lines = (sum(lines[0]), 0.0), *lines[1:], (0.0, 1.0)
    else:
        lines = (1 / 255, -1 / 255), *lines
    halved = ((slope / 2, intercept) for slope, intercept in lines)  # counts are doubled
    tables = *zip(*halved, strict=True), *zip(*count_lines(signed), strict=True)
    arrays = [(_FLOATS if isinstance(table[0], float) else _INTS)(*table) for table in tables]
    return _Map(*arrays, FIRST_COUNT[signed])
