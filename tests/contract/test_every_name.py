"""What every optim name promises, through the real Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_lowmem
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.slow import fast_only, slow

NAMES = hf_lowmem.optim_names()
Make = Callable[..., Trainer]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    return trainer.optimizer.optimizer


def states(trainer: Trainer) -> list[dict[str, torch.Tensor]]:
    return [inner(trainer).state[p] for group in inner(trainer).param_groups for p in group["params"]]


def assert_same_run(mine: Trainer, theirs: Trainer) -> None:
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states(mine), states(theirs), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def resumes_bit_exactly(
    make_trainer: Make, tmp_path: Path, optim: str, saved_at: int = 3, **arguments: object
) -> Trainer:
    whole = make_trainer(optim, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    stopped = make_trainer(optim, save_strategy="steps", save_steps=saved_at, **arguments)
    stopped.add_callback(StopAt(saved_at))
    stopped.train()
    resumed = make_trainer(optim, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_same_run(whole, resumed)
    return stopped


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float32)], ids=str)
@pytest.mark.parametrize("optim", NAMES)
def test_resume_is_bit_exact(optim: str, dtype: torch.dtype, make_trainer: Make, tmp_path: Path) -> None:
    stopped = resumes_bit_exactly(make_trainer, tmp_path, optim, dtype=dtype)

    saved = torch.load(tmp_path / "out" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    plain = (str, int, float, bool, type(None), tuple, list)
    assert all(isinstance(t, torch.Tensor) for state in saved["state"].values() for t in state.values())
    assert all(isinstance(value, plain) for group in saved["param_groups"] for value in group.values())

    explanation = hf_lowmem.explain(stopped.model, optim)
    measured = sum(t.untyped_storage().nbytes() for state in states(stopped) for t in state.values())
    assert measured == explanation.nbytes
    names = {id(param): name for name, param in stopped.model.named_parameters()}
    rows = {row.name: row for row in explanation.rows}
    for param, state in inner(stopped).state.items():
        row = rows[names[id(param)]]
        declared = {name: (shape, getattr(torch, kind)) for name, (shape, kind) in row.state.items()}
        assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == declared


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize(
    "optim", ["slim_adamw_8bit", *map(slow, ("adam_mini", "coap_adamw_8bit", "coap_adafactor", "soap"))]
)
def test_resume_of_rounded_weights_is_bit_exact(optim: str, rounding: str, make_trainer: Make, tmp_path: Path) -> None:
    arguments = dict(dtype=torch.bfloat16, learning_rate=1e-4, optim_args=f"rounding={rounding}")
    stopped = resumes_bit_exactly(make_trainer, tmp_path, optim, **arguments)
    kept = [state["kahan_comp"] for state in states(stopped) if "kahan_comp" in state]
    assert len(kept) == (len(states(stopped)) if rounding == "kahan" else 0)
    assert all(comp.any() for comp in kept)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in NAMES if not name.endswith("8bit")])
def test_resume_is_bit_exact_with_bfloat16_moments(algorithm: str, make_trainer: Make, tmp_path: Path) -> None:
    resumes_bit_exactly(make_trainer, tmp_path, algorithm, optim_args="state_bits=16", dtype=torch.bfloat16)


PROJECTED = {
    "coap": "rank_ratio=2,update_interval=2,reproject_factor=2,min_8bit_size=0",
    "soap": "precondition_frequency=2,min_8bit_size=0",
}


@pytest.mark.parametrize("saved_at", [slow(3), 4, slow(5)])
@pytest.mark.parametrize(
    "optim",
    fast_only([name for name in NAMES if name[:4] in PROJECTED], ("coap_adamw_8bit", "coap_adafactor", "soap")),
)
def test_resume_is_bit_exact_across_a_change_of_basis(
    optim: str, saved_at: int, make_trainer: Make, tmp_path: Path
) -> None:
    """COAP corrects its basis before step 3 and recomputes it before step 5; SOAP changes it after steps 3 and 5."""
    arguments = dict(optim_args=PROJECTED[optim[:4]], dtype=torch.bfloat16 if saved_at == 4 else torch.float32)
    stopped = resumes_bit_exactly(make_trainer, tmp_path, optim, saved_at=saved_at, **arguments)
    projected = [state for state in states(stopped) if any(name.startswith("proj") for name in state)]
    assert len(projected) == 14
    if optim.endswith("8bit"):
        assert all(state["exp_avg"].dtype == torch.uint8 for state in projected)


def test_a_resumed_run_may_change_when_the_basis_changes(make_trainer: Make) -> None:
    before, after = "update_interval=2,scale=0.5", "update_interval=3,scale=1,restore_state=true"
    make_trainer("coap_adamw", optim_args=before, max_steps=3, save_strategy="steps", save_steps=3).train()
    resumed = make_trainer("coap_adamw", optim_args=after)
    resumed.train(resume_from_checkpoint=True)
    for group in inner(resumed).param_groups:
        assert (group["update_interval"], group["scale"], group["restore_state"]) == (3, 1.0, True)
        assert all(inner(resumed).state[p]["step"] == 6 for p in group["params"])


@pytest.mark.parametrize("optim", NAMES)
def test_every_parameter_is_in_one_group_with_the_trainers_decay(optim: str, make_trainer: Make) -> None:
    trainer = make_trainer(optim)
    trainer.create_optimizer()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    found = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if name in decayed else 0.0 for name, p in trainer.model.named_parameters()}
    assert found == expected
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(expected)
    assert all(group["params"] for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("optim", NAMES)
def test_build_optimizer_is_the_trainers(optim: str, make_trainer: Make) -> None:
    trainer = make_trainer(optim)
    trainer.create_optimizer()
    twin = hf_lowmem.build_optimizer(trainer.model, optim, lr=1e-3, weight_decay=0.1)
    assert type(twin) is type(trainer.optimizer)

    def plain(groups: list) -> list:
        return [{**g, "params": [id(p) for p in g["params"]]} for g in groups]

    assert plain(twin.param_groups) == plain(trainer.optimizer.param_groups)


@pytest.mark.parametrize("optim", fast_only(NAMES, [name for name in NAMES if not name.endswith("8bit")]))
def test_trains(optim: str, make_trainer: Make) -> None:
    """The loss falls on data that can be learnt by heart."""
    lr = {"signum": 1e-3, "micro_adam": 1e-2}.get(recipe_for(optim).algorithm, 3e-3)
    trainer = make_trainer(optim, max_steps=24, learning_rate=lr, logging_steps=6)
    trainer.train_dataset = trainer.train_dataset[:4]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("optim", NAMES)
def test_cuda_steps_as_the_cpu_does(optim: str, make_trainer: Make) -> None:
    """Up to sums in another order, which turn steps of entries that are almost zero, and SOAP's in all directions that
    the gradient does not have. A basis has the signs that the linear algebra library gives it."""
    runs = []
    for use_cpu in (True, False):
        runs.append(make_trainer(optim, max_steps=3, optim_args="min_8bit_size=0", use_cpu=use_cpu))
        start = [param.detach().to("cpu", copy=True) for param in runs[-1].model.parameters()]
        runs[-1].train()
    cpu, cuda = runs
    for before, mine, theirs in zip(start, cuda.model.parameters(), cpu.model.parameters(), strict=True):
        assert (mine.cpu() - theirs).norm() <= (0.8 if "soap" in optim else 0.1) * (theirs - before).norm()
    for mine, theirs in zip(states(cuda), states(cpu), strict=True):
        assert mine.keys() == theirs.keys()
        if "proj_count" in mine:
            continue
        for name, value in mine.items():
            off = (value.cpu().float() - theirs[name].float()).abs()
            limit = 1 if value.dtype == torch.uint8 else 0.01 * theirs[name].abs().max()
            assert (off <= limit).float().mean() > 0.99, name


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        (("slim_adamw", None), ("adam_mini", None), "written by slim_adamw, not by adam_mini"),
        (("slim_adamw", None), ("slim_adamw_8bit", None), "state_bits=32, expected 8"),
        (("slim_adamw", None), ("slim_adamw", "conservative=true"), "rules"),
        (("adam_mini", None), ("adam_mini", "value=tensor"), "rules"),
        (("coap_adamw", None), ("coap_adamw", "rank_ratio=2"), "rank_ratio=None, expected 2.0"),
        (("adafactor", None), ("slim_adamw", None), "not by slim_adamw"),
    ],
)
def test_a_checkpoint_of_another_name_or_rules_is_refused(
    written: tuple, read: tuple, message: str, make_trainer: Make
) -> None:
    writer = make_trainer(written[0], optim_args=written[1], max_steps=1, save_strategy="steps", save_steps=1)
    writer.train()
    with pytest.raises(ValueError, match=message):
        make_trainer(read[0], optim_args=read[1], max_steps=2).train(resume_from_checkpoint=True)


def test_frozen_parameters_have_no_state(make_trainer: Make) -> None:
    trainer = make_trainer("slim_adamw_8bit", max_steps=1)
    trainer.model.model.embed_tokens.requires_grad_(False)
    trainer.train()
    assert trainer.model.model.embed_tokens.weight not in inner(trainer).state


def test_a_frozen_model_is_an_error(make_trainer: Make) -> None:
    trainer = make_trainer("slim_adamw", max_steps=1)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        trainer.create_optimizer()


def test_a_users_decay_rule_is_kept(make_trainer: Make) -> None:
    trainer = make_trainer("slim_adamw")
    trainer.get_decay_parameter_names = lambda model: ["lm_head.weight"]
    trainer.create_optimizer()
    decayed = [p for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert [id(p) for p in decayed] == [id(trainer.model.lm_head.weight)]


def test_8_bit_through_the_trainer_stays_close_to_adamw(make_trainer: Make) -> None:
    losses = {}
    for optim in ("adamw_torch", "lowmem_adamw_8bit", "slim_adamw_8bit", "adam_mini_8bit"):
        trainer = make_trainer(optim, max_steps=40, learning_rate=3e-3)
        trainer.train_dataset = trainer.train_dataset[:16]
        losses[optim] = trainer.train().training_loss
    for optim, loss in losses.items():
        assert loss < 1.1 * losses["adamw_torch"], optim
