"""`optim_args="release=true"` through the Trainer: the same losses, norms and state as without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

from hf_lowmem.trainer.names import OPTIM_NAMES
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.slow import slow
from tests.support.small_trainer import StopAt, make_trainer

PLAIN = {"max_grad_norm": 0.0}
CLIPPED = {"max_grad_norm": 0.1}
ACCUMULATED = {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def run(output: Path, optim: str, options: str, resume: bool = False, **arguments: Any) -> Any:
    trainer = make_trainer(output, optim, options, **arguments)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def assert_same(trainer: Any, other: Any) -> None:
    own, others = dict(trainer.model.named_parameters()), dict(other.model.named_parameters())
    state, states = trainer.optimizer.optimizer.state, other.optimizer.optimizer.state
    for name, param in own.items():
        torch.testing.assert_close(others[name], param, rtol=0, atol=0)
        torch.testing.assert_close(states[others[name]], state[param], rtol=0, atol=0)
    keys = ("loss", "grad_norm", "learning_rate", "lost_updates")
    logs = [[{key: log[key] for key in keys if key in log} for log in t.state.log_history] for t in (trainer, other)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("arguments", [PLAIN, CLIPPED, ACCUMULATED], ids=["plain", "clipped", "accumulated"])
@pytest.mark.parametrize(
    "optim",
    ["slim_adamw_8bit", *map(slow, ("coap_adamw", "micro_adam"))],
)
def test_a_run_and_its_log_are_those_without_release(optim: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    kept = run(tmp_path / "kept", optim, "rounding=kahan", dtype=torch.bfloat16, **arguments)
    released = run(tmp_path / "released", optim, "rounding=kahan,release=true", dtype=torch.bfloat16, **arguments)
    assert any("lost_updates" in log for log in kept.state.log_history)
    assert all(log["grad_norm"] > 0.1 for log in kept.state.log_history if "grad_norm" in log)
    assert_same(kept, released)
    assert released.optimizer.optimizer.gradient_release is None  # training is over


@pytest.mark.parametrize("reentrant", [None, False, slow(True)])
@pytest.mark.parametrize("arguments", [CLIPPED, slow(PLAIN)], ids=["clipped", "plain"])
@pytest.mark.parametrize("optim", ["slim_adamw_8bit", slow("coap_adamw"), slow("lowmem_adamw")])
def test_two_backward_passes_take_the_clipped_steps(
    optim: str, arguments: dict[str, Any], reentrant: bool | None, tmp_path: Path
) -> None:
    options = "rounding=stochastic"
    arguments = {**arguments, "dtype": torch.bfloat16}
    if reentrant is not None:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    trainers = [
        make_trainer(tmp_path / str(number), optim, given, **arguments)
        for number, given in enumerate((options, f"{options},release=true,clip=recompute"))
    ]
    for trainer in trainers:
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2  # both passes drop the same
        set_seed(0)
        trainer.train()
    assert_same(*trainers)


@pytest.mark.parametrize("arguments", [PLAIN, CLIPPED], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("adam_mini_8bit", "min_8bit_size=0"),
        ("slim_adamw", "rules=auto,calibration_steps=4"),
        ("factored_adamw_8bit", "min_8bit_size=0,clip=recompute"),
    ],
)
def test_a_resumed_run_is_the_one_that_went_on(
    optim: str, options: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(tmp_path, optim, f"{options},release=true", **arguments)
    shutil.rmtree(tmp_path / "checkpoint-6")
    shutil.rmtree(tmp_path / "checkpoint-8", ignore_errors=True)
    resumed = run(tmp_path, optim, f"{options},release=true", resume=True, **arguments)
    assert resumed.state.log_history[0]["loss"] == whole.state.log_history[0]["loss"]
    assert_same(whole, resumed)


def test_a_checkpoint_goes_on_with_and_without_release(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "factored_adamw", "rounding=nearest", **CLIPPED)
    first = make_trainer(tmp_path / "moved", "factored_adamw", "release=true", **CLIPPED)
    first.add_callback(StopAt())
    first.train()
    resumed = run(tmp_path / "moved", "factored_adamw", "rounding=nearest", resume=True, **CLIPPED)
    for param, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, param, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "arguments", "sentence"),
    [
        ("clip=none", CLIPPED, r"clip=none does not clip to max_grad_norm=0\.1: use clip=host"),
        ("clip=previous", ACCUMULATED, r"clip=previous does not add up gradients over gradient_accumulation_steps=2"),
        (
            "clip=recompute",
            ACCUMULATED,
            r"clip=recompute does not add up gradients over gradient_accumulation_steps",
        ),
        ("clip=recompute", {**CLIPPED, "torch_compile": True}, r"clip=recompute does not go with torch_compile=True"),
        (
            "clip=sometimes",
            PLAIN,
            r"clip='sometimes' is not legal: expected one of auto, none, host, recompute",
        ),
        ("offload_state=true", PLAIN, r"offload_state=true does not go with release=true"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(
    options: str, arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(tmp_path, "slim_adamw", f"release=true,{options}", **arguments)


def test_an_interrupted_run_does_not_step_in_the_next_one(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, "slim_adamw", "release=true", **ACCUMULATED)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.optimizer.optimizer.gradient_release is None
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.model(**trainer.data_collator([trainer.train_dataset[0]])).loss.backward()
    assert all(map(torch.equal, trainer.model.parameters(), before))
    trainer.pop_callback(Interrupts)
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("name", OPTIM_NAMES)
def test_every_name_has_a_layerwise_form(name: str) -> None:
    recipe = recipe_for(f"{name}_layerwise")
    assert recipe.release
    assert recipe == recipe_for(name, "release=true")


def test_a_layerwise_name_releases_gradients_and_resumes(tmp_path: Path) -> None:
    whole = run(tmp_path, "slim_adamw_8bit_layerwise", "min_8bit_size=0", **CLIPPED)
    assert whole.args.optim == "slim_adamw_8bit_layerwise"
    assert all(group["release"] for group in whole.optimizer.param_groups)
    args = torch.load(tmp_path / "checkpoint-8" / "training_args.bin", weights_only=False)
    assert args.optim.value == "slim_adamw_8bit_layerwise"
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert_same(whole, run(tmp_path, "slim_adamw_8bit_layerwise", "min_8bit_size=0", resume=True, **CLIPPED))
    with pytest.raises(ValueError, match=r"release=false contradicts the optim name 'signum_layerwise': leave it out"):
        recipe_for("signum_layerwise", "release=false")
    with pytest.raises(ValueError, match=r"Unknown optim name 'smfm_layerwise'; the nearest names: smmf_layerwise"):
        recipe_for("smfm_layerwise")


def test_clipping_by_the_norm_before_says_that_it_is_not_exact(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(tmp_path, "slim_adamw", "release=true,clip=previous", **CLIPPED)
    assert sum("is not exact" in record.message for record in caplog.records) == 1
    assert trainer.state.log_history[-2]["grad_norm"] > 0
