"""Clipping by the step: what torch's clipping and a step would do, without its passes over the gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hf_lowmem
from hf_lowmem.algorithms import LowMemAdamW, SlimAdamW
from tests.support.declarations import BY_SIGN, FULL_SPACE, each_variant

DTYPES = [torch.float32, torch.bfloat16]


def by_torch(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = param.grad.float().to(param.dtype)
    return torch.nn.utils.clip_grad_norm_(params, max_norm)


def fused(optimizer: Any, max_norm: float) -> Tensor:
    return optimizer.clip_grad_norm_(max_norm)


def run(
    cls: Any,
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    clip: Callable[[Any, float], Tensor],
    max_norm: float = 0.5,
    bad: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights after three steps, and the norms; the last gradient has one entry of `bad`."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)), nn.Parameter(torch.ones(7).to(dtype))]
    groups = [{"params": params[:1], **options}, {"params": params[1:]}]
    optimizer, norms = cls(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1), []
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        if bad is not None and step == 2:
            params[0].grad.view(-1)[5] = bad
        norms.append(clip(optimizer, max_norm))
        optimizer.step()
    return torch.cat([param.detach().float().flatten() for param in params]), torch.stack(norms).float()


@pytest.mark.parametrize("path", ["compiled", "tiles", "rule"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [32, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_a_step_clips_as_torch_does(cls, options, shape, bits, dtype, path, force) -> None:
    options = {**options, "state_bits": bits, **({"min_8bit_size": 0} if bits == 8 else {})}
    if path != "compiled":
        force(*{"tiles": ("in_place", "tiles"), "rule": ("rule",)}[path])
    mine, norms = run(cls, options, shape, dtype, fused)
    theirs, expected = run(cls, options, shape, dtype, by_torch)
    torch.testing.assert_close(norms, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    off = (mine - theirs).abs()
    if dtype == torch.bfloat16:  # torch rounds the clipped gradient, and a weight's neighbour may be the nearer one
        assert off.max() <= (2**-4 if cls in BY_SIGN else 2**-6)
        assert (off == 0).float().mean() > 0.8
    elif bits == 32 and cls not in BY_SIGN:  # a sign may flip
        assert off.max() <= 1e-6
    else:
        assert (off <= 1e-6).float().mean() > 0.9


def test_gradients_are_read_only_and_their_norm_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 300).bfloat16()
    optimizer = hf_lowmem.build_optimizer(layer, "slim_adamw_8bit", lr=1e-3)
    grads = [torch.randn_like(param) for param in layer.parameters()]
    for param, grad in zip(layer.parameters(), grads, strict=True):
        param.grad = grad.clone()
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(exact, rel=1e-6)
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), grads, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("cls", "options"), [(LowMemAdamW, {}), (SlimAdamW, {"axes": (0,)}), (SlimAdamW, {"axes": (1,)})]
)
def test_a_norm_that_is_not_finite_does_what_it_does_in_torch(cls, options, bad) -> None:
    """NaN spreads to all, as in torch; Inf makes all other gradients zero."""
    mine, norms = run(cls, options, (8, 64), torch.float32, fused, bad=bad)
    theirs, expected = run(cls, options, (8, 64), torch.float32, by_torch, bad=bad)
    torch.testing.assert_close(norms, expected, equal_nan=True)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert mine.isnan().any()


@pytest.mark.parametrize("forget", [lambda optimizer: optimizer.zero_grad(False), lambda optimizer: None])
def test_a_clipping_without_a_step_leaves_nothing_behind(forget) -> None:
    """New gradients are not those that were clipped, as after a step that a GradScaler skips."""
    weights = []
    for clips in (False, True):
        param = nn.Parameter(torch.ones(4, 64))
        optimizer = SlimAdamW([param], lr=1e-2, eps=1.0, axes=(1,))
        param.grad = torch.ones(4, 64)
        if clips:
            optimizer.clip_grad_norm_(1e-3)
            forget(optimizer)
        param.grad = torch.ones(4, 64)
        optimizer.step()
        weights.append(param.detach())
    assert torch.equal(*weights)


def test_asking_for_the_norm_clips_nothing_and_undoes_no_clipping() -> None:
    weights = []
    for clips, asks in ((False, True), (True, False), (True, True)):
        param = nn.Parameter(torch.ones(4, 64))
        optimizer = SlimAdamW([param], lr=1e-2, eps=1.0, axes=(1,))
        param.grad = torch.ones(4, 64)
        if clips:
            optimizer.clip_grad_norm_(1e-3)
        if asks:
            assert optimizer.clip_grad_norm_(math.inf) == 16
        optimizer.step()
        weights.append(param.detach())
    assert weights[0].mean() < 0.996
    assert torch.equal(weights[1], weights[2])
    assert weights[1].mean() > 0.999


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_norm_that_is_none_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match=f"max_norm={max_norm} must be a number of at least 0"):
        SlimAdamW([nn.Parameter(torch.ones(2))], lr=1e-3).clip_grad_norm_(max_norm)


def test_float64_and_empty_weights() -> None:
    params = [nn.Parameter(torch.ones(4, 64, dtype=torch.float64)), nn.Parameter(torch.ones(0, 3))]
    optimizer = SlimAdamW(params, lr=1e-3, axes=(0,))
    for param in params:
        param.grad = torch.ones_like(param)
    assert optimizer.clip_grad_norm_(1.0) == 16
    optimizer.step()


def test_a_scaler_unscales_before_and_skips_a_step_that_overflows() -> None:
    weights = []
    for clip in (fused, by_torch):
        param = nn.Parameter(torch.ones(4, 64))
        optimizer = SlimAdamW([param], lr=1e-2, eps=1.0, axes=(1,))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, math.inf, 1.0):
            (scaler.scale((param * factor).sum())).backward()
            scaler.unscale_(optimizer)
            clip(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
            param.grad = None
        weights.append(param.detach())
        assert optimizer.state[param]["step"] == 2
    torch.testing.assert_close(*weights)


def test_without_gradients_the_norm_is_zero() -> None:
    assert SlimAdamW([nn.Parameter(torch.ones(2))], lr=1e-3).clip_grad_norm_(1.0) == 0


@pytest.mark.parametrize("norm_type", [2, 1])
def test_other_parameters_and_norms_are_left_to_accelerate(norm_type: int) -> None:
    hf_lowmem.register()
    accelerator = Accelerator(cpu=True)
    layer = nn.Linear(8, 8)
    built = hf_lowmem.build_optimizer(layer, "slim_adamw", lr=1e-3, optim_args="fused_clip=true")
    optimizer = accelerator.prepare(built)
    for param in layer.parameters():
        param.grad = torch.ones_like(param)
    some = [layer.weight] if norm_type == 2 else list(layer.parameters())
    norm = accelerator.clip_grad_norm_(some, 1.0, norm_type=norm_type)
    assert norm == (8 if norm_type == 2 else 72)
    assert layer.weight.grad.abs().max() < 1
    accelerator.clip_grad_norm_(layer.parameters(), 1e-6)
    assert layer.weight.grad.abs().max() > 1e-3  # by the step, that is
    optimizer.step()


@pytest.mark.parametrize("asks", [True, False])
def test_fused_clip_that_nobody_asks_for_is_said_once(asks: bool, caplog: pytest.LogCaptureFixture) -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = LowMemAdamW([param], lr=1e-3, fused_clip=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            param.grad = torch.ones(4)
            if asks:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    assert caplog.text.count("the optimizer was not asked to clip") == (0 if asks else 1)


def test_a_wrong_value_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="optim_args fused_clip='maybe' is not legal: expected true or false"):
        hf_lowmem.build_optimizer(nn.Linear(2, 2), "slim_adamw", lr=1e-3, optim_args="fused_clip=maybe")
