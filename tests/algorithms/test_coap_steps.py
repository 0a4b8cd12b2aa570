"""How far COAP's steps go, and what memory they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from tests.support.coap_runs import BOTH, build, gradients, random, train

pytestmark = pytest.mark.usefixtures("one_thread")


def step_sizes(cls: type, start: Tensor, grads: list[Tensor], **options: Any) -> list[tuple[float, float]]:
    """(largest entry, norm) of each change of the weight."""
    param, optimizer = build(cls, start, weight_decay=0.0, **options)
    sizes = []
    for grad in grads:
        before = param.detach().clone()
        for _ in train(param, optimizer, [grad]):
            pass
        change = param.detach() - before
        sizes.append((change.abs().max().item(), change.norm().item()))
    return sizes


def wide_gradients(shape: tuple[int, int], axis: int, decades: int) -> list[Tensor]:
    """Gradients whose size spans these decades along one axis, and one and a half along the other."""
    wide, narrow = (torch.logspace(0, -d, shape[a]) for d, a in ((decades, axis), (1.5, 1 - axis)))
    wide = wide[torch.randperm(len(wide), generator=torch.Generator().manual_seed(0))]
    scales = torch.outer(narrow, wide) if axis else torch.outer(wide, narrow)
    return [grad * scales for grad in gradients(shape, 32)]


def largest_step(grads: list[Tensor], bits: int, **options: Any) -> float:
    """After the first refresh, for the first steps are large by themselves."""
    options |= {"rank": 32, "eps": 1e-8, "update_interval": 4, "reproject_factor": 2}
    start = torch.zeros_like(grads[0])
    return max(step_sizes(CoapAdamW, start, grads, state_bits=bits, min_8bit_size=0, **options)[4:])[0]


@pytest.mark.parametrize("decades", [2, 3, 4])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("restore", [False, True])
def test_8_bit_moments_do_not_blow_steps_up(decades: int, axis: int, shape: tuple[int, int], restore: bool) -> None:
    grads = wide_gradients(shape, axis, decades)
    exact, coded = (largest_step(grads, bits, restore_state=restore) for bits in (32, 8))
    assert coded < 2 * exact


def test_8_bit_second_moments_blow_steps_up_if_not_stored_as_roots(
    monkeypatch: pytest.MonkeyPatch, force: Any
) -> None:
    """Small ones fall to zero: what the test above would find."""
    grads = wide_gradients((64, 128), 1, 4)
    exact = largest_step(grads, 32)
    force("rule")
    monkeypatch.setattr(CoapAdamW, "second_moment", classmethod(lambda cls, space: Full(signed=True)))
    assert largest_step(grads, 8) > 10 * exact


def drifting(shape: tuple[int, int], steps: int, switch: int | None) -> Iterator[Tensor]:
    """A low-rank gradient plus noise; its subspace drifts, or becomes another one at `switch`."""
    rank = min(shape) // 4
    left, right = random(shape[0], rank, seed=1), random(rank, shape[1], seed=2)
    for step in range(steps):
        if step == switch:
            left, right = random(shape[0], rank, seed=3), random(rank, shape[1], seed=4)
        if switch is None:
            left = left + 0.02 * random(*left.shape, seed=5 + step)
            right = right + 0.02 * random(*right.shape, seed=1005 + step)
        noise = (0.5 if switch is None else 0.1) * random(*shape, seed=2005 + step)
        yield 0.01 * (left @ right / math.sqrt(rank) + noise)


@BOTH
@pytest.mark.parametrize("kind", ["drift", "noise", "switch"])
@pytest.mark.parametrize(("shape", "bits"), [((96, 64), 32), ((64, 96), 8)], ids=str)
def test_no_step_jumps_with_the_basis(cls: type, bits: int, kind: str, shape: tuple[int, int]) -> None:
    """With the default options: corrected every 32 steps, recomputed every 160."""
    steps = 330
    if kind == "noise":
        grads = [0.01 * grad for grad in gradients(shape, steps)]
    else:
        grads = list(drifting(shape, steps, switch=170 if kind == "switch" else None))
    sizes = step_sizes(cls, random(*shape), grads, lr=1e-3, state_bits=bits, min_8bit_size=0)
    for k in range(32, steps, 32):
        assert sizes[k][0] < 3 * sizes[k - 1][0], k
        assert sizes[k][1] < 3 * sizes[k - 1][1], k


@BOTH
def test_a_gradient_that_leaves_the_basis_stops_the_weight_until_the_next_recompute(cls: type) -> None:
    """Eq. 5 does not find a subspace that is orthogonal to the basis; the recompute's step is no larger than others.

    Here the step before is nothing, so the ratio of the two is not bounded.
    """
    q = torch.linalg.qr(random(64, 64)).Q
    grads = [0.01 * random(96, 16, seed=step) @ q[:16] for step in range(100)]
    grads += [0.01 * random(96, 16, seed=step) @ q[32:48] for step in range(100, 170)]
    sizes = step_sizes(cls, random(96, 64), grads, lr=1e-3)
    usual = max(size for size, _ in sizes[20:100])
    assert sizes[159][0] < 0.05 * usual
    assert 0.05 * usual < max(size for size, _ in sizes[160:]) < 3 * usual


def peak_of_a_step(optimizer: LowMemOptimizer, param: nn.Parameter) -> float:
    """The largest memory that a second step holds besides, in float32 copies of the weight."""
    for _ in range(2):
        param.grad = torch.randn_like(param)
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / (4 * param.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [CoapAdamW, CoapAdafactor])
def test_an_unprojected_weight_is_stepped_in_tiles(cls: type, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(4096, 1024).to(dtype))
    assert peak_of_a_step(cls([param], project=False), param) < 0.6


@pytest.mark.parametrize("cls", [CoapAdamW, CoapAdafactor])
def test_a_projected_step_makes_no_copy_of_a_float32_weight(cls: type) -> None:
    param = nn.Parameter(torch.randn(2048, 1024))
    assert peak_of_a_step(cls([param], rank=16), param) < 0.2


@pytest.mark.parametrize("eq5_scale", ["none", "rms"])
@pytest.mark.parametrize("shape", [(2048, 512), (512, 2048)])
def test_a_change_of_basis_makes_no_copy_of_the_gradient(shape: tuple[int, int], eq5_scale: str) -> None:
    for factor in (1, 100):  # recomputed, corrected
        param = nn.Parameter(torch.randn(shape))
        optimizer = CoapAdamW([param], rank=8, update_interval=1, reproject_factor=factor, eq5_scale=eq5_scale)
        assert peak_of_a_step(optimizer, param) < 0.4
