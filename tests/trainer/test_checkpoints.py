"""A checkpoint that was cut short is passed over, and training resumes from the last whole one."""

import json
import os
import re
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
from hf_lowmem.trainer.checkpoints import last_whole_checkpoint, refuse_incomplete


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
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"name": name, "vocabulary": ["a", "b"]}, indent=2))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}, indent=2))
    return folder


FILES = sorted(
    str(name)
    for name in """optimizer.pt scheduler.pt rng_state.pth training_args.bin trainer_state.json
    model-00001-of-00002.safetensors model.safetensors.index.json adapter/adapter_model.safetensors config.json
    generation_config.json tokenizer.json tokenizer_config.json""".split()
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
    what = "is cut short" if path.stat().st_size else "is empty"
    assert f"Passing over the incomplete checkpoint {output_dir / 'checkpoint-10'}: {file} {what}" in caplog.text


@pytest.mark.parametrize("file", [*FILES, "legacy.pt", "tokenizer.model", "vocab.txt"])
def test_a_file_of_zeros_is_seen(output_dir, file, caplog):
    """A machine that died before the pages reached the disk leaves the size, and zeros."""
    path = output_dir / "checkpoint-10" / file
    path.write_bytes(bytes(path.stat().st_size))
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert f"{file} holds nothing but zeros" in caplog.text


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith((".pt", ".pth", ".bin"))])
@pytest.mark.parametrize("part", ["contents", "first page", "one byte", "last page"])
def test_a_torch_file_that_lost_some_pages_is_seen(output_dir, file, part, caplog):
    """torch loads zeros in place of numbers from it without a word."""
    path = output_dir / "checkpoint-10" / file
    torch.save({"state": torch.randn(4096), "name": file}, path)
    content = bytearray(path.read_bytes())
    at = content.index(torch.load(path, weights_only=True)["state"].numpy().tobytes())
    start, stop = {
        "contents": (at, at + 16384),
        "first page": (0, 512),
        "one byte": (at + 7, at + 8),
        "last page": (len(content) - 512, len(content)),
    }[part]
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert f"{file} is {'cut short' if part == 'last page' else 'damaged'}" in caplog.text


def test_a_model_of_zeros_is_seen(output_dir, caplog):
    path = output_dir / "checkpoint-10" / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1024] + bytes(1024))
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert f"{path.name} is cut short" in caplog.text


def test_files_that_are_whole_in_their_own_way(output_dir, caplog):
    folder = output_dir / "checkpoint-10"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state": torch.randn(64)}, folder / "optimizer.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (folder / "metrics.json").write_text('{"loss": 1.0}\n{"loss": 0.5}\n')
    (folder / "numbers.json").write_text("[1, 2]")
    (folder / ".gitkeep").touch()
    (folder / "notes.txt").touch()
    (folder / "own.bin").write_bytes(b"another format")
    assert last_whole_checkpoint(str(output_dir)) == str(folder)
    assert not caplog.text


@pytest.mark.parametrize("content", ["null", "3", '["a"]'])
@pytest.mark.parametrize("file", ["trainer_state.json", "config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_seen(output_dir, file, content):
    (output_dir / "checkpoint-10" / file).write_text(content)
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")


@pytest.mark.parametrize(("file", "other"), [("optimizer.pt", "scheduler.pt"), ("scheduler.pt", "optimizer.pt")])
def test_an_optimizer_and_a_scheduler_go_together(output_dir, file, other, caplog):
    """The Trainer would start both anew, in silence; who wants that deletes both."""
    folder = output_dir / "checkpoint-10"
    (folder / file).unlink()
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert f"{file} is missing (to start the optimizer and its schedule anew, delete {other} too)" in caplog.text
    (folder / other).unlink()
    assert last_whole_checkpoint(str(output_dir)) == str(folder)


@pytest.mark.parametrize("optimizer", ["optimizer.bin", "optimizer_0", "global_step10", "rank0-of-2-optimizer.pt"])
def test_other_ways_to_keep_an_optimizer(output_dir, optimizer):
    """FSDP's, DeepSpeed's and XLA's."""
    folder = output_dir / "checkpoint-10"
    (folder / "optimizer.pt").unlink()
    if "." in optimizer:
        torch.save({"state": torch.randn(4)}, folder / optimizer)
    else:
        (folder / optimizer).mkdir()
    assert last_whole_checkpoint(str(output_dir)) == str(folder)


def test_a_checkpoint_without_weights_is_seen(output_dir, caplog):
    for path in (output_dir / "checkpoint-10").rglob("*"):
        if path.suffix == ".safetensors" or path.name in ("model.safetensors.index.json", "legacy.pt"):
            path.unlink()
    assert last_whole_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-9")
    assert "it holds no weights" in caplog.text


# -- a checkpoint named by its path -----------------------------------------------------------------------------------


def test_a_whole_one_is_taken(output_dir):
    refuse_incomplete(str(output_dir / "checkpoint-10"))
    refuse_incomplete(output_dir / "checkpoint-9")


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("optimizer.pt", lambda path: os.truncate(path, 100), "optimizer.pt is cut short"),
        ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
        ("config.json", lambda path: os.truncate(path, 10), "config.json is cut short"),
        ("rng_state.pth", lambda path: os.truncate(path, 0), "rng_state.pth is empty"),
        ("trainer_state.json", Path.unlink, "trainer_state.json, which is written last, is missing"),
        ("model-00001-of-00002.safetensors", Path.unlink, "model-00001-of-00002.safetensors, which model.safe"),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_one_that_is_not_is_answered_with_one_that_is(output_dir, file, damage, reason, slash):
    damage(output_dir / "checkpoint-10" / file)
    named = str(output_dir / "checkpoint-10") + slash
    with pytest.raises(ValueError, match="cannot be resumed from") as error:
        refuse_incomplete(named)
    assert reason in str(error.value)
    assert repr(named) in str(error.value)
    assert str(output_dir / "checkpoint-9") in str(error.value)
    assert "\n" not in str(error.value)


def test_none_beside_it_is_whole(output_dir, tmp_path, monkeypatch):
    for step in (9, 10):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint beside it is whole"):
        refuse_incomplete(output_dir / "checkpoint-9")
    for missing in (output_dir / "checkpoint-3", tmp_path / "no" / "such"):
        with pytest.raises(ValueError, match="there is no such folder; no checkpoint beside it is whole"):
            refuse_incomplete(missing)
    monkeypatch.chdir(output_dir)
    write_checkpoint(output_dir, 8)
    with pytest.raises(ValueError, match=re.escape(f"resume from {output_dir / 'checkpoint-8'}")):
        refuse_incomplete("checkpoint-9")


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


def make_trainer(output_dir, **options):
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
        **options,
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


@pytest.mark.parametrize("named", [str, Path])
def test_the_trainer_answers_for_a_path(tmp_path, named):
    make_trainer(tmp_path).train()
    os.truncate(tmp_path / "checkpoint-4" / "optimizer.pt", 1000)
    trainer = make_trainer(tmp_path)
    before = [param.clone() for param in trainer.model.parameters()]
    message = "checkpoint-4' cannot be resumed from: optimizer.pt is cut short; resume from .*checkpoint-6, the newest"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=named(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=message):
        trainer.train(named(tmp_path / "checkpoint-4"))
    assert all(map(torch.equal, before, trainer.model.parameters()))
    trainer.train(resume_from_checkpoint=named(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6
    trainer.train(resume_from_checkpoint=False)


def test_a_run_that_saves_the_model_only_resumes(tmp_path):
    make_trainer(tmp_path, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    for asked in (str(tmp_path / "checkpoint-4"), True):
        trainer = make_trainer(tmp_path / "more" if asked is not True else tmp_path, save_only_model=True)
        trainer.train(resume_from_checkpoint=asked)
        assert trainer.state.global_step == 6


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
