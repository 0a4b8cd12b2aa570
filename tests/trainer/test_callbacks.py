"""The meter of lost updates, through the real Trainer."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer import DEFAULT_CALLBACKS

import hf_lowmem
from hf_lowmem import LostUpdates
from hf_lowmem.trainer import callbacks

hf_lowmem.register()


def make_trainer(folder: Path, optim: str, dtype: torch.dtype, **arguments: Any) -> Trainer:
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).to(dtype)
    tokens = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(0))
    defaults = dict(
        output_dir=str(folder),
        optim=optim,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    args = TrainingArguments(**{**defaults, **arguments})
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model, args, train_dataset=dataset)


def logged(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["lost_updates"] for entry in trainer.state.log_history if "lost_updates" in entry]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "lost to rounding" in r.message]


def test_most_updates_of_bfloat16_weights_at_1e_6_are_lost_and_said_once(tmp_path, caplog) -> None:
    shares = logged(make_trainer(tmp_path, "slim_adamw_8bit", torch.bfloat16))
    assert len(shares) == 2
    assert all(share > 0.8 for share in shares)
    (warning,) = warnings(caplog)
    assert "rounding=kahan" in warning
    assert "rounding=stochastic" in warning


def test_the_share_is_that_of_all_entries(tmp_path: Path) -> None:
    """The sample, of a fifth of the largest weights here, against a count of every entry."""
    trainer = make_trainer(tmp_path, "lowmem_adamw", torch.bfloat16, learning_rate=3e-5, max_steps=1, logging_steps=1)
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    grads: dict[str, torch.Tensor] = {}
    for name, param in trainer.model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda p, name=name: grads.update({name: p.grad.clone()}))
    (share,) = logged(trainer)
    moved = {name: grads[name] != 0 for name in before}
    same = {name: (param == before[name]) & moved[name] for name, param in trainer.model.named_parameters()}
    exact = sum(s.sum().item() for s in same.values()) / sum(m.sum().item() for m in moved.values())
    assert 0.1 < exact < 0.9
    assert share == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize(
    ("optim", "dtype", "optim_args"),
    [
        ("slim_adamw_8bit", torch.float32, None),
        ("slim_adamw_8bit", torch.bfloat16, "rounding=stochastic"),
        ("adamw_torch", torch.bfloat16, None),
    ],
)
def test_nothing_is_logged_where_nothing_can_be_lost_or_the_optimizer_is_not_ours(
    optim: str, dtype: torch.dtype, optim_args: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert logged(make_trainer(tmp_path, optim, dtype, optim_args=optim_args)) == []
    assert not warnings(caplog)


def test_kahan_loses_next_to_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shares = logged(make_trainer(tmp_path, "adam_mini", torch.bfloat16, optim_args="rounding=kahan"))
    assert len(shares) == 2
    assert all(share < 0.02 for share in shares)
    assert not warnings(caplog)


def test_a_step_without_a_learning_rate_is_passed_over(tmp_path: Path) -> None:
    warmup = dict(learning_rate=0.1, lr_scheduler_type="constant_with_warmup", warmup_steps=2, logging_steps=1)
    trainer = make_trainer(tmp_path, "slim_adamw", torch.bfloat16, max_steps=3, **warmup)
    shares = logged(trainer)  # the first of the three steps has a learning rate of 0
    assert len(shares) == 2
    assert max(shares) < 0.2


def test_other_optimizers_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LostUpdates, "every_optimizer", True)
    shares = logged(make_trainer(tmp_path, "adamw_torch", torch.bfloat16))
    assert shares
    assert all(share > 0.8 for share in shares)


def test_a_call_that_only_prepares_the_basis_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shares = logged(make_trainer(tmp_path, "soap", torch.bfloat16, learning_rate=0.1, logging_steps=1))
    assert len(shares) == 3  # of four steps
    assert max(shares) < 0.2
    assert not warnings(caplog)


def test_a_step_that_the_scaler_skips_loses_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    inner = hf_lowmem.algorithms.SlimAdamW([weight], lr=1.0)
    skipping = SimpleNamespace(optimizer=inner, step_was_skipped=True)
    meter, state, logs = LostUpdates(), SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True), {}
    weight.grad = torch.ones_like(weight)
    meter.on_pre_optimizer_step(None, state, None, optimizer=skipping)
    meter.on_optimizer_step(None, state, None, optimizer=skipping)
    meter.on_log(None, state, None, logs)
    assert logs == {}
    meter.on_pre_optimizer_step(None, state, None, optimizer=inner)
    inner.step()
    meter.on_optimizer_step(None, state, None, optimizer=inner)
    meter.on_log(None, state, None, logs)
    assert logs == {"lost_updates": 0.0}


def test_places_are_drawn_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, *args, **kw: drawn.append(high) or randint(high, *args, **kw))
    callbacks.sampled_entries.cache_clear()
    weights = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in (500, 500, 30)]
    optimizer = hf_lowmem.algorithms.SlimAdamW(weights, lr=1.0)
    meter, state = LostUpdates(), SimpleNamespace(global_step=0, log_history=[], is_world_process_zero=True)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        meter.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        optimizer.step()
        meter.on_optimizer_step(None, state, None, optimizer=optimizer)
        logs: dict[str, float] = {}
        meter.on_log(None, state, None, logs)
        assert logs == {"lost_updates": 0.0}
    assert drawn == [500, 30]


@pytest.mark.parametrize(("rank_zero", "said"), [(True, 1), (False, 0)])
def test_the_warning_names_the_learning_rate_and_advises_what_is_not_set(
    rank_zero: bool, said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: rank_zero)
    logged(make_trainer(tmp_path, "slim_adamw", torch.bfloat16, learning_rate=1e-12, optim_args="rounding=kahan"))
    assert len(warnings(caplog)) == said
    for warning in warnings(caplog):
        assert "at step 1 were lost" in warning
        assert "1.0e-12" in warning
        assert "kahan" not in warning


def test_registering_twice_adds_the_callbacks_once() -> None:
    hf_lowmem.register()
    assert DEFAULT_CALLBACKS.count(LostUpdates) == DEFAULT_CALLBACKS.count(hf_lowmem.OffloadState) == 1
