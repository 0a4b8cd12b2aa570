"""`max_grad_norm` under `fused_clip=true`, through the real Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_lowmem

SLOW = [name for name in hf_lowmem.optim_names() if not name.endswith("8bit")]  # the others run by default
RUNS = [
    *(
        pytest.param(name, torch.float32, marks=[pytest.mark.slow] * (name in SLOW))
        for name in hf_lowmem.optim_names()
    ),
    *((name, torch.bfloat16) for name in ("slim_adamw", "adam_mini_8bit", "coap_adamw_8bit")),
]
PROJECTED = "update_interval=2,reproject_factor=2,min_8bit_size=0"


@pytest.mark.parametrize(("optim", "dtype"), RUNS, ids=str)
def test_a_trainer_clips_by_the_step(optim: str, dtype: torch.dtype, make_trainer: Any, monkeypatch: Any) -> None:
    """The same losses and the same logged norm as with the Trainer's own clipping, which is not called."""
    options = PROJECTED if optim.startswith("coap") else "min_8bit_size=0"

    def trained(optim_args: str) -> Trainer:
        trainer = make_trainer(optim, dtype, optim_args=optim_args, logging_steps=1, max_grad_norm=0.1, max_steps=4)
        trainer.train()
        return trainer

    plain = trained(options)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: pytest.fail("torch clips"))
    mine = trained(f"{options},fused_clip=true")
    logs, expected = (
        [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (mine, plain)
    )
    assert len(logs) == 4
    assert min(norm for _, norm in logs) > 0.1
    tolerance = 2e-2 if dtype == torch.bfloat16 or optim.endswith("8bit") or optim == "signum" else 1e-3
    torch.testing.assert_close(torch.tensor(logs), torch.tensor(expected), rtol=tolerance, atol=0)


def test_a_trainer_that_does_not_clip_logs_the_norm_all_the_same(make_trainer: Any) -> None:
    norms = []
    for optim_args in ("fused_clip=true", None):
        trainer = make_trainer("slim_adamw", optim_args=optim_args, logging_steps=1, max_grad_norm=0.0, max_steps=2)
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert len(norms[0]) == 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
