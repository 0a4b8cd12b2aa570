"""MicroAdam: what its window and its error hold, and what it does with gradients that are missing or not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_lowmem
from hf_lowmem.algorithms import MicroAdam
from hf_lowmem.kernels.means import TILE
from hf_lowmem.moments import TopKWindow
from tests.support.micro_adam_runs import steps


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


def run(grads: list[Tensor], **options: object) -> tuple[list[Tensor], MicroAdam]:
    param = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = MicroAdam([param], lr=1.0, **options)
    weights = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        weights.append(param.detach().clone())
    return weights, optimizer


def test_the_step_grows_as_documented() -> None:
    """By an entry that is kept at every step, with a constant gradient."""
    weights, _ = run([torch.ones(1)] * 1000, density=1.0, state_bits=32)
    for step, expected in ((10, 1.0), (20, 1.05), (100, 2.01), (1000, 5.19)):
        assert (weights[step - 2] - weights[step - 1]).item() == pytest.approx(expected, abs=6e-3)


def test_what_the_window_leaves_out_reaches_the_weights_later() -> None:
    """One entry of ten is kept at a step, and the error brings the others forward."""
    weights, _ = run([torch.linspace(1.0, 0.9, 10)] * 14, density=0.1)
    assert (weights[0] != 0).sum() == 1
    assert (weights[-1] < 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_entry(bad: float, dtype: torch.dtype) -> None:
    """Also where there is more of it than the window keeps, and numbers whose distances overflow."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(640, generator=generator).to(dtype) for _ in range(6)]
    grads[1][[3, 70, 71, 72, 200, 300, 400, 500, 639]] = bad
    grads[1][4] = -bad
    weights, optimizer = run(grads)
    (state,) = optimizer.state.values()
    assert state["error_lo"].isfinite().all()
    assert state["error_hi"].isfinite().all()
    lost = ~weights[-1].isfinite()
    assert lost.sum() == (0 if bad == -3e38 else 10)
    assert not lost[5:70].any()
    others, _ = run([torch.where(lost, 0, grad) for grad in grads])
    assert (others[-1][~lost] == weights[-1][~lost]).double().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_whole_one(dtype: torch.dtype) -> None:
    grads = [torch.randn(3000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(7)]
    whole, _ = run(grads, m=3, alpha=0.1)
    weights, optimizer = run(grads[:4], m=3, alpha=0.1)
    param = nn.Parameter(weights[-1])
    resumed = MicroAdam([param], lr=1.0, m=3, alpha=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[4:]:
        param.grad = grad
        resumed.step()
    assert torch.equal(param, whole[-1])


@pytest.mark.parametrize("step", [1.0, 7.0])
def test_the_error_is_what_the_window_left_out(step: float) -> None:
    """Each entry comes back to within half a level of its bucket."""
    window = TopKWindow(4, 0.05, 96, 32, torch.float32)
    state = {name: spec.zeros(torch.device("cpu")) for name, spec in window.specs("", (301,), None).items()}  # type: ignore[arg-type]
    grad = torch.randn(301, generator=torch.Generator().manual_seed(0))
    places = window.push(state, grad, 0, step)
    window.set_error(state, grad, 0, step)
    error = window.error(state, 0, 301, torch.float32)
    left = grad.clone()
    left[places] = 0
    for start in range(0, 301, 32):
        bucket = slice(start, start + 32)
        half = (left[bucket].max() - left[bucket].min()) / 30
        assert ((error[bucket] - left[bucket]).abs() <= half * 1.0001).all()
    assert torch.equal(window.error(state, 64, 200, torch.float32), error[64:200])
    assert torch.equal(state["window_value"][int(step - 1) % 4], grad[places])


def test_a_graph_s_numbers_on_the_device_step_alike() -> None:
    usual, captured = (
        steps({"capturable": capturable, "m": 3}, (40, 50), torch.float32, torch.device("cpu"))
        for capturable in (False, True)
    )
    torch.testing.assert_close(captured["param"], usual["param"], rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(captured["window_index"], usual["window_index"])


@pytest.mark.parametrize(
    "options",
    [
        {"state_bits": 8},
        {"quant_block_size": 63},
        {"top_k_block_size": 32769},
        {"density": 0.0},
        {"alpha": 1.0},
        {"alpha": -2},
        {"m": 0},
    ],
    ids=str,
)
def test_values_that_are_not_legal(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        MicroAdam([nn.Parameter(torch.ones(4))], **options)


def test_embeddings_may_be_stored_in_other_bits_but_not_in_8() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8))
    optimizer = hf_lowmem.build_optimizer(model, "micro_adam", lr=1e-3, optim_args="embedding_bits=32")
    dtypes = [optimizer.init_state(param)["window_value"].dtype for param in model.parameters()]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    with pytest.raises(ValueError, match="embedding_bits"):
        hf_lowmem.build_optimizer(model, "micro_adam", lr=1e-3, optim_args="embedding_bits=8")


def test_the_scratch_of_a_large_weight_is_bounded() -> None:
    """No operator makes a tensor that is larger than a part of the weight."""

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for each in tree_leaves(result):
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in lasting:
                    Largest.found = max(Largest.found, each.untyped_storage().nbytes())
            return result

    param = nn.Parameter(torch.zeros(3_000_000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = MicroAdam([param], alpha=0.1)
    held = (param, param.grad, *optimizer.init_state(param).values())
    lasting = {tensor.untyped_storage().data_ptr() for tensor in held}
    with hf_lowmem.kernels.forced("in_place"), Largest():
        optimizer.step()
    assert 0 < Largest.found <= 8 * TILE


@pytest.mark.parametrize(("options", "match"), [({"compile": True}, "compile=true"), ({"eps": 0.0}, "eps=0 must be")])
def test_what_would_step_wrongly_is_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MicroAdam([nn.Parameter(torch.zeros(8))], **options)
