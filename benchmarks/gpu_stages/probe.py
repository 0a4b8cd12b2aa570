"""Describes the machine, and measures its copies, transfers and launches."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import describe_machine
from measure import COPY_BYTES, copying, timed

from gpu_stages.session import Session

LAUNCHES = 200
TRANSFERRED = 2**30  # bytes


def run(session: Session) -> None:
    described = describe_machine(session.device, session.commit)
    del described["command"]  # is recorded once for the whole session
    versions = " ".join(f"{name} {number}" for name, number in described.pop("versions").items())
    session.row("machine", **described, **properties(session), versions=versions, compilers=compilers())
    seconds = median_seconds(copying(session.device), session.device)
    session.row("copy on the device", gb_per_s=2 * COPY_BYTES[session.device] / 1e9 / seconds)
    if not session.on_gpu:
        return
    here = torch.empty(TRANSFERRED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device="cuda")
    for name, target, source in (("host to device", there, here), ("device to host", here, there)):
        seconds = median_seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True), "cuda")
        session.row(name, gb_per_s=TRANSFERRED / 1e9 / seconds)
    number = torch.zeros(1, device="cuda")
    session.row("a launch of torch's", host_us=1e6 * host_seconds_of_launches(lambda: number.add_(1)))


def properties(session: Session) -> dict[str, Any]:
    if not session.on_gpu:
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "gib": found.total_memory / 2**30,
        "multiprocessors": found.multi_processor_count,
        "arch": f"sm_{found.major}{found.minor}",
        "cuda": torch.version.cuda,
        "driver_clocks_power": nvidia_smi("driver_version,clocks.max.sm,clocks.max.memory,power.limit"),
    }


def nvidia_smi(query: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def compilers() -> str:
    return " ".join(name for name in ("gcc", "cc", "g++", "clang", "nvcc") if shutil.which(name)) or "none"


def median_seconds(function: Callable[[], Any], device: str) -> float:
    function()
    return statistics.median(timed(function, device, 1e-4)[1] for _ in range(5)) / 1e3


def host_seconds_of_launches(launch: Callable[[], Any]) -> float:
    """Return the host's time per launch in a sequence of launches."""
    launch()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        launch()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / LAUNCHES
