"""Compiles the kernels that will be timed into Triton's cache, while stages run that do not measure time."""

from __future__ import annotations

import time

import torch
from peers import build
from presets import build_model, one_layer

from gpu_stages import smoke, sweep
from gpu_stages.core import ROWS
from gpu_stages.session import Session

NAMES = ("slim_adamw_8bit", "adam_mini_8bit")
LATER = (*NAMES, "lowmem_adamw_8bit", "coap_adamw_8bit")  # the optimizers of whole trainings


def run(session: Session, first: int, every: int) -> None:
    """Compile what `smoke` steps, and then a layer of what is timed later, for every `every`-th optimizer.

    The optimizers are counted from the one numbered `first`.
    """
    started = time.perf_counter()
    if session.on_gpu:
        for name in smoke.NAMES[first::every]:
            for dtype in (torch.float32, torch.bfloat16):
                smoke.trained(name, dtype, session.device)
    wide = [(name, session.preset or "1b", torch.bfloat16) for name in (*NAMES, *ROWS)]
    wide += [(name, session.preset or "8b", torch.bfloat16) for name in LATER]
    wide += [(name, session.preset or "100m", torch.float32) for name in LATER]
    for name, preset, dtype in wide[first::every]:
        optimizer = build(name, build_model(one_layer(preset), dtype, session.device))
        optimizer.step()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    session.row(f"process {first + 1} of {every}: steps", seconds_since_its_start=time.perf_counter() - started)
    if session.on_gpu:
        for case, tile in sweep.cases_and_tiles()[first::every]:
            sweep.step_ms(case._replace(rows=sweep.FEW_ROWS), tile, session)
        session.row(f"process {first + 1} of {every}: sweep", seconds_since_its_start=time.perf_counter() - started)
