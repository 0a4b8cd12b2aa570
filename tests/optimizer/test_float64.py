"""float64 weights are stepped in float64, with float64 state, by every optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem.algorithms import SlimAdamW
from tests.support.declarations import each_variant

EACH = each_variant(soon=True, storages=("32-bit", "8-bit"))


def run(cls: type, options: dict, start: torch.Tensor, lr: float, dtype: torch.dtype, steps: int = 6) -> Any:
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(start.to(dtype, copy=True))
    optimizer = cls([param], lr=lr, **options)
    for step in range(steps):
        param.grad = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(dtype)
        if step % 2:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return param.detach(), optimizer


@EACH
def test_weights_move_by_less_than_float32_can_hold(cls: type, options: dict, shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    after, optimizer = run(cls, options, start, 1e-12, torch.float64)
    moved = (after - start).abs()
    assert 1e-13 < moved.max() < 1e-10
    assert (after != after.float().double()).float().mean() > 0.99
    (state,) = optimizer.state.values()
    kinds = {tensor.dtype for name, tensor in state.items() if tensor.ndim and not name.endswith("_absmax")}
    assert torch.float32 not in kinds


@EACH
def test_a_step_is_that_of_float32_weights_up_to_rounding(cls: type, options: dict, shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    double, _ = run(cls, options, start, 1e-3, torch.float64)
    single, _ = run(cls, options, start, 1e-3, torch.float32)
    off, moved = (double - single).abs(), (double - start).abs()
    if options.get("sides") == "both":  # directions that the first gradients do not have are any
        torch.testing.assert_close((single - start).norm(), moved.norm(), rtol=0.1, atol=0)
        return
    # Codes fall to either side of a boundary, and SOAP scales rounding errors up.
    assert (off < 2e-5).float().mean() > (0.9 if options.get("state_bits", 32) == 32 else 0.5)
    assert off.mean() < 0.05 * moved.mean()


def test_adamw_to_the_last_digits() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).double()
    twin = copy.deepcopy(layer)
    ours = hf_lowmem.build_optimizer(layer, "lowmem_adamw", lr=1e-12)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-12, weight_decay=0.0)
    start = layer.weight.detach().clone()
    for _ in range(20):
        batch = torch.randn(8, 64, dtype=torch.float64)
        for each, optimizer in ((layer, ours), (twin, adamw)):
            optimizer.zero_grad()
            each(batch).square().mean().backward()
            optimizer.step()
    assert (layer.weight - start).abs().max() > 1e-11
    torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("optim", hf_lowmem.optim_names())
def test_state_is_as_declared_and_resumes(optim: str) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).double()
    twin = copy.deepcopy(layer)
    optimizer, other = (
        hf_lowmem.build_optimizer(each, optim, lr=1e-3, optim_args={"min_8bit_size": 0}) for each in (layer, twin)
    )

    def train(each: nn.Module, its: torch.optim.Optimizer) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            its.zero_grad()
            each(torch.randn(8, 64, generator=generator, dtype=torch.float64)).square().mean().backward()
            its.step()

    train(layer, optimizer)
    rows = {row.name: row for row in hf_lowmem.explain(layer, optim, {"min_8bit_size": 0}).rows}
    for name, param in layer.named_parameters():
        held = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in optimizer.state[param].items()}
        assert held == rows[name].state
    twin.load_state_dict(layer.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(layer, optimizer)
    train(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))


@EACH
def test_a_model_may_change_its_dtype_between_steps(cls: type, options: dict, shape: tuple[int, ...]) -> None:
    """State follows: float32 becomes float64 and back, whatever else it holds."""
    _, optimizer = run(cls, options, torch.randn(shape), 1e-3, torch.float32, steps=2)
    (weight,) = optimizer.state
    for dtype in (torch.float64, torch.float32):
        weight.data, weight.grad = weight.data.to(dtype), None
        weight.grad = torch.randn(shape, dtype=dtype)
        optimizer.step()
        wide = {t.dtype for n, t in optimizer.state[weight].items() if t.is_floating_point() and t.ndim}
        assert dtype in wide or not wide - {torch.bfloat16, torch.float32}
        assert weight.isfinite().all()


@pytest.mark.parametrize("written", [torch.float32, torch.float64])
def test_a_checkpoint_may_be_read_by_weights_of_the_other_dtype(written: torch.dtype) -> None:
    start = torch.randn(64, 64)
    read = torch.float64 if written == torch.float32 else torch.float32
    _, writer = run(SlimAdamW, {"axes": (1,)}, start, 1e-3, written)
    param = nn.Parameter(start.to(read))
    reader = SlimAdamW([param], axes=(1,))
    reader.load_state_dict(writer.state_dict())
    param.grad = torch.ones_like(param)
    reader.step()
    assert reader.state[param]["exp_avg"].dtype == read
