"""SMMF: the bytes that the paper reports, embeddings that stay, experts that share nothing, and what is stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_lowmem
from hf_lowmem.algorithms import Smmf
from hf_lowmem.codecs import Float32
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.moments import RankOne
from hf_lowmem.moments.rank_one import packed, square_of, unpacked

Shapes = list[tuple[int, ...]]


def batch_normed(*convolutions: tuple[int, ...]) -> Shapes:
    """Return the shapes of convolutions, each followed by a batch normalization."""
    return [shape for conv in convolutions for shape in (conv, conv[:1], conv[:1])]


def resnet50(classes: int) -> Shapes:
    found, channels = batch_normed((64, 3, 7, 7)), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += batch_normed((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
            found += [] if block else batch_normed((4 * width, channels, 1, 1))
            channels = 4 * width
    return [*found, (classes, channels), (classes,)]


def mobilenet_v2(classes: int) -> Shapes:
    found, channels = batch_normed((32, 3, 3, 3)), 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, out, blocks in stages:
        for _ in range(blocks):
            hidden = expansion * channels
            found += batch_normed((hidden, channels, 1, 1)) if expansion > 1 else []
            found += batch_normed((hidden, 1, 3, 3), (out, hidden, 1, 1))
            channels = out
    return [*found, *batch_normed((1280, 320, 1, 1)), (classes, 1280), (classes,)]


@pytest.mark.parametrize(
    ("shapes", "parameters", "mebibytes"),
    [
        (resnet50(1000), 25_557_032, 3.7),
        (resnet50(100), 23_712_932, 3.5),
        (mobilenet_v2(1000), 3_504_872, 0.8),
        (mobilenet_v2(100), 2_351_972, 0.7),
    ],
    ids=["ResNet-50, 1000", "ResNet-50, 100", "MobileNetV2, 1000", "MobileNetV2, 100"],
)
def test_the_declared_bytes_are_those_of_the_paper(shapes: Shapes, parameters: int, mebibytes: float) -> None:
    """In blocks of 512 bytes, as torch allocates on a GPU; the paper cuts off after one digit."""
    assert sum(map(math.prod, shapes)) == parameters
    total = 0
    for shape in shapes:
        specs = Smmf.make_plan(shape, **Smmf.plan_options()).specs(shape)
        total += sum(-(-spec.nbytes // 512) * 512 for spec in specs.values() if not spec.on_host)
    assert math.floor(10 * total / 2**20) / 10 == mebibytes


@pytest.mark.parametrize("mask", [True, False])
def test_rows_without_a_gradient_stay_where_they_are(mask: bool) -> None:
    """In the authors' code they drift."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 56))
    start = model[0].weight.detach().clone()
    optim_args = None if mask else {"mask_zero_grads": False}
    optimizer = hf_lowmem.build_optimizer(model, "smmf", lr=1e-3, weight_decay=0.0, optim_args=optim_args)
    seen = torch.zeros(300, dtype=torch.bool)
    for _ in range(20):
        tokens = torch.randint(0, 150, (16,))
        seen[tokens] = True
        optimizer.zero_grad()
        model(tokens).square().sum().backward()
        optimizer.step()
    moved = (model[0].weight - start).abs().amax(1)
    assert (moved[seen] > 1e-4).all()
    assert (moved[~seen] == 0).all() == mask


def stepped(shape: tuple[int, ...], grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param = nn.Parameter(torch.ones(shape))
    optimizer = Smmf([param], lr=1e-2, weight_decay=0.1, **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("shape", [(3, 9, 15), (4, 16, 24), (3, 40), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("vector_reshape", [True, False])
def test_each_expert_of_a_stack_is_stepped_as_if_it_were_alone(shape: tuple[int, ...], vector_reshape: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for _ in range(4)]
    for grad in grads:
        grad[0] *= 1e-3
    together, _ = stepped(shape, grads, stacked=True, vector_reshape=vector_reshape)
    for expert in range(shape[0]):
        alone, _ = stepped(shape[1:], [grad[expert] for grad in grads], vector_reshape=vector_reshape)
        torch.testing.assert_close(together[expert], alone, rtol=0, atol=1e-6)


def test_vectors_keep_full_moments_where_they_are_not_reshaped() -> None:
    for shape in ((64,), (64, 1)):
        _, state = stepped(shape, [torch.ones(shape)], vector_reshape=False)
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape
    for shape in ((), (1,), (8, 8)):  # one element is no vector
        assert "exp_avg_sign" in stepped(shape, [torch.ones(shape)], vector_reshape=False)[1]


def test_bits_that_change_nothing_are_said(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(8, 8)
    for optim_args in ({"state_bits": 16}, {"embedding_bits": 8}):
        caplog.clear()
        hf_lowmem.build_optimizer(layer, "smmf", lr=1e-3, optim_args=optim_args)
        assert "change nothing under smmf" in caplog.text
    caplog.clear()
    hf_lowmem.build_optimizer(layer, "smmf", lr=1e-3, optim_args={"state_bits": 16, "vector_reshape": False})
    assert "change nothing under smmf" not in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"mask_zero_grads": True}, {"vector_reshape": False}], ids=str)
@pytest.mark.parametrize("shape", [(31, 57), (16, 128), (130,)], ids=str)
def test_a_gradient_that_is_not_finite_concerns_its_own_entry(shape: Any, options: dict[str, Any], bad: float) -> None:
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    grads[1].view(-1)[5] = bad
    found, _ = stepped(shape, grads, **options)
    assert found.flatten().isfinite().logical_not().nonzero().tolist() == [[5]]


def test_zero_gradients_move_nothing_and_stay_finite() -> None:
    found, _ = stepped((6, 7), [torch.zeros(6, 7)] * 3)
    torch.testing.assert_close(found, torch.full((6, 7), (1 - 1e-3) ** 3))


@given(entries=st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_squares_are_as_square_as_they_can_be(entries: int) -> None:
    n, m = square_of(entries)
    assert n * m == entries
    assert m == max(d for d in range(1, math.isqrt(entries) + 1) if entries % d == 0)


@given(shape=st.lists(st.sampled_from([1, 2, 3, 7, 8, 64]), max_size=4).map(tuple), stacked=st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_is_stored_keeps_row_sums_column_sums_and_signs(shape: tuple[int, ...], stacked: bool) -> None:
    moment = RankOne(stacked=stacked and len(shape) > 1)
    specs = moment.specs("m", shape, Float32())
    state = {name: spec.zeros(torch.device("cpu")) for name, spec in specs.items()}
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(moment.ema(state, "m", Float32(), value, 0.0), value)
    stack, n, m = moment.view_of(shape)
    square, sizes = value.view(*stack, n, m), state["m_row"].unsqueeze(-1) * state["m_col"].unsqueeze(-2)
    for axis in (-1, -2):
        torch.testing.assert_close(sizes.sum(axis), square.abs().sum(axis))
    assert torch.equal(unpacked(state["m_sign"].view(*stack, -1), n * m).view(square.shape), square > 0)


def test_bits_are_packed_lowest_first() -> None:
    bits = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1, 1], [0] * 10]).bool()
    assert packed(bits).tolist() == [[129, 3], [0, 0]]
    assert torch.equal(unpacked(packed(bits), 10), bits)


@pytest.mark.parametrize("backend", ["cpu_passes", "in_place", "rule"])
def test_a_gradient_whose_square_overflows_harms_its_own_entry_alone(backend: str) -> None:
    if not BACKENDS[backend].available():
        pytest.skip("the compiled kernels are missing")
    param = nn.Parameter(torch.zeros(24, 40))
    optimizer = Smmf([param], lr=1e-3)
    for number in range(6):
        param.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(number))
        if number == 2:
            param.grad[3, 5] = 1e20
        with forced(backend):
            optimizer.step()
    assert param.abs().max() < 0.01


@pytest.mark.parametrize("optim_args", [None, "mask_zero_grads=false"])
def test_a_transposed_gradient_is_stepped_as_a_contiguous_one(optim_args: str | None) -> None:
    found = []
    for transposed in (True, False):
        layer = nn.Linear(64, 64, bias=False)
        nn.init.constant_(layer.weight, 0.5)
        optimizer = hf_lowmem.build_optimizer(layer, "smmf", lr=1e-2, optim_args=optim_args)
        for number in range(3):
            grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(number))
            layer.weight.grad = grad.t().contiguous().t() if transposed else grad
            optimizer.step()
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found)
