"""Compiles the kernels of the rows that will be timed into Triton's cache, beside the first stages."""

from __future__ import annotations

import time

import torch
from peers import build
from presets import build_model, one_layer

from gpu_stages import sweep
from gpu_stages.core import ROWS
from gpu_stages.session import Session

NAMES = ("slim_adamw_8bit", "adam_mini_8bit")


def run(session: Session, first: int, every: int) -> None:
    """Steps of the `first` name and each `every`-th after it, on one layer of the widths that are timed later, and
    then of the sweep's tiles."""
    for name in (*NAMES, *ROWS)[first::every]:
        started = time.perf_counter()
        model = build_model(one_layer(session.preset or "1b"), torch.bfloat16, session.device)
        optimizer = build(name, model)
        optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        session.row(name, first_steps_s=time.perf_counter() - started)
    if session.on_gpu:
        for case, tile in sweep.cases_and_tiles()[first::every]:
            sweep.step_ms(case._replace(shape=(64, case.shape[1])), tile, session)
