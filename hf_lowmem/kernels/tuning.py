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


# The kinds are `Variant.second`, the moments in floats or in 8-bit codes, and "add". Read off the compiler's registers
# and instructions, not yet measured.
TUNING: dict[tuple[str, int], Tile] = {
    ("none", 80): Tile(),
    ("none 8-bit", 80): Tile(),
    ("full", 80): Tile(),
    ("full 8-bit", 80): Tile(),
    ("group", 80): Tile(),
    ("group 8-bit", 80): Tile(),
    ("column", 80): Tile(),
    ("column 8-bit", 80): Tile(),
    ("add", 80): Tile(),
    ("none", 90): Tile(),
    ("none 8-bit", 90): Tile(),
    ("full", 90): Tile(),
    ("full 8-bit", 90): Tile(),
    ("group", 90): Tile(),
    ("group 8-bit", 90): Tile(),
    ("column", 90): Tile(),
    ("column 8-bit", 90): Tile(),
    ("add", 90): Tile(),
}
KINDS = {kind for kind, _ in TUNING}
_DEFAULT_ARCH = 90


@cache
def current_arch() -> int:
    """10 times the compute capability of the process's GPU; 90 in the interpreter and on GPUs of other makers."""
    import triton

    if triton.knobs.runtime.interpret:
        return _DEFAULT_ARCH
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else _DEFAULT_ARCH


@cache
def tile_for(kind: str, arch: int) -> Tile:
    """The table's row for the GPU, or for the newest older one in it; for the oldest where there is no older one."""
    known = [number for name, number in TUNING if name == kind]
    return TUNING[kind, max((number for number in known if number <= arch), default=min(known))]
