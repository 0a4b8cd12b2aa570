"""Tiles of other sizes for each kind of launch; the fastest, ready for the table in `hf_lowmem/kernels/tuning.py`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from measure import host_seconds, timed
from torch import nn

from gpu_stages.session import Session
from hf_lowmem.algorithms import LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.kernels import KERNELS, gpu
from hf_lowmem.kernels.tuning import Tile, current_arch, tile_for

PER_THREAD, ENTRIES, ONE_TILE = (32, 16, 8), (4096, 2048, 8192), (8192, 16384)
REPEATS = 7


class Case(NamedTuple):
    """A geometry whose time depends on one kind of tile."""

    kind: str
    cls: Any
    options: dict[str, Any]
    shape: tuple[int, int]
    has_large_groups: bool = False  # those that ONE_TILE decides about


CASES = (
    Case("group 8-bit", SlimAdamW, {"axes": (1,)}, (16384, 2048)),
    Case("column 8-bit", SlimAdamW, {"axes": (0,)}, (8192, 2048)),
    Case("full 8-bit", LowMemAdamW, {}, (8192, 2048)),
    Case("group 8-bit", SlimAdamW, {"axes": (1,)}, (4096, 14336), has_large_groups=True),
    Case("none 8-bit", Signum, {}, (8192, 2048)),
)
SMALL = (16, 512)  # of the weights that Triton's interpreter steps


def run(session: Session) -> None:
    """A row for each case and tile; on a CPU two small cases in the interpreter, which says that they would run."""
    if session.on_gpu:
        measure(session, cases_and_tiles())
        return
    launched = {key._replace(device="cpu"): kernel for key, kernel in KERNELS.items() if key.device == "cuda"}
    with mock.patch.dict(KERNELS, launched):
        small = [case._replace(shape=SMALL) for case in CASES[:2]]
        measure(
            session, [(case, usual_tile(case)._replace(entries=size)) for case, size in product(small, ENTRIES[:2])]
        )


def usual_tile(case: Case) -> Tile:
    return tile_for(case.kind, current_arch())


def cases_and_tiles() -> list[tuple[Case, Tile]]:
    """What is timed, a tile of all cases after the other, so that each case has some where the time is short."""
    found = []
    for per_thread, entries, one_tile in product(PER_THREAD, ENTRIES, ONE_TILE):
        for case in CASES:
            usual = usual_tile(case)
            if one_tile == usual.one_tile or case.has_large_groups:
                sizes = {"entries": entries, "per_thread": per_thread, "one_tile": one_tile}
                found.append((case, usual._replace(**sizes)))
    return found


def measure(session: Session, cases: Sequence[tuple[Case, Tile]]) -> None:
    found: dict[str, dict[Tile, list[float]]] = {}
    for case, tile in cases:
        if session.seconds_left < 0:
            break
        milliseconds = step_ms(case, tile, session)
        name = f"{case.kind} {case.shape[0]} x {case.shape[1]}"
        sizes = {"entries": tile.entries, "per_thread": tile.per_thread, "one_tile": tile.one_tile}
        session.row(name, **sizes, ms=milliseconds)
        found.setdefault(case.kind, {}).setdefault(tile, []).append(milliseconds)
    session.row("for TUNING", text="\n".join(best_rows(found)))


def step_ms(case: Case, tile: Tile, session: Session) -> float:
    weight = nn.Parameter(torch.zeros(case.shape, dtype=torch.bfloat16, device=session.device))
    weight.grad = torch.randn_like(weight)
    optimizer = case.cls([weight], lr=1e-3, state_bits=8, **case.options)
    with gpu.tuned({case.kind: tile}):
        optimizer.step()
        host_s = host_seconds(optimizer.step) if session.on_gpu else 0.0
        repeats = REPEATS if session.on_gpu else 1
        return statistics.median(timed(optimizer.step, session.device, host_s)[1] for _ in range(repeats))


def best_rows(found: dict[str, dict[Tile, list[float]]]) -> list[str]:
    """For each kind the tile that is fastest over all cases that were timed with it."""
    lines = []
    for kind, by_tile in found.items():
        most = max(map(len, by_tile.values()))
        times = {tile: sum(each) for tile, each in by_tile.items() if len(each) == most}
        best = min(times, key=lambda tile: times[tile])
        sizes = f"{best.entries}, {best.per_thread}, {best.one_tile}"
        lines.append(f'    ("{kind}", {current_arch()}): Tile({sizes}),  # {times[best]:.3f} ms')
    return lines
