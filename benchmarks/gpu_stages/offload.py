"""Moves the state of a model to the host and back."""

from __future__ import annotations

import time

import torch
from peers import build
from presets import PRESETS, build_model

from gpu_stages.session import Session

NAMES = ("slim_adamw_8bit offload_state=true", "lowmem_adamw_8bit offload_state=true")


def run(session: Session) -> None:
    for name in NAMES:
        model = build_model(PRESETS[session.preset or "1b"], torch.bfloat16, session.device)
        optimizer = build(name, model)
        optimizer.step()
        optimizer.release_state()  # allocates the host buffers
        optimizer.step()
        expected = [tensor.clone().cpu() for state in optimizer.state.values() for tensor in state.values()]
        optimizer.state_transferred()
        before, started = allocated(session), time.perf_counter()
        optimizer.release_state()
        launched = time.perf_counter() - started
        optimizer.synchronize_state()
        out, after = optimizer.state_transferred(), allocated(session)
        found = [tensor for state in optimizer.state.values() for tensor in state.values()]
        same = all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        optimizer.step()
        if session.on_gpu:
            torch.cuda.synchronize()
        back = optimizer.state_transferred()
        session.row(
            name,
            state_mib=out.nbytes / 2**20,
            freed_mib=(before - after) / 2**20,
            out_gb_per_s=out.nbytes / 1e9 / out.seconds if out.seconds else None,
            back_gb_per_s=back.nbytes / 1e9 / back.seconds if back.seconds else None,
            release_host_ms=1e3 * launched,
            bit_equal=same,
        )
        if not same:
            raise RuntimeError(f"{name}: the state on the host is not the one that was released")


def allocated(session: Session) -> int:
    return torch.cuda.memory_allocated() if session.on_gpu else 0
