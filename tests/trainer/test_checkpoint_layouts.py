"""Checkpoints of one process become FSDP2's and come back with the same bits."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_lowmem
from hf_lowmem.cli import main
from hf_lowmem.trainer.checkpoint_layouts import (
    DEEPSPEED,
    FULL,
    LAYOUTS,
    SHARDED,
    SINGLE,
    layout_of,
    refuse_other_layout,
)
from tests.support.model_families import tiny_model
from tests.support.slow import slow
from tests.support.small_trainer import StopAt, make_trainer, three_steps

RUNS = [
    ("slim_adamw_8bit", "min_8bit_size=0", torch.float32),
    ("factored_adamw", "rounding=kahan", torch.bfloat16),
    *(
        slow(*run)
        for run in (
            ("coap_adamw_8bit", "rank=8,min_8bit_size=0", torch.float32),
            ("micro_adam", None, torch.bfloat16),
            ("smmf", None, torch.float32),
        )
    ),
]


def converted(source: Path, layout: str, output: Path, optim_args: str | None) -> Path:
    options = ["--optim-args", optim_args] if optim_args else []
    assert main(["convert", str(source), "--to", layout, "--output", str(output), *options]) == 0
    return output


@pytest.mark.parametrize(("optim", "optim_args", "dtype"), RUNS)
def test_every_layout_has_the_same_bits(
    optim: str, optim_args: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = three_steps(tmp_path, optim, optim_args=optim_args, dtype=dtype)
    saved, weights = torch.load(checkpoint / "optimizer.pt"), (checkpoint / "model.safetensors").read_bytes()
    for number, layout in enumerate([FULL, SINGLE, SHARDED, FULL, SHARDED, SINGLE]):
        checkpoint = converted(checkpoint, layout, tmp_path / str(number), optim_args)
        assert layout_of(checkpoint) == layout
        assert (checkpoint / "trainer_state.json").is_file()
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    found = torch.load(checkpoint / "optimizer.pt")
    assert found.keys() == saved.keys()
    assert found["param_groups"] == saved["param_groups"]
    torch.testing.assert_close(found["state"], saved["state"], rtol=0, atol=0)


def test_weights_of_two_dtypes_and_frozen_weights_keep_their_bits(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "slim_adamw_8bit", "min_8bit_size=0", dtype=torch.bfloat16, bf16=True)
    for name, param in trainer.model.named_parameters():
        if "norm" in name or "lm_head" in name:
            param.data = param.data.float()
        param.requires_grad_("q_proj" not in name)
    trainer.add_callback(StopAt())
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    weights, saved = load_file(checkpoint / "model.safetensors"), torch.load(checkpoint / "optimizer.pt")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.bfloat16}
    for layout in (FULL, SHARDED, SINGLE):
        checkpoint = converted(checkpoint, layout, tmp_path / layout, "min_8bit_size=0")
    torch.testing.assert_close(load_file(checkpoint / "model.safetensors"), weights, rtol=0, atol=0)
    torch.testing.assert_close(torch.load(checkpoint / "optimizer.pt")["state"], saved["state"], rtol=0, atol=0)


def test_files_beside_the_model_are_kept(tmp_path: Path) -> None:
    checkpoint = three_steps(tmp_path, "adam_mini")
    (checkpoint / "extra").mkdir()
    others = ("value_head.safetensors", "extra/model.safetensors", "extra/optimizer.pt")
    for name in others:
        (checkpoint / name).write_bytes((checkpoint / "model.safetensors").read_bytes())
    described = json.loads((checkpoint / "generation_config.json").read_text()) | {"max_new_tokens": 77}
    (checkpoint / "generation_config.json").write_text(json.dumps(described))
    for layout in (FULL, SHARDED, SINGLE):
        checkpoint = converted(checkpoint, layout, tmp_path / layout, None)
        assert all((checkpoint / name).is_file() for name in others)
        assert json.loads((checkpoint / "generation_config.json").read_text()) == described


def test_weights_that_transformers_converts_keep_their_bits(tmp_path: Path) -> None:
    model = tiny_model("mixtral").bfloat16()
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    checkpoint = tmp_path / "checkpoint-1"
    model.save_pretrained(checkpoint)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    for name in ("trainer_state.json", "scheduler.pt"):
        (checkpoint / name).write_text("{}")
    assert load_file(checkpoint / "model.safetensors").keys() != model.state_dict().keys()
    weights = load_file(checkpoint / "model.safetensors")
    for layout in (SHARDED, SINGLE):
        checkpoint = converted(checkpoint, layout, tmp_path / layout, None)
    torch.testing.assert_close(load_file(checkpoint / "model.safetensors"), weights, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optim", [slow("slim_adamw"), "lowmem_adamw_8bit"])
def test_adamw_refuses_our_state_in_every_layout(layout: str, optim: str, tmp_path: Path) -> None:
    folder = three_steps(tmp_path / "ours", optim)
    if layout != SINGLE:
        folder = converted(folder, layout, tmp_path / "converted" / "checkpoint-3", None)
    with pytest.raises(ValueError, match=rf"was written by {optim.removesuffix('_8bit')}, whose state") as refused:
        make_trainer(tmp_path / "theirs", "adamw_torch").train(resume_from_checkpoint=str(folder))
    assert "hf-lowmem convert" in str(refused.value)
    assert ("--to single" in str(refused.value)) == (layout != SINGLE)


def test_what_cannot_be_converted_is_not_advised(tmp_path: Path) -> None:
    folder = three_steps(tmp_path, "adam_mini")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"has the layout single, .* Checkpoints of adapters are not converted: resume"
    ):
        refuse_other_layout(folder, SHARDED)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"has the layout single, and this run reads deepspeed\. Checkpoints of Deep"):
        refuse_other_layout(folder, DEEPSPEED)
    (folder / "optimizer.pt").unlink()
    (folder / "global_step3").mkdir()
    assert layout_of(folder) == DEEPSPEED
    with pytest.raises(ValueError, match="has the layout deepspeed, and this run reads single"):
        make_trainer(tmp_path, "adam_mini").train(resume_from_checkpoint=str(folder))


def test_a_model_alone_is_refused_where_it_cannot_be_read(tmp_path: Path) -> None:
    folder = three_steps(tmp_path, "adam_mini", save_only_model=True)
    with pytest.raises(
        ValueError, match="holds a model alone, and not as full_state_dict, which this run reads: load"
    ):
        refuse_other_layout(folder, FULL)
    refuse_other_layout(folder, SINGLE)
    (folder / "model.safetensors").rename(folder / "pytorch_model_fsdp.bin")
    with pytest.raises(ValueError, match="holds a model alone, and not as single, which this run reads: load"):
        refuse_other_layout(folder, SINGLE)
    refuse_other_layout(folder, FULL)


def test_the_command_of_a_refusal_has_the_options_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "my run" / "checkpoint-3"
    (folder / "optimizer_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="has the layout") as refused:
        refuse_other_layout(folder, SINGLE, "some/model", {"block_size": 64})
    *command, model, of_model, options, of_options = shlex.split(str(refused.value).split("`")[1])
    assert command == ["hf-lowmem", "convert", str(folder), "--to", SINGLE, "--output", "FOLDER"]
    assert (model, of_model, options, of_options) == ("--model", "some/model", "--optim-args", '{"block_size": 64}')


def test_mistakes_are_answered_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = three_steps(tmp_path, "adam_mini")
    sharded = converted(checkpoint, SHARDED, tmp_path / "sharded", None)

    def refused(source: Path, layout: str, *options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(source), "--to", layout, "--output", str(tmp_path / "new"), *options])
        assert stopped.value.code == 2
        assert not [*tmp_path.glob("*new*")]  # nothing unfinished either
        return capsys.readouterr().err.splitlines()[-1]

    assert "has the layout single already" in refused(checkpoint, SINGLE)
    assert "was written under FSDP2: convert it `--to single` first" in refused(sharded, "adamw_torch")
    assert "invalid choice: 'zero3'" in refused(sharded, "zero3")
    theirs = three_steps(tmp_path / "theirs", "adamw_torch")
    assert "was not written by an optim of this package" in refused(theirs, FULL, "--optim", "adamw_torch")
    assert "smmf" in refused(checkpoint, FULL, "--optim", "smmf")
    other = json.loads((sharded / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    assert "'model.layers.1." in refused(sharded, SINGLE, "--model", str(tmp_path / "other"))
    wider = json.loads((sharded / "config.json").read_text()) | {"intermediate_size": 64}
    (tmp_path / "other" / "config.json").write_text(json.dumps(wider))
    assert "size mismatch for model.layers.0.mlp" in refused(sharded, SINGLE, "--model", str(tmp_path / "other"))
    assert "size mismatch for model.layers.0.mlp" in refused(checkpoint, FULL, "--model", str(tmp_path / "other"))
    (sharded / "config.json").unlink()
    assert "name the model's folder or hub id with --model" in refused(sharded, SINGLE)
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    assert "holds no optimizer.pt" in refused(checkpoint, FULL)


@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != SINGLE])
@pytest.mark.parametrize("by_path", [True, False])
def test_a_run_refuses_a_layout_that_it_cannot_read(layout: str, by_path: bool, tmp_path: Path) -> None:
    source = three_steps(tmp_path, "adam_mini")
    folder = converted(source, layout, tmp_path / "fsdp" / "checkpoint-3", None)
    trainer = make_trainer(tmp_path / "fsdp", "adam_mini")
    with pytest.raises(ValueError, match=rf"has the layout {layout}, and this run reads single: .*--to single"):
        trainer.train(resume_from_checkpoint=str(folder) if by_path else True)
