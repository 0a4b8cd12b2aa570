"""A checkpoint that was cut short is passed over, and training resumes from the last whole one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

import hf_lowmem
from hf_lowmem.trainer.checkpoints import last_whole_checkpoint


def write_checkpoint(output_dir, step):
    folder = output_dir / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    weights = {f"layer{i}.weight": torch.randn(16, 16) for i in range(2)}
    for number, (name, weight) in enumerate(weights.items(), start=1):
        save_file({name: weight}, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    shards = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(weights, start=1)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.randn(64), "name": name}, folder / name)
    torch.save([1, 2], folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}, indent=2))
    return folder


FILES = sorted(
    str(name)
    for name in """optimizer.pt scheduler.pt rng_state.pth training_args.bin trainer_state.json
    model-00001-of-00002.safetensors model.safetensors.index.json adapter/adapter_model.safetensors""".split()
)


@pytest.fixture
def output_dir(tmp_path):
    for step in (9, 10):
        write_checkpoint(tmp_path, step)
    return tmp_path


def test_the_newest_whole_checkpoint_is_transformers_choice(output_dir, caplog):
    (output_dir / "checkpoint-11").write_text("a file")
    (output_dir / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(str(output_dir)) == get_last_checkpoint(str(output_dir))
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-10")
    assert not caplog.text


def test_no_checkpoint_is_none_and_no_folder_an_error(tmp_path):
    assert last_whole_checkpoint(str(tmp_path)) is None
    with pytest.raises(FileNotFoundError):
        last_whole_checkpoint(str(tmp_path / "missing"))


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_is_seen(output_dir, file, left, caplog):
    path = output_dir / "checkpoint-10" / file
    os.truncate(path, int(path.stat().st_size * left))
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert f"Passing over the incomplete checkpoint {output_dir / 'checkpoint-10'}: {file} is cut short" in caplog.text


@pytest.mark.parametrize("file", ["trainer_state.json", "model-00002-of-00002.safetensors"])
def test_a_missing_file_is_seen(output_dir, file, caplog):
    (output_dir / "checkpoint-10" / file).unlink()
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert file in caplog.text


def test_a_distributed_checkpoint_without_its_metadata_is_seen(output_dir, caplog):
    folder = output_dir / "checkpoint-10" / "optimizer_0"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"data")
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert "optimizer_0 has no .metadata" in caplog.text
    (folder / ".metadata").write_bytes(b"data")
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-10")


def test_none_is_whole(output_dir):
    for step in (9, 10):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(str(output_dir)) is None


def make_trainer(output_dir):
    """A tiny Llama that sees eight samples of noise in three epochs, saving every second of six steps."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    hf_lowmem.register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            attention_dropout=0.1,
        )
    )
    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        optim="slim_adamw_8bit",
        optim_args="min_8bit_size=1024",
        learning_rate=1e-2,
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])


def train_and_die_while_saving(output_dir):
    """Train until the second checkpoint's optimizer.pt is half written, and die as a machine does."""
    save = torch.save

    def save_half(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
    make_trainer(output_dir).train()


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_bit_for_bit(tmp_path, caplog):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.run([sys.executable, __file__, str(killed)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert get_last_checkpoint(str(killed)) == str(killed / "checkpoint-4")  # what the Trainer alone would take

    make_trainer(killed).train(resume_from_checkpoint=True)
    assert "checkpoint-4: trainer_state.json, which is written last, is missing" in caplog.text
    make_trainer(whole).train()
    for file in ("model.safetensors", "optimizer.pt"):
        resumed, expected = (folder / "checkpoint-6" / file for folder in (killed, whole))
        assert resumed.read_bytes() == expected.read_bytes(), file


if __name__ == "__main__":
    train_and_die_while_saving(Path(sys.argv[1]))
