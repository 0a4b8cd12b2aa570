"""MicroAdam by the compiled kernel and in plain torch, as the rule defines it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowmem.algorithms import MicroAdam
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.kernels.bucket import ParamStep
from tests.support.backend_steps import first_step
from tests.support.micro_adam_runs import CASES, CROSSING, WEIGHTS, check, steps

built = pytest.mark.skipif(not BACKENDS["cpu_passes"].available(), reason="the compiled kernels are missing")


@pytest.mark.parametrize("backend", [pytest.param("cpu_passes", marks=built), "in_place"])
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
@pytest.mark.parametrize(("options", "shape"), [*CASES, CROSSING], ids=str)
def test_backends_step_as_the_rule(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, rounding: str, backend: str, monkeypatch: Any
) -> None:
    if backend == "cpu_passes" and (dtype == torch.float16 or options == CROSSING[0]):
        pytest.skip("plain torch steps these")
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 1 << 10)
    check(backend, options, shape, dtype, rounding)


@built
def test_the_compiled_step_has_the_same_bits_on_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with forced("cpu_passes"):
            found.append(steps({"top_k_block_size": 1024}, (90, 100), torch.bfloat16, torch.device("cpu")))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name].nan_to_num(), value.nan_to_num()) for name, value in found[1].items())


@pytest.mark.parametrize("backend", [pytest.param("cpu_passes", marks=built), "in_place"])
def test_of_equal_entries_the_first_are_kept(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(4000))
    optimizer = MicroAdam([param], density=0.01)
    param.grad = torch.ones(4000)
    param.grad[100:1000] = -1.0
    param.grad[3999] = 2.0
    with forced(backend):
        optimizer.step()
    assert optimizer.state[param]["window_index"][0].tolist() == [*range(39), 3999]


def step_of(shape: tuple[int, ...] = (24, 40), dtype: torch.dtype = torch.float32, **options: Any) -> ParamStep:
    plan = MicroAdam.state_plan(shape, dtype, {**MicroAdam.plan_options(), "rounding": "nearest", **options})
    return first_step(plan, shape, dtype)


@pytest.mark.parametrize("backend", ["cpu_passes", "triton_passes", "in_place"])
def test_what_a_backend_takes_for_granted_is_looked_at(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = BACKENDS[backend]
    monkeypatch.setattr(type(chosen), "available", lambda self: True)
    assert chosen.covers("micro_adam", step_of())
    assert not chosen.covers("micro_adam", step_of()._replace(param=torch.zeros(40, 24).t()))
    assert not chosen.covers("micro_adam", step_of()._replace(grad=torch.zeros(40, 24).t()))
    for step in (
        step_of(dtype=torch.float64),
        step_of()._replace(grad=torch.zeros(24, 40, dtype=torch.bfloat16)),
        step_of()._replace(step=torch.tensor(1.0)),
    ):
        assert chosen.covers("micro_adam", step) == (backend == "in_place")


@built
@pytest.mark.parametrize("entries", [5, 101, 600, 672])
def test_bfloat16_weights_are_stepped_by_the_kernel_as_by_torch(entries: int) -> None:
    """To the last bit, where torch's own addition rounds the entries that its vectors leave over otherwise."""
    generator, found = torch.Generator().manual_seed(0), []
    start = (torch.randn(entries, generator=generator) / 20).bfloat16()
    grads = [torch.randn(entries, generator=generator).bfloat16() for _ in range(40)]
    for backend in ("rule", "cpu_passes"):
        param = torch.nn.Parameter(start.clone())
        optimizer = MicroAdam([param], lr=1e-2, weight_decay=0.3, density=1.0, alpha=0.1)
        for grad in grads:
            param.grad = grad.clone()
            with forced(backend):
                optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)
