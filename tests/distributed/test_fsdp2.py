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

from tests import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SUPPORT = ROOT / "tests" / "support"
SCRIPT = SUPPORT / "fsdp_script.py"
FULL, CUT = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
RUNS = [
    pytest.param({"optim": "slim_adamw_8bit", "optim_args": "min_8bit_size=0,block_size=64"}, CUT, id="8bit"),
    pytest.param({"optim": "factored_adamw", "optim_args": "rounding=kahan", "dtype": "bfloat16"}, FULL, id="kahan"),
    pytest.param({"optim": "micro_adam", "optim_args": "fused_clip=true"}, CUT, id="gathered"),
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT / "fsdp_on_cpu"), str(ROOT)]))


def launch(folder: Path, processes: int, **options: Any) -> dict[str, Any]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(SCRIPT)]
    subprocess.run([sys.executable, *command, str(folder), json.dumps(options)], check=True)
    found: dict[str, Any] = torch.load(folder / f"{processes}-{options['max_steps']}.pt")
    return found


@pytest.mark.parametrize(("options", "kind"), RUNS)
def test_any_number_of_processes_resumes_a_run(options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    options = {**options, "fsdp_config": {"state_dict_type": kind}}
    whole_run = launch(tmp_path, 2, max_steps=4, **options)
    assert [entry["loss"] for entry in whole_run["log"] if "loss" in entry][-1] < 5
    shutil.rmtree(tmp_path / "checkpoint-4")  # `resume` finds the newest whole one
    resumed = launch(tmp_path, 2, max_steps=4, resume=True, **options)
    torch.testing.assert_close(resumed["weights"], whole_run["weights"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["state"], whole_run["state"], rtol=0, atol=0)
    shutil.rmtree(tmp_path / "checkpoint-4")
    loaded = [
        launch(tmp_path, number, max_steps=3, resume=True, only_loads=True, **options) for number in (2, 1, 3, 4)
    ]
    for other in loaded[1:]:
        torch.testing.assert_close(other["weights"], loaded[0]["weights"], rtol=0, atol=0)
        torch.testing.assert_close(other["state"], loaded[0]["state"], rtol=0, atol=0)
    assert all(state["step"] == 2 for state in loaded[0]["state"].values())
    moments = [each for state in loaded[0]["state"].values() for key, each in state.items() if "exp_avg" in key]
    assert all(moment.any() for moment in moments)
