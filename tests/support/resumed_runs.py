"""What is checked of a run of four steps and of the same run resumed from its second step, for any Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer

import hf_lowmem
from hf_lowmem.planner import Explanation


def run_and_resume(build: Callable[[], Trainer], output: Path) -> tuple[Trainer, Trainer]:
    """A whole run of a trainer that saves its second step to `output`, and one that starts from there."""
    whole = build()
    whole.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert whole.state.global_step == resumed.state.global_step == 4
    return whole, resumed


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    return trainer.optimizer.optimizer


def same_weights(mine: Trainer, theirs: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True))


def same_state(mine: Trainer, theirs: Trainer) -> bool:
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        ours, others = inner(mine).state.get(a, {}), inner(theirs).state.get(b, {})
        if ours.keys() != others.keys() or not all(torch.equal(ours[name], others[name]) for name in ours):
            return False
    return True


def assert_trained(trainer: Trainer) -> None:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logged)
    assert any(entry["grad_norm"] > 0 for entry in logged)


def assert_declared_state(trainer: Trainer, optim: str, optim_args: str | None) -> Explanation:
    """The optimizer is ours, and holds the tensors that `explain` declares and no others; returns what it says."""
    optimizer = inner(trainer)
    explanation = hf_lowmem.explain(trainer.model, optim, optim_args)
    assert optimizer.param_groups[0]["algorithm"] == explanation.algorithm
    declared = {row.name: row.state for row in explanation.rows if row.trainable}
    names = {id(param): row.name for param, row in zip(trainer.model.parameters(), explanation.rows, strict=True)}
    held = {
        names[id(param)]: {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state.items()
        }
        for param, state in optimizer.state.items()
    }
    assert held == declared
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == explanation.nbytes
    return explanation


def assert_the_trainers_groups(trainer: Trainer) -> None:
    """Each parameter has the weight decay and the learning rate that this trainer gives it under adamw_torch."""
    mine = {
        id(param): (group["initial_lr"], group["weight_decay"])
        for group in inner(trainer).param_groups
        for param in group["params"]
    }
    args, ours = trainer.args, trainer.optimizer
    named_optim = (args.optim, args.optim_args)
    args.optim, args.optim_args, trainer.optimizer = "adamw_torch", None, None
    theirs = trainer.create_optimizer()
    (args.optim, args.optim_args), trainer.optimizer = named_optim, ours
    assert type(theirs) is torch.optim.AdamW
    assert mine == {
        id(param): (group["lr"], group["weight_decay"]) for group in theirs.param_groups for param in group["params"]
    }
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    named = [(name, param) for name, param in trainer.model.named_parameters() if param.requires_grad]
    lr, decay = args.learning_rate, args.weight_decay
    assert mine == {id(param): (lr, decay if name in decayed else 0.0) for name, param in named}
