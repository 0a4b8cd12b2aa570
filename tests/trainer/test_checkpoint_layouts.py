"""Checkpoints of one process become FSDP2's and come back with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_lowmem.cli import main
from hf_lowmem.trainer.checkpoint_layouts import FULL, LAYOUTS, SHARDED, SINGLE, layout_of
from tests.support.small_trainer import make_trainer, three_steps

RUNS = [
    ("slim_adamw_8bit", "min_8bit_size=0", torch.float32),
    ("factored_adamw", "rounding=kahan", torch.bfloat16),
    ("coap_adamw_8bit", "rank=8,min_8bit_size=0", torch.float32),
    ("micro_adam", None, torch.bfloat16),
    ("smmf", None, torch.float32),
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


def test_mistakes_are_answered_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = three_steps(tmp_path, "adam_mini")
    sharded = converted(checkpoint, SHARDED, tmp_path / "sharded", None)

    def refused(source: Path, layout: str, *options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(source), "--to", layout, "--output", str(tmp_path / "new"), *options])
        assert stopped.value.code == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "has the layout single already" in refused(checkpoint, SINGLE)
    assert "was written under FSDP2: convert it `--to single` first" in refused(sharded, "adamw_torch")
    assert "invalid choice: 'zero3'" in refused(sharded, "zero3")
    assert "smmf" in refused(checkpoint, FULL, "--optim", "smmf")
    other = json.loads((sharded / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    assert "'model.layers.1." in refused(sharded, SINGLE, "--model", str(tmp_path / "other"))
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
