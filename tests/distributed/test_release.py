"""Gradient release on several processes: the weights, state and logs of the plain run on as many processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SUPPORT = ROOT / "tests" / "support"
EIGHT_BITS = {"optim": "slim_adamw_8bit", "optim_args": "min_8bit_size=0,block_size=64"}
KAHAN = {"optim": "factored_adamw", "optim_args": "rounding=kahan", "dtype": "bfloat16"}
NOT_CLIPPED, ACCUMULATED = {"max_grad_norm": 0}, {"gradient_accumulation_steps": 2}
RUNS = [
    pytest.param({"sharded": True, **EIGHT_BITS}, id="fsdp2"),
    pytest.param({"sharded": True, **KAHAN, **NOT_CLIPPED}, id="fsdp2-not-clipped"),
    pytest.param(
        {"sharded": True, "optim": "micro_adam", "optim_args": "rounding=nearest", **ACCUMULATED}, id="whole"
    ),
    pytest.param({"sharded": False, **KAHAN}, id="ddp"),
    pytest.param({"sharded": False, **EIGHT_BITS, **ACCUMULATED}, id="ddp-accumulated"),
]


def launch(processes: int, script: str, *arguments: str, sharded: bool = False) -> None:
    folders = [str(SUPPORT / "fsdp_on_cpu")] if sharded else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*folders, str(ROOT)])}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run(
        [sys.executable, *command, str(SUPPORT / script), *arguments], check=True, env=environment, capture_output=True
    )


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["slim_adamw_8bit", "coap_adamw"])
def test_a_loop_under_ddp_is_the_plain_one(name: str, processes: int) -> None:
    launch(processes, "released_replicas.py", name)


@pytest.mark.parametrize("options", RUNS)
def test_a_trainers_run_is_the_plain_one(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for extra in ("", ",release=true"):
        folder = tmp_path / f"run{extra}"
        given = {**options, "optim_args": options["optim_args"] + extra, "max_steps": 4, "save_strategy": "no"}
        folder.mkdir()
        launch(2, "fsdp_script.py", str(folder), json.dumps(given), sharded=options["sharded"])
        found.append(torch.load(folder / "2-4.pt"))
    plain, released = found
    torch.testing.assert_close(released["weights"], plain["weights"], rtol=0, atol=0)
    torch.testing.assert_close(released["state"], plain["state"], rtol=0, atol=0)
    keys = ("loss", "grad_norm", "learning_rate", "lost_updates")
    logs = [[{key: entry[key] for key in keys if key in entry} for entry in run["log"]] for run in found]
    assert logs[0] == logs[1]
    assert all(entry["grad_norm"] > 0 for entry in logs[0] if "loss" in entry)
