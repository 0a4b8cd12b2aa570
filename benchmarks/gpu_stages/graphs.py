"""Times steps of a small model, in which the device waits for the host, with and without CUDA graphs."""

from __future__ import annotations

import statistics

import torch
from measure import host_seconds, launch_times, timed
from peers import BASELINE, build
from presets import PRESETS, build_model

from gpu_stages.session import Session

NAMES = (BASELINE, *(f"{name} capturable=true" for name in ("slim_adamw_8bit", "adam_mini_8bit", "lowmem_adamw_8bit")))
REPEATS = 9


def run(session: Session) -> None:
    for name in NAMES:
        if not session.on_gpu:
            session.row(name, remark="needs a GPU")
            continue
        model = build_model(PRESETS[session.preset or "100m"], torch.bfloat16, session.device)
        optimizer = build(name, model)
        optimizer.step()
        host_s = host_seconds(optimizer.step)
        eager = statistics.median(timed(optimizer.step, "cuda", host_s)[1] for _ in range(REPEATS))
        session.row(name, device_ms=eager, **launch_times(optimizer, REPEATS))
