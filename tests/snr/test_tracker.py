"""The tracker and its callback under a Trainer: what is measured, when, and what a killed run leaves."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lowmem
from hf_lowmem.roles import assign_roles
from hf_lowmem.snr import SnrTracker, candidates, snr, snr_of
from hf_lowmem.snr.measure import ratios_of
from hf_lowmem.snr.ratios import COLUMNS, keep_until, read_ratios
from hf_lowmem.snr.rules import kept_entries
from hf_lowmem.snr.tracker import is_due

TOKENS = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))


def trainer(output: Path, callback: Any = None, **arguments: Any) -> Trainer:
    hf_lowmem.register()
    defaults = dict(max_steps=4, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_steps=2)
    args = TrainingArguments(str(output), **{**defaults, **arguments})
    callback = callback or hf_lowmem.SnrCallback(every=2)
    return Trainer(llama(), args, train_dataset=TOKENS, callbacks=[callback])


def test_the_authors_schedule() -> None:
    assert [step for step in range(1, 3001) if is_due(step)] == [1, *range(100, 1000, 100), 1000, 2000, 3000]
    assert [step for step in range(1, 8) if is_due(step, 3)] == [1, 3, 6]


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [("adamw_torch", None), ("lowmem_adamw_8bit", "min_8bit_size=0")],
)
def test_any_optimizer_with_a_full_second_moment(optim: str, optim_args: str | None, tmp_path: Path) -> None:
    run = trainer(tmp_path, optim=optim, optim_args=optim_args)
    run.train()
    found = read_ratios(tmp_path / "snr.csv")
    roles = dict((role.name, (param, role)) for param, role in assign_roles(run.model))
    assert found.keys() == roles.keys()
    optimizer = run.optimizer.optimizer
    for name, (param, role) in roles.items():
        state = optimizer.state[param]
        v = state["exp_avg_sq"]
        if optim != "adamw_torch":
            (layout,) = [
                (group, each)
                for _, group, layouts in optimizer.groups_with_layouts()
                for member, each in zip(group["params"], layouts, strict=True)
                if member is param
            ]
            v = optimizer.plan_by(layout[1], layout[0], param).bind(state, role.shape)["exp_avg_sq"].load()
        named = candidates(role).get("", {})
        expected = {literal_eval(f"({axis},)"): snr(v, (axis,)).item() for axis in range(v.ndim)}
        expected |= {how: snr_of(v, segment).item() for how, segment in named.items() if how in ("head", "row_col")}
        for how, ratio in expected.items():
            assert found[name].ratios[how].get(4, float("nan")) == pytest.approx(ratio, rel=1e-6, nan_ok=True)
        assert set().union(*found[name].ratios.values()) <= {1, 2, 4}


def test_a_killed_and_resumed_run_leaves_each_row_once(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", max_steps=6).train()
    whole = (tmp_path / "whole" / "snr.csv").read_text()

    class Kill(hf_lowmem.SnrCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", Kill(every=2), max_steps=6).train()
    path = tmp_path / "cut" / "snr.csv"
    cut = path.read_text()
    assert whole.startswith(cut)
    assert "\n4," in cut
    path.write_text(cut[:-9])  # the last line is incomplete
    trainer(tmp_path / "cut", max_steps=6).train(resume_from_checkpoint=True)
    assert path.read_text() == whole

    trainer(tmp_path / "cut", max_steps=1).train()
    assert {line.split(",")[0] for line in path.read_text().splitlines()} == {"step", "1"}


def test_a_measurement_is_written_at_once_and_never_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = SnrTracker(model, tmp_path / "snr.csv")
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    tracker.measure(optimizer, 1)
    written = (tmp_path / "snr.csv").read_text()
    with monkeypatch.context() as patch:
        measured = iter(range(5))
        patch.setattr("hf_lowmem.snr.tracker.ratios_of", lambda *args: [next(measured)] and ratios_of(*args))
        with pytest.raises(RuntimeError):  # the sixth weight is the last that is reached
            tracker.measure(optimizer, 2)
    assert (tmp_path / "snr.csv").read_text() == written


def test_parts_of_a_fused_weight(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = SnrTracker(model, tmp_path / "snr.csv")
    model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    tracker.measure(optimizer, 1)
    found = read_ratios(tmp_path / "snr.csv")
    weight = model.transformer.h[0].attn.c_attn.weight  # (in, 3 out)
    key = optimizer.state[weight]["exp_avg_sq"][:, 16:32]
    measured = found["transformer.h.0.attn.c_attn.weight[key]"]
    assert (measured.shape, measured.name, measured.part) == ((16, 16), "transformer.h.0.attn.c_attn.weight", "key")
    assert measured.ratios[(0,)][1] == pytest.approx(snr(key, (0,)).item())
    assert measured.ratios["head"][1] == pytest.approx(snr(key.unflatten(1, (2, 8)), (0, 2)).item())
    assert (measured.head_entries, kept_entries(measured, "head")) == (128, 2)


def test_what_has_no_full_second_moment_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^slim_adamw keeps no full second moment of model.*train with lowmem_adamw"):
        trainer(tmp_path, optim="slim_adamw").train()
    with pytest.raises(ValueError, match=r"^SGD keeps no full second moment"):
        trainer(tmp_path, optim="sgd").train()
    with pytest.raises(ValueError, match=r"^rules=auto measures by itself, .*: leave SnrCallback out, or train with"):
        trainer(tmp_path, optim="slim_adamw", optim_args="rules=auto").train()
    with pytest.raises(ValueError, match="every=0 must be"):
        hf_lowmem.SnrCallback(every=0)
    sharded = SimpleNamespace(deepspeed="config.json", fsdp=None, optim="adamw_torch")
    with pytest.raises(ValueError, match=r"^SnrCallback does not support DeepSpeed, which cuts weights into pieces"):
        hf_lowmem.SnrCallback().on_train_begin(sharded, None, None)


def test_files_that_are_no_csv_of_ratios(tmp_path: Path) -> None:
    path = tmp_path / "snr.csv"
    with pytest.raises(ValueError, match="is not a readable CSV"):
        read_ratios(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks step, key, shape, compress_dims, snr"):
        read_ratios(path)
    keep_until(path, 0)
    assert path.read_text() == ",".join(COLUMNS) + "\n"
    with pytest.raises(ValueError, match="holds no ratios"):
        read_ratios(path)
