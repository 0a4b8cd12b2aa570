"""How the launches of the Triton kernels are cut into programs: a table by the kind of launch and the GPU.

The sweep of `benchmarks/gpu_session.py` measures other tiles, with `tuned`, and prints rows for the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple


class Tile(NamedTuple):
    """Sizes, powers of two, in entries.

    Args:
        entries: that a program steps at a time.
        per_thread: that each of its threads takes, which decides the warps; at most 16 are launched.
        one_tile: the largest group that is stepped as one tile, even where it has more than `entries`.
        one_program: the largest group that one program takes, in several tiles; the means of larger groups are found
            before the step.
        partial_sum: how many entries of such a group one program adds up.
    """

    entries: int = 1 << 12
    per_thread: int = 32
    one_tile: int = 1 << 13
    one_program: int = 1 << 16
    partial_sum: int = 1 << 15


# Each is a `Variant.second`, with moments in floats or in 8-bit codes; "add" adds a projected update to its weight.
KINDS = [f"{second}{bits}" for second in ("none", "full", "group", "column") for bits in ("", " 8-bit")] + ["add"]
# By the kind of launch and 10 times the compute capability. The defaults are read off the compiler's registers and
# instructions; rows that a sweep has measured replace them.
TUNING: dict[tuple[str, int], Tile] = {(kind, arch): Tile() for kind in KINDS for arch in (80, 90)}
_DEFAULT_ARCH = 90


@cache
def current_arch() -> int:
    """Return 10 times the compute capability of the process's GPU.

    It is 90 in the interpreter, on GPUs of other makers, and without a GPU, where launches can still be planned.
    """
    try:
        import triton

        if triton.knobs.runtime.interpret:
            return _DEFAULT_ARCH
        target = triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError):  # the latter says "0 active drivers"
        return _DEFAULT_ARCH
    return target.arch if target.backend == "cuda" else _DEFAULT_ARCH


def warps_of(entries: int, per_thread: int) -> int:
    """Return the warps of a program whose threads take `per_thread` of its entries each, at most 16."""
    return min(max(entries // (32 * per_thread), 1), 16)


@cache
def tile_for(kind: str, arch: int) -> Tile:
    """Return the table's row for a GPU, or for the newest of the older ones, or for the oldest where none is older."""
    known = [number for name, number in TUNING if name == kind]
    return TUNING[kind, max((number for number in known if number <= arch), default=min(known))]


@contextmanager
def tuned(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Cut the launches of some kinds into other tiles than the table's while the context lasts.

    Raises:
        ValueError: there is no such kind.
    """
    if unknown := set(tiles) - set(KINDS):
        raise ValueError(f"The kinds of launch are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}.")
    before = dict(TUNING)
    TUNING.update({(kind, current_arch()): tile for kind, tile in tiles.items()})
    _generation[0] += 1
    tile_for.cache_clear()
    try:
        yield
    finally:
        TUNING.clear()
        TUNING.update(before)
        _generation[0] += 1
        tile_for.cache_clear()


_generation = [0]


def generation() -> int:
    """Return a number that changes with the table: launches that were planned by an older one are outdated."""
    return _generation[0]
