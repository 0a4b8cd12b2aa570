"""FSDP2 through the Trainer: a resumed run is the one that went on, and any number of processes loads a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowmem.cli import main
from tests import ROOT
from tests.support.fsdp_script import llama

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SUPPORT = ROOT / "tests" / "support"
SCRIPT = SUPPORT / "fsdp_script.py"
FULL, CUT = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
RUNS = [
    pytest.param(
        {"optim": "slim_adamw_8bit", "optim_args": "min_8bit_size=0,block_size=64"}, CUT, (1, 3, 4), id="8bit"
    ),
    pytest.param(
        {"optim": "factored_adamw", "optim_args": "rounding=kahan", "dtype": "bfloat16"}, FULL, (3,), id="kahan"
    ),
    pytest.param({"optim": "micro_adam", "optim_args": "fused_clip=true"}, CUT, (1,), id="gathered"),
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT / "fsdp_on_cpu"), str(ROOT)]))


def launch(folder: Path, processes: int, **options: Any) -> dict[str, Any]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(SCRIPT)]
    subprocess.run(
        [sys.executable, *command, str(folder), json.dumps(options)], check=True, stderr=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = torch.load(folder / f"{processes}-{options['max_steps']}.pt")
    return found


@pytest.mark.parametrize(("options", "kind", "others"), RUNS)
def test_any_number_of_processes_resumes_a_run(
    options: dict[str, Any], kind: str, others: tuple[int, ...], tmp_path: Path
) -> None:
    options = {**options, "fsdp_config": {"state_dict_type": kind}}
    llama().save_pretrained(tmp_path / "config")
    whole_run = launch(tmp_path, 2, max_steps=4, **options)
    assert [entry["loss"] for entry in whole_run["log"] if "loss" in entry][-1] < 5
    shutil.rmtree(tmp_path / "checkpoint-4")  # `resume` finds the newest whole one
    resumed = launch(tmp_path, 2, max_steps=4, resume=True, **options)
    torch.testing.assert_close(resumed["weights"], whole_run["weights"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["state"], whole_run["state"], rtol=0, atol=0)
    shutil.rmtree(tmp_path / "checkpoint-4")
    loaded = [
        launch(tmp_path, number, max_steps=3, resume=True, only_loads=True, **options) for number in (2, *others)
    ]
    loaded += converted(tmp_path / "checkpoint-2", kind.lower(), tmp_path, options)
    for other in loaded[1:]:
        torch.testing.assert_close(other["weights"], loaded[0]["weights"], rtol=0, atol=0)
        torch.testing.assert_close(other["state"], loaded[0]["state"], rtol=0, atol=0)
    assert all(state["step"] == 2 for state in loaded[0]["state"].values())
    moments = [each for state in loaded[0]["state"].values() for key, each in state.items() if "exp_avg" in key]
    assert all(moment.any() for moment in moments)


def converted(checkpoint: Path, kind: str, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is loaded where a checkpoint is converted for one process, and from there for FSDP2 again."""
    found = []
    for layout, processes in (("single", 1), (kind, 2)):
        output = folder / layout / "checkpoint-2"
        argv = ["convert", str(checkpoint), "--to", layout, "--output", str(output), "--optim-args"]
        assert main([*argv, options["optim_args"], "--model", str(folder / "config")]) == 0
        runs = {"resume": str(output), "only_loads": True, "sharded": layout != "single"}
        found.append(launch(folder / layout, processes, max_steps=3, **{**options, **runs}))
        checkpoint = output
    return found


def test_a_checkpoint_of_one_process_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    launch(tmp_path, 1, max_steps=2, optim="adam_mini", sharded=False)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        launch(tmp_path, 2, max_steps=4, optim="adam_mini", resume=True, fsdp_config={"state_dict_type": CUT})
    assert "--to sharded_state_dict --output FOLDER` writes one that it resumes from" in failed.value.stderr
