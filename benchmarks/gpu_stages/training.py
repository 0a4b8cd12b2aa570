"""Measures whole steps of supervised fine-tuning, as `train.py` does. Each call writes a row."""

from __future__ import annotations

from train import measure

from gpu_stages.session import Session

GIB = 2**30
STEPS, STEPS_ON_CPU = 8, 3


def run(session: Session, optim: str, preset: str) -> None:
    session.wait_for_memory()
    batch_size, length = (1, 32) if not session.on_gpu else (1, 2048) if preset == "8b" else (4, 2048)
    steps = STEPS if session.on_gpu else STEPS_ON_CPU
    found = measure(optim, session.preset or preset, session.device, steps, batch_size, length)
    session.row(
        optim,
        model=session.preset or preset,
        seconds_per_step=found["seconds_per_step"],
        tokens_per_second=found["tokens_per_second"],
        peak_gib=found["peak_bytes"] / GIB,
        state_gib=found["state_bytes"] / GIB,
        training_loss=found["training_loss"],
        trainer=found["trainer"],
    )
