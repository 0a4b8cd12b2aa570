"""SOAP through its class: which axes, whose basis, what a bad gradient does, and what it costs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.algorithms import Soap
from hf_lowmem.kernels import forced

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)


def gradients(shape: tuple[int, ...], steps: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def run(start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param = nn.Parameter(start.clone())
    optimizer = Soap([param], lr=1e-2, **{"precondition_frequency": 2, **options})
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize(
    ("shape", "options", "axes"),
    [
        ((8, 6), {}, [1]),
        ((6, 8), {}, [0]),
        ((8, 8), {}, [1]),
        ((8, 6), {"sides": "both"}, [0, 1]),
        ((8, 6), {"sides": "both", "max_precond_dim": 7}, [1]),
        ((8, 6), {"max_precond_dim": 5}, []),
        ((3, 8, 6), {"stacked": True}, [2]),
        ((3, 6, 8), {"stacked": True, "sides": "both"}, [1, 2]),
        ((8, 6, 3, 3), {}, [1]),
        ((8, 6, 3, 3), {"sides": "both"}, [0, 1, 2, 3]),
        ((8, 1), {}, []),
        ((8,), {"sides": "both"}, []),
        ((), {}, []),
        ((8, 6), {"project": False}, []),
    ],
)
def test_which_axes_have_a_basis(shape: tuple[int, ...], options: dict[str, Any], axes: list[int]) -> None:
    _, state = run(torch.randn(shape), gradients(shape, 3), **options)
    found = sorted(int(name.removeprefix("proj_")) for name in state if name.startswith("proj_") and state[name].ndim)
    assert found == axes
    for axis in axes:
        basis = state[f"proj_{axis}"]
        assert basis.shape[-1] == shape[axis]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(shape[axis]).expand_as(basis), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"state_bits": 16}, torch.bfloat16),
        ({"state_bits": 8}, torch.bfloat16),
        ({"proj_bits": 16}, torch.bfloat16),
        ({"state_bits": 8, "proj_bits": 32}, torch.float32),
    ],
)
def test_the_bits_of_the_bases(options: dict[str, Any], dtype: torch.dtype) -> None:
    start, grads = torch.randn(48, 32), gradients((48, 32), 40)
    expected, exact = run(start, grads, **options, **({} if "proj_bits" in options else {"proj_bits": 32}))
    actual, state = run(start, grads, **options)
    assert state["gram_1"].dtype == torch.float32
    assert state["proj_1"].dtype == dtype
    basis = state["proj_1"].float()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(32), atol=5e-3, rtol=0)  # after twenty changes
    torch.testing.assert_close(state["gram_1"], exact["gram_1"])
    assert (actual - expected).norm() < 0.05 * (expected - start).norm()


@pytest.mark.parametrize("sides", ["one", "both"])
@pytest.mark.parametrize("shape", [(3, 10, 6), (3, 6, 10)])
def test_each_expert_has_its_own_basis(shape: tuple[int, ...], sides: str) -> None:
    if sides == "both":  # with one gradient the longer side has no unique basis
        shape = (3, 8, 8)
    start, grads = torch.randn(shape), gradients(shape)
    stacked, _ = run(start, grads, stacked=True, sides=sides)
    for expert in range(3):
        alone, _ = run(start[expert], [grad[expert] for grad in grads], sides=sides)
        torch.testing.assert_close(stacked[expert], alone, rtol=1e-4, atol=1e-5)


def test_the_first_call_takes_no_step() -> None:
    start, grads = torch.randn(8, 6), gradients((8, 6))
    unchanged, state = run(start, grads[:1], weight_decay=0.1)
    assert torch.equal(unchanged, start)
    assert not state["exp_avg"].any()
    moved, _ = run(start, grads[:2], weight_decay=0.1)
    assert not torch.equal(moved, start)


def test_an_expert_without_a_gradient_waits_for_its_basis() -> None:
    grads = gradients((2, 8, 6))
    for grad in grads[:3]:
        grad[1] = 0
    start = torch.randn(2, 8, 6)
    waiting, state = run(start, grads[:3], stacked=True, weight_decay=0.0)
    assert torch.equal(waiting[1], start[1])
    assert not state["proj_2"][1].any()
    assert state["proj_count"] == 1
    later, state = run(start, grads, stacked=True, weight_decay=0.0)
    assert state["proj_count"] == 2
    assert not torch.equal(later[1], start[1])
    assert (later[1] - start[1]).abs().max() < 10 * (later[0] - start[0]).abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_never_reaches_the_basis(bad: float) -> None:
    grads = gradients((2, 8, 6))
    grads[3][0, 2, 1] = bad
    param, state = run(torch.randn(2, 8, 6), grads, stacked=True)
    assert state["gram_2"].isfinite().all()
    assert state["proj_2"].isfinite().all()
    assert param[1].isfinite().all()


def test_tiny_gradients_have_a_basis() -> None:
    _, state = run(torch.randn(8, 6), [1e-12 * grad for grad in gradients((8, 6))])
    basis = state["proj_1"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(
    ("shape", "options"),
    [((12,), {}), ((), {}), ((24, 64), {}), ((64, 64), {"sides": "both"}), ((3, 16, 64), {"stacked": True})],
    ids=str,
)
def test_the_kernel_computes_what_the_rule_defines(
    shape: tuple[int, ...], options: dict[str, Any], bits: int, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "normalize_grads": normalize, "state_bits": bits, "min_8bit_size": 0, "weight_decay": 0.1}
    start, grads = torch.randn(shape), gradients(shape, 5)
    with forced("rule"):
        expected, _ = run(start, grads, **options)
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 512)
    actual, _ = run(start, grads, **options)
    # A code on the boundary of two may fall to either side.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 if bits == 32 else 5e-3)


def test_normalized_updates_have_unit_size() -> None:
    start, grads = torch.randn(16, 8), gradients((16, 8), 2)
    moved, _ = run(start, grads, normalize_grads=True, weight_decay=0.0, correct_bias=False)
    assert (moved - start).square().mean().sqrt().item() == pytest.approx(1e-2, rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 7, 64]), max_size=4).map(tuple),
    sides=st.sampled_from(["one", "both"]),
    bits=st.sampled_from([32, 16, 8]),
    stacked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(shape: tuple[int, ...], sides: str, bits: int, stacked: bool, dtype: torch.dtype) -> None:
    """Finite, as declared, and the same after a round trip in the middle, across changes of basis."""
    options: dict[str, Any] = dict(sides=sides, state_bits=bits, min_8bit_size=0, precondition_frequency=2)
    options["stacked"] = stacked and len(shape) == 3
    param = nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = Soap([param], **options)
    grads = gradients(shape, 6, dtype)
    for call, grad in enumerate(grads):
        if call == 3:
            twin_param = nn.Parameter(param.detach().clone())
            twin = Soap([twin_param], **options)
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        param.grad = grad
        optimizer.step()
        if call >= 3:
            twin_param.grad = grad.clone()
            twin.step()
    assert torch.isfinite(param).all()
    assert torch.equal(param, twin_param)
    specs = optimizer.plan(optimizer.param_groups[0], shape).specs(shape)
    state = optimizer.state[param]
    assert {n: (tuple(t.shape), t.dtype) for n, t in state.items()} == {
        n: (s.shape, s.dtype) for n, s in specs.items()
    }


def test_8_bit_state_stays_close(caplog: pytest.LogCaptureFixture) -> None:
    start, grads = torch.randn(128, 64), gradients((128, 64), 12)
    exact, _ = run(start, grads)
    stored, state = run(start, grads, state_bits=8)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert (stored - start).abs().max() < 2 * (exact - start).abs().max()
    assert torch.nn.functional.cosine_similarity((stored - start).flatten(), (exact - start).flatten(), dim=0) > 0.99


def test_the_summary_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    explanation = hf_lowmem.explain(model, "soap")
    said = f"SOAP is for quality, not for memory: its state takes {explanation.bytes_per_param:.2f} bytes"
    assert said in explanation.by_role()
    with caplog.at_level(logging.WARNING, "hf_lowmem"):
        hf_lowmem.build_optimizer(model, "soap", lr=1e-3)
    assert said in caplog.text


def test_experts_stored_either_way_have_a_basis_each() -> None:
    model = GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2))
    rows = {row.name: row for row in hf_lowmem.explain(model, "soap").rows}
    experts = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shape == (4, 32, 96)
    assert experts.state["proj_1"][0] == experts.state["gram_1"][0] == (4, 32, 32)
    assert "proj_1" not in rows["model.layers.0.mlp.router.weight"].state
    assert "proj_1" not in rows["model.embed_tokens.weight"].state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency=0"),
        ({"sides": "two"}, "sides='?two"),
        ({"max_precond_dim": 0}, "max_precond_dim=0"),
        ({"shampoo_beta": 1.0}, "shampoo_beta=1"),
        ({"proj_bits": 8}, "proj_bits=8"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Soap([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        hf_lowmem.build_optimizer(nn.Linear(4, 4), "soap", lr=1e-3, optim_args=options)


@pytest.mark.compiler
@pytest.mark.slow
def test_compiled_steps_compute_what_the_rule_defines() -> None:
    start, grads = torch.randn(64, 64), gradients((64, 64), 4)
    for bits, tolerance in ((32, 1e-5), (8, 2e-2)):
        options: dict[str, Any] = {"state_bits": bits, "min_8bit_size": 0}
        eager, _ = run(start, grads, **options)
        compiled, _ = run(start, grads, compile=True, **options)
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=tolerance)


def test_a_checkpoint_with_float32_bases_asks_for_them() -> None:
    """They were the only kind once, also beside 8-bit moments."""
    start, options = torch.zeros(96, 64), {"state_bits": 8, "min_8bit_size": 0}
    saved = Soap([nn.Parameter(start.clone())], proj_bits=32, **options)
    for saved.param_groups[0]["params"][0].grad in gradients((96, 64), 2):
        saved.step()
    written = saved.state_dict()
    del written["layouts"][0][0]["proj_bits"]  # which there was no option for
    with pytest.raises(ValueError, match=r"'proj_1' has .* Resume with proj_bits=32\."):
        Soap([nn.Parameter(start.clone())], **options).load_state_dict(written)
    resumed = Soap([nn.Parameter(start.clone())], proj_bits=32, **options)
    resumed.load_state_dict(written)
    assert next(iter(resumed.state.values()))["proj_1"].dtype == torch.float32
