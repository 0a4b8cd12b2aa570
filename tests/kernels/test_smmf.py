"""SMMF by the compiled kernel, by tiles and by Triton, as the rule defines it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_lowmem.algorithms import Smmf
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.in_place import IN_PLACE
from tests.support.backend_steps import HYPER, assert_same, first_step
from tests.support.smmf_runs import CASES, WEIGHTS, check, smmf_steps

built = pytest.mark.skipif(not BACKENDS["cpu_passes"].available(), reason="the compiled kernels are missing")
EACH = pytest.mark.parametrize("backend", [pytest.param("cpu_passes", marks=built), "in_place"])


@EACH
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
@pytest.mark.parametrize(("options", "shape"), CASES, ids=str)
def test_backends_step_as_the_rule(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, rounding: str, backend: str, monkeypatch: Any
) -> None:
    if backend == "cpu_passes" and dtype == torch.float16:
        pytest.skip("float16 is stepped in tiles")
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 256)
    check(backend, options, shape, dtype, rounding, clip=0.5 if rounding == "nearest" else None)


@built
def test_the_compiled_step_has_the_same_bits_on_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        with forced("cpu_passes"):
            found.append(smmf_steps({"stacked": True}, (2, 330, 420), torch.float32, steps=2))
        torch.set_num_threads(threads)
    assert_same(*found)


def step_of(dtype: torch.dtype = torch.float32, **options: Any) -> ParamStep:
    plan = Smmf.state_plan((24, 40), dtype, {**Smmf.plan_options(), "rounding": "nearest", **options})
    return first_step(plan, (24, 40), dtype)


@pytest.mark.parametrize("backend", ["cpu_passes", "triton_passes", "in_place"])
def test_what_a_backend_takes_for_granted_is_looked_at(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = BACKENDS[backend]
    monkeypatch.setattr(type(chosen), "available", lambda self: True)
    assert chosen.covers("smmf", step_of())
    for step in (
        step_of(torch.float64),
        step_of()._replace(param=torch.zeros(40, 24).t()),
        step_of()._replace(grad=torch.zeros(40, 24).t()),
    ):
        assert not chosen.covers("smmf", step)
    assert chosen.covers("smmf", step_of()._replace(step=torch.tensor(1.0))) == (backend == "triton_passes")
    mixed = step_of()._replace(grad=torch.zeros(24, 40, dtype=torch.bfloat16))
    assert chosen.covers("smmf", mixed) == (backend == "in_place")


@pytest.mark.parametrize("options", [{}, {"stacked": True}], ids=["one square", "a stack"])
def test_the_sums_of_the_pass_are_yielded_before_the_factors_change(options: dict[str, Any]) -> None:
    step, hyper = step_of(**options), replace(HYPER, flags={"growth_rate": 0.999, "decay_rate": -0.8})
    passes = IN_PLACE.rules["smmf"].passes(step, hyper)
    sums = next(passes)
    assert not step.state["exp_avg_row"].any()
    assert [each.dims for each in sums] == [(0, None) if options else (None,)] * 4
    torch.testing.assert_close(sums[2].values.sum(), step.grad.square().sum())
    assert next(passes, None) is None
    assert torch.equal(step.state["exp_avg_row"], sums[0].values)
