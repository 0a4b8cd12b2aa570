"""`hf-lowmem sft` and `dpo` with our FSDP2 configuration on two processes: a resumed run is the one that went on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file

from tests import ROOT
from tests.support.trl_trainers import DATA, MODELS, MOE, save_model

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CONFIG = ROOT / "scripts" / "recipes" / "accelerate" / "fsdp2.yaml"
CUT = "--fsdp_state_dict_type SHARDED_STATE_DICT"
RUNS = {  # the task and the model, the options
    "sft llama": f"--bf16 true --gradient_checkpointing false --fsdp_activation_checkpointing true {CUT}",
    "sft qwen3": "--bf16 false --dtype bfloat16 --optim_args rounding=stochastic",
    "sft mixtral": "--bf16 true --dtype bfloat16 --optim factored_adamw_8bit",
    "dpo llama": "--bf16 false --use_peft true --lora_r 8 --optim adam_mini_8bit --optim_args min_8bit_size=0",
    "dpo qwen3": f"--bf16 true {CUT}",
    "dpo mixtral": "--bf16 false --max_grad_norm 0.1 --gradient_accumulation_steps 2",
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "support" / "fsdp_on_cpu"), str(ROOT)]))


@pytest.mark.parametrize(("run", "options"), RUNS.items())
def test_a_resumed_run_is_the_one_that_went_on(run: str, options: str, tmp_path: Path) -> None:
    task, model = run.split()
    rows = DATA["preference" if task == "dpo" else "messages"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_model((MODELS | MOE)[model], tmp_path / model)
    command = [
        *f"-m hf_lowmem {task} --accelerate_config {CONFIG} --dataset_name {tmp_path}/rows.jsonl".split(),
        *f"--model_name_or_path {folder} --output_dir {tmp_path}/out".split(),
        *"--max_steps 3 --save_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-2".split(),
        *"--logging_steps 1 --use_cpu true --report_to none".split(),
        *options.split(),
    ]
    subprocess.run([sys.executable, *command], check=True)
    whole_run, losses = weights(tmp_path / "out"), logged(tmp_path / "out")
    assert losses[-1] < losses[0]
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    subprocess.run([sys.executable, *command, "--resume_from_checkpoint", "True"], check=True)
    torch.testing.assert_close(weights(tmp_path / "out"), whole_run, rtol=0, atol=0)
    assert logged(tmp_path / "out") == losses


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole weights of the last checkpoint."""
    checkpoint = folder / "checkpoint-3"
    if (pieces := checkpoint / "pytorch_model_fsdp_0").is_dir():
        merge_fsdp_weights(str(pieces), str(folder / "merged"))
        checkpoint = folder / "merged"
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


def logged(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"]]
