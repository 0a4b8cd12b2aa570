"""Steps in passes: each backend against the rule, and shards of a weight against the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_lowmem.algorithms import CoapAdafactor, FAdam, HFac
from hf_lowmem.kernels import BACKENDS
from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.passes import InPasses, Sum
from hf_lowmem.state import TensorSpec
from hf_lowmem.update_rules import RULE_FLAGS
from tests.support.kernel_runs import run
from tests.support.passes_runs import CASES, Case, check

COVERED = [
    ("in_place", torch.float32, "nearest"),
    ("in_place", torch.float16, "kahan"),
    ("cpu_passes", torch.float32, "nearest"),
    ("cpu_passes", torch.bfloat16, "stochastic"),
    ("cpu_passes", torch.bfloat16, "kahan"),
]
# A weight that keeps no full moments has nothing to store in 16 or 8 bits.
STORED = [(case, 32) for case in CASES] + [(CASES[0], 16)] + [(case, 8) for case in CASES if case[0] is FAdam]


def named(value: Any) -> str | None:
    return "-".join(str(part) for part in (value[0].__name__, *value[2])) if isinstance(value, tuple) else None


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 1 << 14)


@pytest.mark.parametrize(("backend", "dtype", "rounding"), COVERED)
@pytest.mark.parametrize(("case", "bits"), STORED, ids=named)
def test_each_backend_follows_the_rule(backend: str, case: Case, bits: int, dtype: torch.dtype, rounding: str) -> None:
    if not BACKENDS[backend].available():
        pytest.skip("the compiled kernels are missing")
    check(backend, case, bits, dtype, rounding)


@pytest.mark.parametrize("backend", ["in_place", "cpu_passes"])
@pytest.mark.parametrize(
    "case", [*CASES, (CoapAdafactor, {"scale_parameter": True, "project": False}, (90, 48))], ids=named
)
def test_shards_that_add_up_their_sums_take_the_whole_weights_step(backend: str, case: Case) -> None:
    """Two shards along the first axis, as a mesh of two devices would hold them."""
    cls, options, shape = case
    passes = BACKENDS[backend]
    assert isinstance(passes, InPasses)
    if cls.rule not in passes.rules or not passes.available():
        pytest.skip(f"{backend} does not step {cls.rule} here")
    param = torch.nn.Parameter(torch.randn(shape))
    optimizer = cls([param], **options)
    plan, group = optimizer.plan_of(param), optimizer.param_groups[0]
    flags = {flag: group[flag] for flag in RULE_FLAGS[cls.rule]}
    hyper = Hyper(1e-2, 0.9, 0.95, 1e-8, 0.1, flags)
    specs = plan.specs(shape)
    held = {name: spec.zeros(param.device) for name, spec in specs.items()}
    whole = ParamStep(param.detach().clone(), torch.randn(shape), held, plan, 1.0)
    cuts = [slice(0, shape[0] // 3), slice(shape[0] // 3, None)]
    shards = [shard(whole, cut, specs) for cut in cuts]
    for number in (1.0, 2.0, 3.0):
        grad = torch.randn(shape)
        steps = [whole._replace(grad=grad, step=number)]
        steps += [each._replace(grad=grad[cut].clone(), step=number) for each, cut in zip(shards, cuts, strict=True)]
        run_all, *run_shards = (passes.rules[cls.rule].passes(step, hyper) for step in steps)
        list(run_all)
        for found in zip(*run_shards, strict=True):
            add_up(found)
    torch.testing.assert_close(torch.cat([each.param for each in shards]), whole.param, rtol=1e-5, atol=1e-6)
    for name, spec in specs.items():
        parts = [each.state[name] for each in shards]
        joined = torch.cat(parts, spec.param_dims.index(0)) if 0 in spec.param_dims else parts[1]
        torch.testing.assert_close(joined, whole.state[name], rtol=1e-5, atol=1e-6)


def shard(step: ParamStep, cut: slice, specs: dict[str, TensorSpec]) -> ParamStep:
    """Return the step of the rows of a weight, with the state that runs along them, and copies of all other state."""
    state = {}
    for name, spec in specs.items():
        along = [cut if dim == 0 else slice(None) for dim in spec.param_dims]
        state[name] = step.state[name][tuple(along)].clone()
    return step._replace(param=step.param[cut].clone(), grad=step.grad[cut].clone(), state=state, whole=step.shape)


def add_up(found: Sequence[list[Sum]]) -> None:
    """Replace the sums of all shards of a pass by what they add up to, where no shard has a complete one."""
    for sums in zip(*found, strict=True):
        if 0 not in sums[0].dims:
            total = torch.stack([each.values for each in sums]).sum(0)
            for each in sums:
                each.values.copy_(total)


def test_the_result_is_the_same_on_any_number_of_threads() -> None:
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append([run(cls, {}, torch.ones(300, 1024))[0] for cls in (FAdam, HFac)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
