"""The limit of updates whose second moment is made of means."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hf_lowmem
from hf_lowmem.algorithms.grouped import largest_update
from tests.support.model_families import VOCAB_SIZE, tiny_model

LR = 1e-2


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for step in range(steps):
        ids = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(seed + step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["slim_adamw", "slim_adamw_8bit", "adam_mini", "adalayer", "factored_adamw_8bit"])
def test_no_entry_moves_further_and_full_second_moments_are_not_limited(name: str) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    settings = {"lr": LR, "weight_decay": 0.0}
    optimizer = hf_lowmem.build_optimizer(model, name, optim_args="update_limit=0.3", **settings)
    unlimited = hf_lowmem.build_optimizer(plain, name, optim_args="update_limit=inf", **settings)
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    train(model, optimizer, 1)
    train(plain, unlimited, 1)
    others = dict(plain.named_parameters())
    kept = 0
    for key, param in model.named_parameters():
        moved, freely = ((p - before[key]).abs().max() / LR for p in (param, others[key]))
        if optimizer.state[param].get("exp_avg_sq", torch.empty(0)).shape == param.shape:
            kept += 1
            assert torch.equal(param, others[key])
        else:
            assert moved <= 0.3 * (1 + 1e-4)
            assert freely > 0.3
    assert 0 < kept < len(before) or name in ("adam_mini", "adalayer")  # which average norms, too


def test_a_group_may_change_its_limit_and_so_may_a_resumed_run() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=LR, optim_args="update_limit=0.3")
    train(model, optimizer, 2)
    resumed_model = copy.deepcopy(model)
    resumed = hf_lowmem.build_optimizer(resumed_model, "slim_adamw", lr=LR, optim_args="update_limit=inf")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["update_limit"] = math.inf
    train(model, optimizer, 2, seed=2)
    train(resumed_model, resumed, 2, seed=2)
    for mine, theirs in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.5, 0.3)])
def test_the_largest_update_of_adamw_is_reached_and_never_exceeded(beta1: float, beta2: float) -> None:
    """The worst gradients grow by b2 / b1 a step; with b1 = 0 it is a first one after many zeros."""
    torch.manual_seed(0)
    most = largest_update(beta1, beta2)

    def update_by(grads: torch.Tensor) -> float:
        ages = torch.arange(len(grads) - 1, -1, -1, dtype=torch.float64)
        momentum = ((1 - beta1) * beta1**ages * grads).sum()
        return float(momentum.abs() / ((1 - beta2) * beta2**ages * grads.square()).sum().sqrt())

    worst = (beta2 / beta1) ** torch.arange(400, dtype=torch.float64) if beta1 else torch.eye(400)[-1].double()
    assert update_by(worst) == pytest.approx(most, rel=1e-9)
    assert all(update_by(torch.randn(400, dtype=torch.float64)) < most for _ in range(100))


def test_without_a_largest_update_nothing_is_limited() -> None:
    assert largest_update(0.9, 0.8) == largest_update(0.9, 0.81) == math.inf
    assert largest_update(0.0, 0.0) == 1.0
    models = [torch.nn.Linear(8, 8, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, limit in zip(models, ("auto", "inf"), strict=True):
        settings = {"lr": LR, "betas": (0.9, 0.8), "optim_args": f"update_limit={limit}"}
        optimizer = hf_lowmem.build_optimizer(model, "factored_adamw", **settings)
        model(torch.eye(8)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["slim_adamw", "adam_mini_8bit", "adalayer", "factored_adamw_8bit"])
def test_the_default_limit_follows_the_betas_of_each_group(name: str) -> None:
    torch.manual_seed(0)
    models = [tiny_model("llama")]
    models.append(copy.deepcopy(models[0]))
    for model, limits in zip(models, (None, (1.2, 7.3)), strict=True):
        optimizer = hf_lowmem.build_optimizer(model, name, lr=LR)
        for group, betas in zip(optimizer.param_groups, ((0.9, 0.95), (0.9, 0.999)), strict=True):
            assert group["update_limit"] == "auto"
            group["betas"] = betas
            if limits:
                group["update_limit"] = largest_update(*betas)
                assert group["update_limit"] == pytest.approx(limits[betas[1] > 0.99], abs=0.05)
        train(model, optimizer, 2)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "0.7", None])
def test_a_group_may_not_have_a_limit_that_is_none(value: object) -> None:
    weight = torch.nn.Parameter(torch.ones(8, 64))
    optimizer = hf_lowmem.algorithms.FactoredAdamW([weight], lr=LR)
    optimizer.param_groups[0]["update_limit"] = value
    weight.square().sum().backward()
    with pytest.raises(ValueError, match=r"update_limit=.* must be a number of at least 1e-6, or \"auto\""):
        optimizer.step()


@pytest.mark.parametrize("value", ["0", "-1", "1e-40", "nan", "none", "much"])
def test_values_that_limit_nothing_sensible(value: str) -> None:
    with pytest.raises(ValueError, match=f"update_limit='?{value}"):
        hf_lowmem.build_optimizer(tiny_model("llama"), "slim_adamw", lr=LR, optim_args=f"update_limit={value}")


def test_a_checkpoint_from_before_there_was_a_limit_takes_that_of_the_run() -> None:
    model = tiny_model("llama")
    optimizer = hf_lowmem.build_optimizer(model, "factored_adamw", lr=LR)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["update_limit"]
    resumed = hf_lowmem.build_optimizer(model, "factored_adamw", lr=LR, optim_args="update_limit=0.3")
    resumed.load_state_dict(saved)
    assert {group["update_limit"] for group in resumed.param_groups} == {0.3}
