"""MicroAdam by the compiled kernel and in plain torch, as the rule defines it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowmem.kernels import BACKENDS, forced
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
