"""Times other tiles for each kind of launch, and prints the fastest for `hf_lowmem/kernels/triton/tuning.py`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from measure import host_seconds, timed
from torch import nn

from gpu_stages.session import Session
from hf_lowmem.algorithms import LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.triton.tuning import Tile, current_arch, tile_for, tuned

PER_THREAD, ENTRIES, ONE_TILE = (32, 16, 8), (4096, 2048, 8192), (8192, 16384)
REPEATS = 7


class Case(NamedTuple):
    """A weight whose step time depends on one kind of tile, and the axes that a group is averaged over."""

    kind: str
    cls: Any
    rows: int
    columns: int
    axes: tuple[int, ...] = ()
    has_large_groups: bool = False  # groups for which `one_tile` makes a difference


CASES = (
    Case("group 8-bit", SlimAdamW, 32768, 2048, (1,)),
    Case("column 8-bit", SlimAdamW, 32768, 2048, (0,)),
    Case("full 8-bit", LowMemAdamW, 32768, 2048),
    Case("group 8-bit", SlimAdamW, 8192, 14336, (1,), has_large_groups=True),
    Case("none 8-bit", Signum, 32768, 2048),
)
FEW_ROWS, FEW_COLUMNS = 16, 512  # the size of the weights that Triton's interpreter steps


def run(session: Session) -> None:
    """Write a row for each case and tile; on a CPU, two small cases in the interpreter show that they would run."""
    if session.on_gpu:
        measure(session, cases_and_tiles())
        return
    with forced("triton"):
        small = [case._replace(rows=FEW_ROWS, columns=FEW_COLUMNS) for case in CASES[:2]]
        measure(
            session, [(case, usual_tile(case)._replace(entries=size)) for case, size in product(small, ENTRIES[:2])]
        )


def usual_tile(case: Case) -> Tile:
    return tile_for(case.kind, current_arch())


def cases_and_tiles() -> list[tuple[Case, Tile]]:
    """Return the cases with a tile each, tile by tile, so that every case gets some tiles if the time is short."""
    found = []
    for per_thread, entries in product(PER_THREAD, ENTRIES):
        for case in CASES:
            for one_tile in ONE_TILE if case.has_large_groups else [usual_tile(case).one_tile]:
                sizes = {"entries": entries, "per_thread": per_thread, "one_tile": one_tile}
                found.append((case, usual_tile(case)._replace(**sizes)))
    return found


def measure(session: Session, cases: Sequence[tuple[Case, Tile]]) -> None:
    times: dict[tuple[Case, Tile], float] = {}
    for case, tile in cases:
        if session.seconds_left < 0:
            break
        sizes = {"entries": tile.entries, "per_thread": tile.per_thread, "one_tile": tile.one_tile}
        name = f"{case.kind} {case.rows} x {case.columns}"
        try:
            times[case, tile] = step_ms(case, tile, session)
            session.row(name, **sizes, ms=times[case, tile])
        except Exception as error:  # a tile may need too many registers, for instance, and others may not
            session.row(name, **sizes, remark=f"{type(error).__name__}: {str(error).strip()[:80]}")
    rows = best_rows(times)
    session.row(f"for TUNING, of {len(times)} of {len(cases)} cases and tiles", text="\n".join(rows))


def step_ms(case: Case, tile: Tile, session: Session) -> float:
    weight = nn.Parameter(torch.zeros(case.rows, case.columns, dtype=torch.bfloat16, device=session.device))
    weight.grad = torch.randn_like(weight)
    optimizer = case.cls([weight], lr=1e-3, state_bits=8, **({"axes": case.axes} if case.axes else {}))
    with tuned({case.kind: tile}):
        optimizer.step()
        host_s = host_seconds(optimizer.step) if session.on_gpu else 0.0
        repeats = REPEATS if session.on_gpu else 1
        return statistics.median(timed(optimizer.step, session.device, host_s)[1] for _ in range(repeats))


def best_rows(times: Mapping[tuple[Case, Tile], float]) -> list[str]:
    """Return for each kind the fastest tile over its cases, among the tiles that all of them were timed with."""
    lines = []
    for kind in dict.fromkeys(case.kind for case, _ in times):
        cases = {case for case, _ in times if case.kind == kind}
        totals: dict[Tile, float] = {}
        for tile in {tile for case, tile in times if case.kind == kind}:
            # In a case without large groups, all values of `one_tile` give the same tiles.
            usual = tile._replace(one_tile=tile_for(kind, current_arch()).one_tile)
            each = [times.get((case, tile if case.has_large_groups else usual)) for case in cases]
            if None not in each:
                totals[tile] = sum(each)
        if totals:
            best = min(totals, key=lambda tile: totals[tile])
            sizes = f"{best.entries}, {best.per_thread}, {best.one_tile}"
            usually = totals.get(tile_for(kind, current_arch()))
            before = f", {usually:.3f} as it is" if usually else ""
            lines.append(f'    ("{kind}", {current_arch()}): Tile({sizes}),  # {totals[best]:.3f} ms{before}')
    return lines
