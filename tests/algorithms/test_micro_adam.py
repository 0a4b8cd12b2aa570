"""MicroAdam: what its window and its error hold, and what it does with gradients that are missing or not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem.algorithms import MicroAdam


def test_the_declared_bytes_are_those_of_the_formula() -> None:
    """Half a byte of error, four bytes for each of the m k entries of the window, and four for each bucket."""
    numel = 1 << 20
    assert MicroAdam.make_plan((1024, 1024), **MicroAdam.plan_options()).nbytes((1024, 1024)) == (
        numel // 2 + 4 * 10 * (numel // 32768) * math.ceil(327.68) + 4 * numel // 64 + 4
    )


def test_the_window_holds_the_largest_entries_and_the_error_the_rest() -> None:
    param = nn.Parameter(torch.zeros(100))
    optimizer = MicroAdam([param], lr=1e-2, density=0.02, state_bits=32)
    param.grad = torch.linspace(-0.5, 0.5, 100)
    param.grad[[17, 80]] = torch.tensor([3.0, -2.0])
    optimizer.step()
    state = optimizer.state[param]
    assert state["window_index"][0].tolist() == [17, 80]
    assert state["window_value"][0].tolist() == [3.0, -2.0]
    assert not state["window_value"][1:].any()
    assert param.nonzero().flatten().tolist() == [17, 80]
    assert torch.allclose(state["error_lo"], torch.tensor([-0.5, 0.0]))


def test_a_missing_gradient_does_not_age_the_window() -> None:
    def run(missing: bool) -> torch.Tensor:
        generator, param = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(50))
        optimizer = MicroAdam([param], lr=1e-2, m=3)
        for number in range(7):
            param.grad = torch.randn(50, generator=generator)
            optimizer.step()
            if missing and number == 3:
                param.grad = None
                optimizer.step()
        return param.detach()

    assert torch.equal(run(missing=True), run(missing=False))


def test_an_entry_that_is_not_finite_harms_itself_alone() -> None:
    param = nn.Parameter(torch.zeros(200))
    optimizer = MicroAdam([param], lr=1e-2, density=0.05, m=2)
    for number in range(5):
        param.grad = torch.randn(200, generator=torch.Generator().manual_seed(number))
        if number == 1:
            param.grad[7], param.grad[8] = float("nan"), -float("inf")
        optimizer.step()
    assert param.isnan().nonzero().flatten().tolist() == [7, 8]
    assert optimizer.state[param]["error_lo"].isfinite().all()
    assert optimizer.state[param]["window_value"].isfinite().all()  # those of that step have left it


def test_8_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="state_bits=8 is not supported: use one of 16, 32"):
        MicroAdam([nn.Parameter(torch.zeros(8))], state_bits=8)
    with pytest.raises(ValueError, match="state_bits"):
        hf_lowmem.build_optimizer(nn.Linear(4, 4), "micro_adam", lr=1e-3, optim_args="state_bits=8")
