"""Weights narrower than float32: updates that rounding to nearest loses, and the two ways to keep them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hf_lowmem
from hf_lowmem.algorithms import CoapAdamW, LowMemAdamW, SlimAdamW
from hf_lowmem.kernels import forced
from hf_lowmem.rounding import StoredWeight, hashed, noise_key
from hf_lowmem.state import Rounding
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.declarations import DENSE, each_variant, skip_unless_stored

NARROW = [torch.bfloat16, torch.float16]
KEEPING = ["stochastic", "kahan"]


def store(data: torch.Tensor, value: torch.Tensor, key: int) -> torch.Tensor:
    data = data.clone()
    StoredWeight.of(data, Rounding("stochastic"), {}, key).store(value.clone())
    return data


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_gives_one_of_the_two_neighbours(dtype: torch.dtype, data: st.DataObject) -> None:
    largest = 2.0**99 if dtype == torch.bfloat16 else 2.0**15
    value = torch.tensor(
        data.draw(st.lists(st.floats(-largest, largest, width=32, allow_subnormal=False), min_size=1, max_size=20))
    )
    nearest = value.to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    down = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    rounded = store(nearest, value, data.draw(st.integers(-(2**31), 2**31 - 1)))
    below, above = (
        torch.where(nearest.float() > value, down, nearest),
        torch.where(nearest.float() < value, up, nearest),
    )
    normal = value.abs() > 1e-30  # of the smallest magnitudes the grid is coarser in bfloat16
    assert ((rounded == below) | (rounded == above))[normal | (value == 0)].all()
    assert torch.equal(store(nearest, nearest.float(), 5)[normal], nearest[normal])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_keeps_the_mean(dtype: torch.dtype, device: str) -> None:
    value = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(device)
    draws = [store(value.to(dtype), value, noise_key(seed=0, number=3, step=step)).float() for step in range(2000)]
    unit = value.abs() * torch.finfo(dtype).eps
    bias = ((torch.stack(draws).mean(0) - value) / unit).abs()
    # One draw is off by up to one unit with a variance of at most 1/4: the mean of 2000 by 0.011 at most, and its mean
    # magnitude over the entries is below that. Rounding to nearest is off by a quarter of a unit on average.
    assert bias.mean() < 0.011
    assert bias.max() < 0.06


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stochastic_rounding_leaves_what_is_not_finite(dtype: torch.dtype) -> None:
    value = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    assert torch.equal(store(value.to(dtype), value, 1).nan_to_num(7.0), value.to(dtype).nan_to_num(7.0))


def test_noise_is_uniform_and_differs_by_step_parameter_and_seed() -> None:
    keys = [noise_key(*numbers) for numbers in [(0, 0, 1), (0, 0, 2), (0, 1, 1), (1, 0, 1)]]
    draws = [hashed(torch.arange(1 << 16, dtype=torch.int32), key, 16).float() / 2**16 for key in keys]
    for draw in draws:
        assert abs(draw.mean() - 0.5) < 0.005
        assert abs(draw.var() - 1 / 12) < 0.002
        assert abs(torch.corrcoef(torch.stack([draw[1:], draw[:-1]]))[0, 1]) < 0.015
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(4)).abs().max() < 0.015


def test_a_tile_or_view_draws_what_the_whole_weight_does(device: str) -> None:
    """And a weight on CUDA what one on the CPU does."""
    value = torch.rand(32, 64)
    whole = store(torch.zeros(32, 64, dtype=torch.bfloat16), value, 9).to(device)
    value = value.to(device)
    data = torch.zeros(40, 64, dtype=torch.bfloat16, device=device)[8:]  # a weight that starts inside of its storage
    weight = StoredWeight.of(data, Rounding("stochastic"), {}, 9)
    for view in (lambda t: t.unflatten(0, (2, -1))[:, 3:7], lambda t: t[5:9], lambda t: t.mT[10:20]):
        weight.map(view).store(view(value).clone())
        assert torch.equal(view(data), view(whole))


def run(
    cls: type, options: dict[str, Any], shape: tuple[int, ...], steps: int = 4, device: str = "cpu", **more: Any
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(device, torch.bfloat16))
    group = {"params": [param], **options, "min_8bit_size": 0}
    optimizer = cls([group], lr=1e-3, weight_decay=0.1, **more)
    for _ in range(steps):
        param.grad = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize("kernels", ["compiled", 64, 1 << 20])
@pytest.mark.parametrize("rounding", ["nearest", *KEEPING])
@pytest.mark.parametrize("bits", [32, 8])
@each_variant()
def test_kernels_round_as_the_rules_do(
    cls: type,
    options: dict,
    shape: tuple,
    bits: int,
    rounding: str,
    kernels: Any,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    force: Any,
) -> None:
    skip_unless_stored(cls, bits)
    more = {"state_bits": bits, "block_size": 64, "rounding": rounding, "device": device}
    with forced("rule"):
        expected, reference = run(cls, options, shape, **more)
    if kernels != "compiled":
        force("in_place", "tiles", "rule")
        monkeypatch.setattr("hf_lowmem.kernels.means.TILE", kernels)
        monkeypatch.setattr("hf_lowmem.kernels.means.ACCELERATOR_TILE", kernels)
    actual, optimizer = run(cls, options, shape, **more)
    (mine,), (theirs,) = optimizer.state.values(), reference.state.values()
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    # Arithmetic in another order may tip an entry to its other neighbour: rarely, and by one unit.
    unit = expected.float().abs() * torch.finfo(torch.bfloat16).eps + 1e-6
    assert ((actual.float() - expected.float()).abs() <= unit).all()
    assert (actual != expected).float().mean() < (0.005 if bits == 32 else 0.02)


@pytest.mark.parametrize("name", hf_lowmem.optim_names())
def test_a_bfloat16_quadratic_stalls_with_nearest_rounding_only(name: str, device: str) -> None:
    """Half the squared distance to a target, at a learning rate of a tenth of a unit in the last place."""
    left = {}
    for rounding in ("nearest", *KEEPING):
        generator = torch.Generator().manual_seed(0)
        layer = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            layer.weight.copy_(1.05 + 0.8 * torch.rand(64, 64, generator=generator))  # one unit is 1/128
        layer.to(device, torch.bfloat16)
        # An offset of rank one, so that the optimizers that project see all of it.
        target = layer.weight.detach().float() - 0.06
        optim_args = {"rounding": rounding, "min_8bit_size": 0, **DENSE[recipe_for(name).optimizer_cls]}
        optimizer = hf_lowmem.build_optimizer(layer, name, lr=1 / 1280, optim_args=optim_args)
        distance = (layer.weight - target).abs().mean().item()
        start = layer.weight.detach().clone()
        for _ in range(120):
            layer.weight.grad = (layer.weight - target).bfloat16()
            optimizer.step()
        left[rounding] = (layer.weight - target).abs().mean().item() / distance
        if rounding == "nearest":
            assert torch.equal(layer.weight, start)
    assert left["nearest"] == 1
    assert left["stochastic"] < 0.3
    assert left["kahan"] < 0.3


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("lr", [1e-2, 1e-6])
def test_kahan_keeps_what_float32_would(dtype: torch.dtype, lr: float, device: str, force: Any) -> None:
    if dtype == torch.float16:  # which the compiled kernels do not take: the float32 run must round as this one does
        force("triton" if device == "cuda" else "tiles")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(32, 64, generator=generator).to(device, dtype)
    grads = [torch.randn(32, 64, generator=generator).to(device, dtype) + 0.5 for _ in range(200)]
    weights = []
    for dtype_of_run in (dtype, torch.float32):
        param = nn.Parameter(start.to(dtype_of_run, copy=True))
        optimizer = SlimAdamW([{"params": [param], "axes": (1,)}], lr=lr, weight_decay=0.1, rounding="kahan")
        for grad in grads:
            param.grad = grad.to(dtype_of_run)
            optimizer.step()
        state = optimizer.state[param]
        assert ("kahan_comp" in state) == (dtype_of_run == dtype)
        weights.append(StoredWeight.of(param.detach(), Rounding.of("kahan", dtype_of_run), state, 0).load())
    narrow, full = weights
    assert (full - start.float()).abs().mean() > 20 * lr
    assert ((narrow - full).abs() <= 64 * torch.finfo(torch.float32).eps * full.abs().clamp(min=0.01)).all()


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("cls", [LowMemAdamW, CoapAdamW])
@pytest.mark.parametrize("rounding", KEEPING)
def test_compiled_steps_round_the_same(cls: type, rounding: str) -> None:
    expected, _ = run(cls, {}, (64, 128), steps=2, rounding=rounding)
    actual, _ = run(cls, {}, (64, 128), steps=2, rounding=rounding, compile=True)
    assert (actual != expected).float().mean() < 0.005


@pytest.mark.parametrize(("rounding", "buffer"), [("nearest", 0), ("stochastic", 0), ("kahan", 2)])
@pytest.mark.parametrize("name", ["slim_adamw_8bit", "coap_adamw_8bit", "soap"])
def test_kahans_buffer_is_declared_and_counted(name: str, rounding: str, buffer: int) -> None:
    layers = [nn.Linear(256, 256).bfloat16(), nn.Linear(256, 256)]
    model = nn.Sequential(*layers)
    plain = hf_lowmem.explain(model, name).nbytes
    options = {"rounding": rounding}
    explanation = hf_lowmem.explain(model, name, options)
    narrow = sum(param.numel() for param in layers[0].parameters())
    assert explanation.nbytes == plain + buffer * narrow
    optimizer = hf_lowmem.build_optimizer(model, name, lr=1e-3, optim_args=options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(t.nbytes for state in optimizer.state.values() for t in state.values()) == explanation.nbytes
    assert ("Kahan" in str(explanation)) == (rounding == "kahan")


def test_rounding_may_change_when_a_run_is_resumed(caplog: pytest.LogCaptureFixture) -> None:
    """The meter advises it: Kahan's buffer starts at zero, or is left out."""
    caplog.set_level("INFO", logger="hf_lowmem")
    written = {rounding: run(SlimAdamW, {}, (16, 128), rounding=rounding)[1] for rounding in ("nearest", "kahan")}
    for saved, resumed in (("nearest", "kahan"), ("kahan", "nearest")):
        optimizer = run(SlimAdamW, {}, (16, 128), steps=0, rounding=resumed)[1]
        optimizer.load_state_dict(copy.deepcopy(written[saved].state_dict()))
        (state,), (before,) = optimizer.state.values(), written[saved].state.values()
        assert optimizer.param_groups[0]["rounding"] == resumed
        assert torch.equal(state["exp_avg"], before["exp_avg"])
        fresh, (param,) = run(SlimAdamW, {}, (16, 128), steps=0, rounding=resumed)[1], optimizer.state
        fresh.load_state_dict(copy.deepcopy(written["nearest"].state_dict()))  # which never had a buffer
        (other,) = fresh.param_groups[0]["params"]
        param.grad = other.grad = torch.ones_like(param)
        optimizer.step()
        fresh.step()
        assert ("kahan_comp" in state) == (resumed == "kahan")
        assert all(torch.equal(state[name], fresh.state[other][name]) for name in state if "kahan" in name)
    assert "Kahan's buffers of 1 weights were started at zero" in caplog.text
    assert "Kahan's buffers of 1 weights were left out" in caplog.text


def test_kahans_buffer_is_kept_for_a_weight_that_is_float32_while_it_is_loaded() -> None:
    """TRL reads the adapters of QLoRA so, and casts them to bfloat16 afterwards."""
    optimizer = run(SlimAdamW, {}, (16, 128), rounding="kahan")[1]
    (before,) = optimizer.state.values()
    assert before["kahan_comp"].any()
    resumed = run(SlimAdamW, {}, (16, 128), steps=0, rounding="kahan")[1]
    (param,) = resumed.param_groups[0]["params"]
    param.data = param.data.float()
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.state[param]["kahan_comp"], before["kahan_comp"])
    param.data = param.data.bfloat16()
    param.grad = torch.ones_like(param)
    resumed.step()


def test_kahan_follows_a_weight_whose_dtype_changes() -> None:
    param = nn.Parameter(torch.ones(64))
    optimizer = SlimAdamW([param], lr=1e-3, rounding="kahan")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        param.data = param.data.to(dtype)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert ("kahan_comp" in optimizer.state[param]) == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("rounding=up", "rounding='up' is not legal: expected one of nearest, stochastic, kahan"),
        ("rounding_seed=-1", "rounding_seed=-1 must be a whole number of at least 0"),
        ("offload_state=maybe", "offload_state='maybe' is not legal: expected true or false"),
    ],
)
def test_wrong_options_are_named(optim_args: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_lowmem.build_optimizer(nn.Linear(4, 4), "soap", lr=1e-3, optim_args=optim_args)


def test_a_class_refuses_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="SlimAdamW has no option 'roundings'"):
        SlimAdamW([nn.Parameter(torch.ones(3))], roundings="kahan")


def test_rounding_without_a_narrow_weight_is_said(caplog: pytest.LogCaptureFixture) -> None:
    hf_lowmem.build_optimizer(nn.Linear(4, 4), "slim_adamw", lr=1e-3, optim_args="rounding=kahan")
    assert "rounding=kahan does nothing here" in caplog.text
