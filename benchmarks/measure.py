"""Measures one row of `step_time.py` in this process: the times, state and peak memory of an optimizer and AdamW."""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peers import BASELINE, PEERS, build
from presets import PRESETS, build_model, copy_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HORIZON = 200  # the number of first steps over which the changes of basis are averaged
FEWEST_PAIRS = 2
SLOW = 5  # an optimizer that is slower than the baseline by this factor gets the fewest pairs
CLIPPED = (BASELINE, "adamw_foreach", "bnb_adamw8bit")  # the peers that are timed with clipping
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
Times = tuple[float, float]


def measure(
    name: str, preset: str, dtype: str, baseline_dtype: str, threads: int, device: str, pairs: int, limit: float
) -> dict[str, Any]:
    """Return one row. No pair is started once a quarter of `limit` (seconds) has passed since the first step."""
    torch.set_num_threads(threads)
    baseline_model = build_model(PRESETS[preset], DTYPES[baseline_dtype], device)
    model = copy_of(baseline_model, DTYPES[dtype])
    baseline, contender = build(BASELINE, baseline_model), build(name, model)
    copy = copying(device)
    for warm in (baseline.step, baseline.step, copy):
        warm()
    first = timed(contender.step, device)
    ends = time.perf_counter() + limit / 4  # starts after the first step, which may compile for longer than that
    extra = extra_bytes(contender.step, device)

    machine_before, own_before = machine_cpu_seconds(), time.process_time()
    own_times, baseline_times, copy_times = timed_pairs(
        contender.step, baseline.step, device=device, pairs=pairs, ends=ends, last=copy
    )
    own = time.process_time() - own_before
    other = machine_cpu_seconds() - machine_before - own

    row: dict[str, Any] = {"optim": name, "dtype": dtype, "baseline_dtype": baseline_dtype, "threads": threads}
    row |= compared(own_times, baseline_times)
    row |= {"first_step_s": first[1] / 1e3, **memory(model, contender), "extra_bytes": extra}
    row |= bandwidth(row["moved_bytes"], own_times, copy_times, device)
    row["other_cpu_per_own"] = max(0.0, other) / own
    changes = changes_of_basis(contender)
    if changes:
        row |= amortise(contender, changes, row, first, device)
    elif name in CLIPPED or name not in PEERS:
        steps = [clipped_step(contender), clipped_step(baseline)]
        for warm in steps:
            warm()
        row["clipped"] = compared(*timed_pairs(*steps, device=device, pairs=pairs, ends=ends))
    if device == "cuda":
        row |= launch_times(contender, pairs)
    return row


def copying(device: str) -> Callable[[], Any]:
    """Return a function that copies a large tensor, which is as fast as a step can be."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def timed_pairs(
    *functions: Callable[[], Any], device: str, pairs: int, ends: float, last: Callable[[], Any] | None = None
) -> list[list[Times]]:
    """Return the times of each function: the contender and the baselines in alternating order, and then `last`."""
    every = (*functions, last) if last else functions
    hosts = [host_seconds(function) if device == "cuda" else 0.0 for function in every]
    times: list[list[Times]] = [[] for _ in every]
    forth = list(range(len(functions)))
    for pair in range(pairs):
        slow = pair and times[0][-1][0] > SLOW * times[1][-1][0]
        if pair >= FEWEST_PAIRS and (slow or time.perf_counter() > ends):
            break
        order = forth if pair % 2 == 0 else forth[::-1]
        for index in (*order, *range(len(functions), len(every))):
            times[index].append(timed(every[index], device, hosts[index]))
    return times


def compared(times: list[Times], baseline_times: list[Times]) -> dict[str, Any]:
    """Return the medians of both, and the median and the quartiles of the ratios of the pairs."""
    found: dict[str, Any] = {"pairs": len(times)}
    for index, clock in enumerate(("cpu", "wall")):
        mine, theirs = ([each[index] for each in one] for one in (times, baseline_times))
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found |= {f"{clock}_ratio": middle, f"{clock}_ratio_quartiles": [low, high]}
        found |= {f"{clock}_ms": statistics.median(mine), f"baseline_{clock}_ms": statistics.median(theirs)}
    return found


def clipped_step(optimizer: Any) -> Callable[[], None]:
    """Return a step that first clips, as the Trainer does, to half the norm that the gradients have now.

    torch's clipping halves the gradients once, in place, and multiplies them by one from then on, which takes as long.
    Ours does not change the gradients, and each step reads them halved. So both step by the same gradients every time.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    max_norm = 0.5 * float(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    clip = getattr(optimizer, "clip_grad_norm_", partial(torch.nn.utils.clip_grad_norm_, parameters))

    def step() -> None:
        clip(max_norm)
        optimizer.step()

    return step


def timed(function: Callable[[], Any], device: str, host_s: float = 0.0) -> Times:
    """Return the milliseconds of CPU and wall time, or on CUDA twice the device's time.

    Args:
        host_s: how long the host takes to launch the step. The device is first kept busy for longer than that, so that
            its time does not include waiting for the host.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(1.5 * host_s * cycles_per_second()))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), start.elapsed_time(end)
    cpu, wall = time.process_time(), time.perf_counter()
    function()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


@cache
def cycles_per_second() -> float:
    """Return the cycles per second of the clock that `torch.cuda._sleep` counts."""
    cycles, start, end = 1 << 24, *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return 1e3 * cycles / start.elapsed_time(end)


# -- launches on CUDA -----------------------------------------------------------------------------------------------


def launch_times(optimizer: Any, pairs: int) -> dict[str, float]:
    """Return the host's time of a step and, if it can be captured, the device's time of its CUDA graph."""
    found = {"host_ms": 1e3 * host_seconds(optimizer.step, pairs)}
    if optimizer.param_groups[0].get("capturable"):
        replay = captured(optimizer.step).replay
        host_s = host_seconds(replay)
        found["graph_ms"] = statistics.median(timed(replay, "cuda", host_s)[0] for _ in range(pairs))
    return found


def host_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time until the call returns, starting with an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


# -- bytes ----------------------------------------------------------------------------------------------------------


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of every storage in nested state, and of the inner tensors of tensor subclasses."""
    if isinstance(value, dict):
        for item in value.values():
            yield from storages(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from storages(item)
    elif hasattr(value, "__tensor_flatten__"):
        yield from storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    elif hasattr(value, "__dict__"):  # GaLore's projector
        yield from storages(vars(value))


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return the bytes of all state, and of the bases in it, whose names begin with `proj`; storage counts once."""
    states = list(optimizer.state.values())
    bases = [item for state in states for name, item in state.items() if str(name).startswith("proj")]
    return sum(dict(storages(states)).values()), sum(dict(storages(bases)).values())


def memory(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the bytes of the state, and the bytes that a step must move, in all and per parameter."""
    parameters, weights = (
        sum(sizes) for sizes in zip(*((p.numel(), p.nbytes) for p in model.parameters()), strict=True)
    )
    state, bases = state_bytes(optimizer)
    moved = bytes_moved(weights, state, bases)
    return {
        "state_bytes": state,
        "state_bytes_per_parameter": state / parameters,
        "moved_bytes": moved,
        "moved_bytes_per_parameter": moved / parameters,
    }


def bandwidth(moved: float, times: list[Times], copy_times: list[Times], device: str) -> dict[str, float]:
    """Return the bandwidth of the copies, and the share of it that the steps reach."""
    copied = 2 * COPY_BYTES[device]
    shares = [moved / c[1] / (copied / seconds[1]) for c, seconds in zip(times, copy_times, strict=True)]
    return {
        "copy_gb_per_s": copied / 1e6 / statistics.median(wall for _, wall in copy_times),
        "copy_share": statistics.median(shares),
    }


def bytes_moved(weights: int, state: int, bases: int) -> int:
    """Return the bytes that a step must move: weights and state in and out, gradients and bases in."""
    return 3 * weights + 2 * state - bases


def extra_bytes(step: Callable[[], Any], device: str) -> int | None:
    """Return the peak memory of a step beyond what is held before it, or None if the system does not report it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise the step might reuse freed memory that malloc has kept
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        step()
        return None
    before = resident_bytes("VmRSS")
    step()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """Return VmRSS (the current memory) or VmHWM (the peak) in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def machine_cpu_seconds() -> float:
    """Return the CPU seconds that the machine has worked since it started, or 0 if /proc is missing."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


# -- changes of basis -----------------------------------------------------------------------------------------------


def changes_of_basis(optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    """Return for each kind of change after how many of the first `HORIZON` steps it is due."""
    group = optimizer.param_groups[0]
    if interval := group.get("update_interval"):
        recomputed = interval * group["reproject_factor"]
        due = range(interval, HORIZON, interval)
        changes = {"correct": [k for k in due if k % recomputed], "recompute": [k for k in due if k % recomputed == 0]}
        return {kind: steps for kind, steps in changes.items() if steps}
    frequency = group.get("precondition_frequency")
    return {"refresh": list(range(frequency, HORIZON, frequency))} if frequency else {}


def amortise(
    optimizer: Any, changes: dict[str, list[int]], row: dict[str, Any], first: Times, device: str
) -> dict[str, Any]:
    """Return the time of a step with each kind of change, and of the first `HORIZON` steps over fused AdamW's."""
    clocks = ("cpu", "wall")
    times: dict[str, dict[str, float]] = {}
    total = {clock: row[f"{clock}_ms"] * (HORIZON - 1) + ms for clock, ms in zip(clocks, first, strict=True)}
    for kind, steps in changes.items():
        for state in optimizer.state.values():
            state["step"].fill_(steps[0])
        if device == "cuda":  # the first change also loads libraries and makes plans
            optimizer.step()
            for state in optimizer.state.values():
                state["step"].fill_(steps[0])
        times[kind] = dict(zip(("cpu_ms", "wall_ms"), timed(optimizer.step, device), strict=True))
        for clock in clocks:
            total[clock] += len(steps) * (times[kind][f"{clock}_ms"] - row[f"{clock}_ms"])
    return {
        "change_of_basis": times,
        "changes": {kind: len(steps) for kind, steps in changes.items()},
        "amortised": {clock: total[clock] / (HORIZON * row[f"baseline_{clock}_ms"]) for clock in clocks},
    }
