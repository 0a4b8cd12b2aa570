"""State on the host between steps. Without an accelerator the moves are made to happen between CPU tensors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_lowmem
from hf_lowmem.algorithms import LowMemAdamW
from hf_lowmem.placement import HostCopies
from hf_lowmem.trainer.callbacks import generates_before_update

hf_lowmem.register()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state tensor but the counters on the host counts as one on an accelerator."""
    monkeypatch.setattr("hf_lowmem.placement.on_accelerator", lambda tensor: tensor.ndim > 0)


def make_trainer(folder: Path, optim: str, device: str, **arguments: Any) -> Trainer:
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    )
    tokens = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        **{
            **dict(output_dir=str(folder), optim=optim, learning_rate=1e-3, max_steps=4, logging_steps=2),
            **dict(save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=device == "cpu"),
            **arguments,
        }
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows)


def same_state(mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> bool:
    a, b = mine.state_dict()["state"], theirs.state_dict()["state"]
    return a.keys() == b.keys() and all(
        a[key].keys() == b[key].keys() and all(torch.equal(a[key][n].cpu(), b[key][n].cpu()) for n in a[key])
        for key in a
    )


@pytest.mark.parametrize("optim", ["slim_adamw_8bit", "coap_adamw", "soap_8bit", "lowmem_adamw"])
def test_a_run_with_its_state_on_the_host_is_the_same_run(optim, device, request, tmp_path) -> None:
    if device == "cpu":
        request.getfixturevalue("moves")
    plain, offloaded = (
        make_trainer(tmp_path / text, optim, device, optim_args=f"offload_state={text},min_8bit_size=0")
        for text in ("false", "true")
    )
    for trainer in (plain, offloaded):
        trainer.train()
    for a, b in zip(plain.model.parameters(), offloaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    mine, theirs = (trainer.optimizer.optimizer for trainer in (offloaded, plain))
    assert same_state(mine, theirs)
    assert all(t.device.type == "cpu" for state in mine.state.values() for t in state.values())

    nbytes = sum(t.nbytes for state in mine.state.values() for t in state.values() if t.ndim)
    logs = [entry for entry in offloaded.state.log_history if "offload_gib" in entry]
    # Out after steps 1 and 2, back before step 2, out after step 3 and 4 and back before each.
    moved = [round(entry["offload_gib"] * 2**30 / nbytes) for entry in logs]
    assert moved == [3, 4] if device == "cpu" else 2 <= sum(moved) <= 7  # copies under way count with the next log
    assert all(entry["offload_seconds"] > 0 for entry in logs)
    assert not any("offload_gib" in entry for entry in plain.state.log_history)


def test_on_a_cpu_nothing_moves_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hf_lowmem")
    trainer = make_trainer(tmp_path, "slim_adamw_8bit", "cpu", optim_args="offload_state=true")
    trainer.train()
    assert "offload_state does nothing here" in caplog.text
    assert not any("offload_gib" in entry for entry in trainer.state.log_history)


def test_a_run_is_resumed_from_state_that_was_saved_on_the_host(moves: None, tmp_path: Path) -> None:
    options = dict(optim_args="offload_state=true,rounding_seed=3", save_strategy="steps", save_steps=2)
    whole = make_trainer(tmp_path, "slim_adamw_8bit", "cpu", **options)
    whole.train()
    resumed = make_trainer(tmp_path, "slim_adamw_8bit", "cpu", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_state(whole.optimizer.optimizer, resumed.optimizer.optimizer)


def stepped(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    optimizer = hf_lowmem.build_optimizer(layer, "slim_adamw", lr=1e-3, optim_args=options)
    layer(torch.ones(64)).sum().backward()
    optimizer.step()
    return layer, optimizer


def test_released_state_can_be_copied_pickled_and_replaced(moves: None) -> None:
    layer, optimizer = stepped(offload_state=True)
    _, plain = stepped()
    optimizer.release_state()
    assert same_state(copy.deepcopy(optimizer), plain)
    optimizer.release_state()
    assert same_state(pickle.loads(pickle.dumps(optimizer)), plain)
    optimizer.release_state()
    optimizer.load_state_dict(plain.state_dict())
    optimizer.step()
    plain.param_groups[0]["params"][0].grad = layer.weight.grad.clone()
    plain.step()
    assert same_state(optimizer, plain)


def test_only_groups_that_ask_are_released(moves: None) -> None:
    _, optimizer = stepped(offload_state=True)
    kept = optimizer.param_groups[0]
    kept["offload_state"] = False
    before = {param: dict(optimizer.state[param]) for param in optimizer.state}
    optimizer.release_state()
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert (optimizer.state[param]["exp_avg"] is before[param]["exp_avg"]) == (group is kept)


def test_an_option_that_nobody_acts_on_is_said(caplog: pytest.LogCaptureFixture) -> None:
    layer, optimizer = stepped(offload_state=True)
    assert "stays on the device" not in caplog.text
    for _ in range(2):
        layer(torch.ones(64)).sum().backward()
        optimizer.step()
    assert caplog.text.count("offload_state=true, but the state stays on the device") == 1


@pytest.mark.gpu
def test_on_cuda_released_state_is_pinned_and_its_memory_free() -> None:
    layer = nn.Linear(4096, 4096, device="cuda")
    optimizer = hf_lowmem.build_optimizer(layer, "lowmem_adamw", lr=1e-3, optim_args={"offload_state": True})
    layer(torch.ones(4096, device="cuda")).sum().backward()
    optimizer.step()
    before = torch.cuda.memory_allocated()
    optimizer.release_state()
    optimizer.synchronize_state()
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert all(tensor.is_pinned() for tensor in moments)
    assert before - torch.cuda.memory_allocated() >= 2 * 4 * 4096**2
    assert optimizer.state_transferred().nbytes == sum(tensor.nbytes for tensor in moments)


def test_copies_are_counted_once_and_none_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy may end at any moment, also between two questions."""
    answers = iter([False, True, True])
    monkeypatch.setattr("hf_lowmem.placement.is_done", lambda timing: next(answers))
    copies = HostCopies()
    copies._transfers = [(3, 1.0), (5, 2.0)]
    assert copies.transferred() == (5, 2.0)
    assert copies.transferred() == (3, 1.0)
    assert copies.transferred() == (0, 0.0)


def test_what_left_before_a_failure_comes_back(moves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, optimizer = stepped(offload_state=True)
    _, plain = stepped()
    copy_, left = torch.Tensor.copy_, []

    def failing(buffer: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        left.append(buffer)
        if len(left) == 2:
            raise KeyboardInterrupt
        return copy_(buffer, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(KeyboardInterrupt):
        optimizer.release_state()
    monkeypatch.undo()
    before = left[0]
    plain.param_groups[0]["params"][0].grad = layer.weight.grad.clone()
    for each in (optimizer, plain):
        each.step()
    assert all(tensor is not before for state in optimizer.state.values() for tensor in state.values())
    assert same_state(optimizer, plain)


class Look(TrainerCallback):
    """Whether the state is on the host after each step."""

    def __init__(self) -> None:
        self.released: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.released.append(bool(optimizer.optimizer._host_copies._released))


def released_after_steps(trainer: Trainer, batches_of_a_rollout: int) -> list[bool]:
    trainer.args.steps_per_generation, look = batches_of_a_rollout, Look()
    trainer.add_callback(look)
    trainer.train()
    return look.released


def test_the_state_leaves_before_an_evaluation_too(moves: None, tmp_path: Path) -> None:
    """One rollout serves all four steps, but the evaluations after the second and the fourth may generate."""
    options = dict(optim_args="offload_state=true", eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(tmp_path, "slim_adamw", "cpu", **options)
    assert released_after_steps(trainer, 100) == [False, True, False, True]


def test_rollouts_are_followed_over_an_epoch_that_ends_within_an_accumulation(moves: None, tmp_path: Path) -> None:
    """Eight micro-batches in an epoch, steps after the third, the sixth and the eighth; a rollout serves eight."""
    options = dict(optim_args="offload_state=true", gradient_accumulation_steps=3, per_device_train_batch_size=2)
    trainer = make_trainer(tmp_path, "slim_adamw", "cpu", max_steps=6, **options)
    # Before the third step the batches 6, 7 and, for all that is known there, 8 may follow.
    assert released_after_steps(trainer, 8) == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [True, True, True, True]),  # no rollouts: between all steps
        (dict(steps_per_generation=4, num_iterations=1, gradient_accumulation_steps=4), [True, True, True, True]),
        (dict(steps_per_generation=4, num_iterations=2, gradient_accumulation_steps=4), [True, False, True, False]),
        (dict(steps_per_generation=6, num_iterations=1, gradient_accumulation_steps=2), [True, False, False, True]),
        (dict(steps_per_generation=1, num_iterations=1, gradient_accumulation_steps=8), [True, True, True, True]),
    ],
)
def test_state_leaves_before_steps_that_generate(arguments: dict[str, int], expected: list[bool]) -> None:
    args = SimpleNamespace(**arguments)
    per_step = arguments.get("gradient_accumulation_steps", 1)
    assert [generates_before_update(args, done * per_step) for done in range(4)] == expected


def test_an_entry_of_the_state_that_was_only_looked_at_is_no_state() -> None:
    param = nn.Parameter(torch.ones(8))
    optimizer = LowMemAdamW([param], lr=1e-2, offload_state=True)
    assert not optimizer.state[param]  # which adds it
    param.grad = torch.ones(8)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
