"""Profiles a few clipped steps, on the device and on the host."""

from __future__ import annotations

import gzip
import shutil

import torch
from measure import clipped_step
from peers import build
from presets import PRESETS, build_model
from torch.profiler import ProfilerActivity, profile

from gpu_stages.session import Session

STEPS = 3
LINES = 14


def run(session: Session) -> None:
    model = build_model(PRESETS[session.preset or "1b"], torch.bfloat16, session.device)
    step = clipped_step(build("slim_adamw_8bit", model))
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if session.on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if session.on_gpu:
            torch.cuda.synchronize()
    averages = found.key_averages()
    orders = ("self_device_time_total", "self_cpu_time_total") if session.on_gpu else ("self_cpu_time_total",)
    for order in orders:
        session.row(
            f"{STEPS} steps by {order}", text=averages.table(sort_by=order, row_limit=LINES, max_name_column_width=60)
        )
    trace = session.scratch / "trace.json"
    found.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(session.out / "trace.json.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
