"""DeepSpeed ZeRO through the Trainer on two CPU processes: AdamW's losses, and a resumed run is the one that went on.

DeepSpeed is not installed with the package: `pip install deepspeed` runs these tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def losses(folder: Path, optim: str, stage: int, steps: int = 4, resume: bool = False) -> list[Any]:
    script = ROOT / "tests" / "support" / "deepspeed_script.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(folder), optim]
    subprocess.run([sys.executable, *command, str(stage), str(steps), str(resume)], check=True)
    log = json.loads((folder / f"{optim}-{stage}-{steps}-{resume}.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_and_resumes(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    expected = losses(tmp_path / "adamw", "adamw_torch", stage)
    for optim in ("lowmem_adamw", "signum"):
        whole_run = losses(tmp_path / optim, optim, stage)
        if optim == "lowmem_adamw":
            assert whole_run == pytest.approx(expected, abs=1e-5)
        shutil.rmtree(tmp_path / optim / "checkpoint-4")
        assert losses(tmp_path / optim, optim, stage, resume=True) == whole_run
