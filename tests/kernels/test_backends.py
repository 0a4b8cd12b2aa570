"""What all backends share: `reduce` and `apply` are a step, tiles follow the rule, and `covers` sees all of a plan.

The part of the Triton kernels is in `test_gpu_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lowmem.codecs import BFloat16, Float32, Int8Blockwise
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.kernels.bucket import Bucket, ParamStep
from hf_lowmem.kernels.means import TILE
from hf_lowmem.kernels.registry import SMALL, find_backend, warn_of_slow_steps
from hf_lowmem.moments import Full, RowColMean, whole
from hf_lowmem.state import Rounding, StatePlan, arithmetic_of
from hf_lowmem.update_rules import RULES, UpdateRule
from tests.support.backend_steps import (
    HYPER,
    PLANS,
    adamw,
    assert_same,
    check_reduce_then_apply,
    first_step,
    fused,
    signum,
    stepped,
)

built = pytest.mark.skipif(not BACKENDS["cpu"].available(), reason="the compiled kernels are missing")


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", PLANS, ids=lambda case: case[0])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=built), "tiles", "rule"])
def test_reduce_and_apply_are_a_step(backend: str, case: Any, clip: float | None, monkeypatch) -> None:
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 512)
    check_reduce_then_apply(backend, *case[1:], clip)


@built
@pytest.mark.parametrize("clip", [None, 0.5])
def test_torchs_fused_adamw_steps_as_the_compiled_kernel(clip: float | None) -> None:
    """A clipped step is handed on to that."""
    with forced("torch_fused", "cpu"):
        check_reduce_then_apply("torch_fused", "adamw", adamw(), (96, 64), clip)
        found, expected = (
            stepped(each, "adamw", first_step(adamw(), (96, 64)), clip) for each in ("torch_fused", "cpu")
        )
    assert_same(found, expected, 1e-6)


CODECS = {32: Float32(), 16: BFloat16(), 8: Int8Blockwise(64)}
WEIGHTS = [
    *((dtype, "nearest") for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    *((torch.bfloat16, rounding) for rounding in ("kahan", "stochastic")),
]


@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
@pytest.mark.parametrize("shape", [(96, 64), (5,), (7, 3, 64), (), (1, 5000), (3000,)], ids=str)
@pytest.mark.parametrize("bits", CODECS)
@pytest.mark.parametrize("rule", ["adamw", "signum"])
def test_tiles_have_the_bits_of_the_rule(rule, bits, shape, dtype, rounding, monkeypatch) -> None:
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 1024)
    plan = (adamw if rule == "adamw" else signum)(CODECS[bits] if shape else Float32())
    plan = replace(plan, rounding=Rounding.of(rounding, dtype), arithmetic=arithmetic_of(dtype))
    found, expected = (stepped(each, rule, first_step(plan, shape, dtype)) for each in ("tiles", "rule"))
    assert_same(found, expected)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_tiles_take_the_means_of_the_rule(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 8, 33]), min_size=1, max_size=3)))
    axes = data.draw(st.sets(st.sampled_from(range(len(shape)))))
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    block = data.draw(st.sampled_from([size for size in (1, 2, 4) if not kept or shape[kept[-1]] % size == 0]))
    plan = adamw(second=whole(shape, tuple(axes), block))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowmem.kernels.means.TILE", data.draw(st.sampled_from([1, 16, 100])))
        found = stepped("tiles", "adamw", first_step(plan, shape))
    # Sums of up to 33^3 tiles of one entry each are rounded as often.
    assert_same(found, stepped("rule", "adamw", first_step(plan, shape)), 2e-5)


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case[0])
def test_tiles_take_means_of_every_kind_as_the_rule(case: Any, monkeypatch) -> None:
    _, rule, plan, shape = case
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 512)
    found, expected = (stepped(each, rule, first_step(plan, shape)) for each in ("tiles", "rule"))
    assert_same(found, expected, 2e-6)


class LargestNew(TorchDispatchMode):
    """The entries of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, each.numel())
        return out


def largest_new(backend: str, rule: str, step: ParamStep) -> int:
    with LargestNew() as new:
        BACKENDS[backend].step(Bucket.of([step], rule, BACKENDS[backend]), HYPER)
    return new.largest


@pytest.mark.parametrize("kind", ["full, 8-bit", "none", "rows", "columns", "whole"])
def test_a_step_by_tiles_makes_no_tensor_as_large_as_the_weight(kind: str) -> None:
    axes = {"rows": (1,), "columns": (0,), "whole": (0, 1)}
    shape = (256 if "8-bit" in kind else 1024, 4096)  # 16 MiB in float32; of 8 bits, which take longer, a quarter
    if kind == "none":
        rule, plan = "signum", signum()
    else:
        rule, plan = "adamw", adamw(second=whole(shape, axes[kind])) if kind in axes else adamw(CODECS[8])
    step = first_step(plan, shape)
    assert 0 < largest_new("tiles", rule, step) <= TILE
    if kind == "none":
        assert largest_new("rule", rule, step) == step.param.numel()


@dataclass(frozen=True)
class OtherFloat32(Float32):
    """A class that the kernels do not know."""


def float64(plan: StatePlan) -> StatePlan:
    return replace(plan, arithmetic=torch.float64)


ALTERNATING = [(part, 1, 32, number, number + 1, (0,), 1, (1,)) for number, part in enumerate(("gate", "up"))]
SLOW = {
    "first moment a mean": ("rule", adamw(first=whole((96, 64), (1,)))),
    "first moment of rows and columns": ("rule", adamw(first=RowColMean())),
    "second moment of rows and columns": ("rule", adamw(second=RowColMean())),
    "another codec": ("tiles", adamw(OtherFloat32())),
    "factored columns that alternate with others": ("tiles", adamw(second=fused(ALTERNATING))),
    "a third moment": ("tiles", adamw(third=Full())),
    "float64": ("tiles", float64(adamw())),
    "float16": ("tiles", adamw()),
    "a transposed weight": ("tiles", adamw()),
    "a transposed gradient": ("tiles", adamw()),
}


def slow_step(kind: str, shape: tuple[int, int] = (96, 64)) -> ParamStep:
    step = first_step(SLOW[kind][1], shape, getattr(torch, kind, torch.float32))
    if kind == "a transposed weight":
        step = step._replace(param=step.param.t().contiguous().t())
    if kind == "a transposed gradient":
        step = step._replace(grad=step.grad.t().contiguous().t())
    return step


@pytest.mark.parametrize("kind", SLOW)
def test_what_no_kernel_covers_is_stepped_as_the_rule_says(kind: str) -> None:
    backend = find_backend("adamw", slow_step(kind)).name
    assert backend == SLOW[kind][0]
    with forced("triton", "torch_fused", "cpu", "in_place"), pytest.raises(LookupError, match="covers torch"):
        find_backend("adamw", slow_step(kind))
    tolerance = 1e-6 if "factored" in kind else 0.0  # means are sums divided by a count, in either order
    assert_same(stepped(backend, "adamw", slow_step(kind)), stepped("rule", "adamw", slow_step(kind)), tolerance)


@built
def test_each_kind_of_slow_step_is_said_once_by_name(caplog) -> None:
    warn_of_slow_steps.cache_clear()
    for shape in ((96, 64), (128, 64)):
        for kind in ("first moment a mean", "float64", "another codec"):
            find_backend("adamw", slow_step(kind, shape))
    find_backend("adamw", first_step(float64(signum()), (SMALL - 1,), torch.float64))
    said = [record.getMessage() for record in caplog.records if record.name == "hf_lowmem.kernels.registry"]
    assert len(said) == 3
    assert "torch.float32 weights under the rule 'adamw' with exp_avg as GroupMean, exp_avg_sq as Full" in said[0]
    assert "on whole weights" in said[0]
    assert "torch.float64 weights under the rule 'adamw' with exp_avg as Full, exp_avg_sq as Full, Float32" in said[1]
    assert "on slices of the weight" in said[1]
    assert "OtherFloat32 storage, on cpu" in said[2]


def test_a_backend_that_is_forced_says_nothing_of_its_speed(caplog) -> None:
    warn_of_slow_steps.cache_clear()
    with forced("rule"):
        find_backend("adamw", first_step(adamw(), (96, 64)))
    assert not caplog.records
    with pytest.raises(ValueError, match=r"The backends are triton, .*, not no_such"), forced("no_such"):
        pass


@pytest.mark.parametrize("averages_squares", [False, True])
def test_a_rule_of_its_own_second_moment_is_not_stepped_by_sums_of_squares(
    averages_squares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that cut groups find the means first, which is right only for rules that average the square."""

    def rule(param, grad, moments, space, step, *, lr, beta1, beta2, eps, weight_decay):
        value = grad.square() if averages_squares else grad.abs()
        return param - lr * grad / (moments["exp_avg_sq"].ema(value, beta2).sqrt() + eps)

    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 512)
    declared = UpdateRule(rule, elementwise=True, averages_squares=averages_squares)
    monkeypatch.setitem(RULES, "own", declared)
    by_column, by_row = (adamw(second=whole((64, 48), axes)) for axes in ((0,), (1,)))
    for plan, covered in ((by_column, averages_squares), (by_row, True)):
        assert BACKENDS["tiles"].covers("own", first_step(plan, (64, 48))) is covered
        if covered:
            found, expected = (stepped(name, "own", first_step(plan, (64, 48))) for name in ("tiles", "rule"))
            torch.testing.assert_close(found, expected)
