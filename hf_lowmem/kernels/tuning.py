"""How the launches of the Triton kernels are cut into programs: a table by the kind of launch and the GPU.

The sweep of `benchmarks/gpu_session.py` measures other tiles, with `gpu.tuned`, and prints rows for the table.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Tile(NamedTuple):
    """Sizes, powers of two, in entries.

    Args:
        entries: what a program steps at a time.
        per_thread: what each of its threads takes of that, which decides the warps; at most 16 are launched.
        one_tile: the largest group whose mean is found in one tile, which is larger for it where need be.
        one_program: the largest group that one program takes, in several tiles; the means of larger groups are found
            before the step.
        partial_sum: what one program adds up of such a group.
    """

    entries: int = 1 << 12
    per_thread: int = 32
    one_tile: int = 1 << 13
    one_program: int = 1 << 16
    partial_sum: int = 1 << 15


# `Variant.second`, with the moments in floats or in 8-bit codes; and "add", of a projected update.
KINDS = [f"{second}{bits}" for second in ("none", "full", "group", "column") for bits in ("", " 8-bit")] + ["add"]
# By the kind of launch and 10 times the compute capability. The defaults are read off the compiler's registers and
# instructions; rows that a sweep has measured replace them.
TUNING: dict[tuple[str, int], Tile] = {(kind, arch): Tile() for kind in KINDS for arch in (80, 90)}
_DEFAULT_ARCH = 90


@cache
def current_arch() -> int:
    """10 times the compute capability of the process's GPU.

    It is 90 in the interpreter, on GPUs of other makers, and where there is no GPU, for which launches can be planned.
    """
    import triton

    if triton.knobs.runtime.interpret:
        return _DEFAULT_ARCH
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # "0 active drivers"
        return _DEFAULT_ARCH
    return target.arch if target.backend == "cuda" else _DEFAULT_ARCH


@cache
def tile_for(kind: str, arch: int) -> Tile:
    """The table's row for the GPU, or for the newest older one in it; for the oldest where there is no older one."""
    known = [number for name, number in TUNING if name == kind]
    return TUNING[kind, max((number for number in known if number <= arch), default=min(known))]
