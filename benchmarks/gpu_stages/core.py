"""Times the step of each optimizer against fused AdamW with bfloat16 state, and with float32 weights and state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from measure import (
    CLIPPED,
    DTYPES,
    Times,
    amortise,
    bandwidth,
    changes_of_basis,
    clipped_step,
    copying,
    extra_bytes,
    host_seconds,
    memory,
    timed,
    timed_pairs,
)
from peers import BASELINE, PEERS, build
from presets import PRESETS, build_model, copy_of, one_layer

from gpu_stages.session import Session

ROWS = (
    "factored_adamw_8bit",
    "lowmem_adamw_8bit",
    "signum_8bit",
    "slim_adamw state_bits=16",
    "adam_mini state_bits=16",
    "slim_adamw",
    "slim_adamw_8bit rounding=stochastic",
    "slim_adamw_8bit rounding=kahan",
)
PAIRS = 9
FEW = 2  # the number of rows on a CPU, where this is only tried out
DTYPE = "bf16"  # the dtype of the weights


def run(
    session: Session, preset: str = "1b", names: Sequence[str] = ROWS, baselines: Sequence[str] = ("bf16", "fp32")
) -> None:
    """Write a row for each name; the baselines are built once and timed again with each.

    Raises:
        RuntimeError: one of our optimizers failed or got no time, or CUDA failed.
    """
    session.wait_for_memory()
    names = names if session.on_gpu else names[:FEW]
    missing = []
    models = {DTYPE: build_model(PRESETS[session.preset or preset], DTYPES[DTYPE], session.device)}
    for dtype in baselines:
        models.setdefault(dtype, copy_of(models[DTYPE], DTYPES[dtype]))
    optimizers = {dtype: build(BASELINE, models[dtype]) for dtype in baselines}
    for optimizer in optimizers.values():
        optimizer.step()
    taken = [0.0]
    for name in names:
        if name in PEERS and not PEERS[name].installed:
            session.row(name, remark="not installed")
        elif session.seconds_left < statistics.median(taken):
            session.row(name, remark="no time was left")
            missing.append(name)
        else:
            started = time.perf_counter()
            try:
                measure(name, session.preset or preset, models[DTYPE], optimizers, session)
            except Exception as error:  # a peer that fails does not concern the others
                said = (str(error).strip().splitlines() or [""])[0][:150]
                session.row(name, remark=f"{type(error).__name__}: {said}")
                if "CUDA error" in said:  # all later rows would fail, too
                    raise
                missing += [name] if name not in PEERS else []
            taken.append(time.perf_counter() - started)
        if session.on_gpu:
            torch.cuda.empty_cache()
    if missing:
        raise RuntimeError(f"there are no figures of {', '.join(missing)}")


def measure(name: str, preset: str, model: Any, baselines: dict[str, Any], session: Session) -> None:
    """Write rows for the step, its memory, and clipping with the step or the changes of a basis."""
    device = session.device
    # The kernels are compiled first, so that the first step does not include it.
    build(name, build_model(one_layer(preset), DTYPES[DTYPE], device)).step()
    model = copy_of(model, DTYPES[DTYPE])
    optimizer, copy = build(name, model), copying(device)
    first = timed(optimizer.step, device)
    extra = extra_bytes(optimizer.step, device)
    steps = [optimizer.step, *(baseline.step for baseline in baselines.values())]
    timed_pairs(*steps, device=device, pairs=2, ends=0)  # warms up
    own, *theirs, copies = timed_pairs(*steps, device=device, pairs=PAIRS, ends=float("inf"), last=copy)
    held = memory(model, optimizer)
    row: dict[str, Any] = {"ms": middle(own), **ratios(own, theirs, baselines), "pairs": len(own)}
    if session.on_gpu:
        row["host_ms"] = 1e3 * host_seconds(optimizer.step, PAIRS)
    session.row(name, **row)
    session.row(
        f"{name}, memory",
        state_bytes_per_parameter=held["state_bytes_per_parameter"],
        extra_mib=None if extra is None else extra / 2**20,
        gb_per_s=held["moved_bytes"] / 1e6 / middle(own),
        **bandwidth(held["moved_bytes"], own, copies, device),
    )
    if changes := changes_of_basis(optimizer):
        against = {"cpu_ms": row["ms"], "wall_ms": row["ms"], "baseline_cpu_ms": middle(theirs[0])}
        found = amortise(optimizer, changes, against | {"baseline_wall_ms": middle(theirs[0])}, first, device)
        changed = {f"{kind}_ms": times["wall_ms"] for kind, times in found["change_of_basis"].items()}
        changed |= {"first_step_s": first[1] / 1e3, "amortised_ratio": found["amortised"]["wall"]}
        session.row(f"{name}, changes of basis", **changed)
    elif name in CLIPPED or name not in PEERS:
        steps = [clipped_step(each) for each in (optimizer, *baselines.values())]
        timed_pairs(*steps, device=device, pairs=2, ends=0)
        own, *theirs = timed_pairs(*steps, device=device, pairs=PAIRS, ends=float("inf"))
        row = {"ms": middle(own), **ratios(own, theirs, baselines), "pairs": len(own)}
        if session.on_gpu:
            row["host_ms"] = 1e3 * host_seconds(steps[0], PAIRS)
        session.row(f"{name}, clipped", **row)


def ratios(own: list[Times], theirs: list[list[Times]], baselines: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios to each baseline with their quartiles, and the milliseconds of each baseline."""
    found: dict[str, Any] = {}
    for dtype, times in zip(baselines, theirs, strict=True):
        each = [a[1] / b[1] for a, b in zip(own, times, strict=True)]
        low, found[f"to_{dtype}"], high = statistics.quantiles(each, n=4, method="inclusive")
        found[f"to_{dtype}_quartiles"] = f"{low:.3f}-{high:.3f}"
        found[f"adamw_{dtype}_ms"] = middle(times)
    return found


def middle(times: list[Times]) -> float:
    return statistics.median(wall for _, wall in times)
