"""What a step computes: kernels as the rules define, weights of any shape and dtype, and bad gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW, LowMemAdamW, Signum, SlimAdamW, Soap
from hf_lowmem.kernels import forced
from tests.support.declarations import BY_SIGN, FULL_SPACE, each_variant


def run(
    cls: type, options: dict[str, Any], param: torch.Tensor, grads: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    param = nn.Parameter(param.clone(memory_format=torch.preserve_format))
    optimizer = cls([param], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)
    for grad in grads:
        param.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return param.detach(), optimizer


def gradients(shape: tuple[int, ...], steps: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


@pytest.mark.parametrize("kernels", ["compiled", 64, 512, 1 << 20])
@pytest.mark.parametrize("bits", [32, 16, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_kernels_compute_what_the_rules_define(
    cls: type,
    options: dict,
    shape: tuple[int, ...],
    bits: int,
    kernels: Any,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    force: Any,
) -> None:
    """The compiled kernels, and those in plain torch with tiles of several sizes."""
    options = {**options, "state_bits": bits, "min_8bit_size": 0, "block_size": 64}
    start, grads = torch.randn(shape).to(device), [grad.to(device) for grad in gradients(shape)]
    with forced("rule"):
        expected, reference = run(cls, options, start, grads)
    if kernels != "compiled":
        force("in_place", "tiles", "rule")
        monkeypatch.setattr("hf_lowmem.kernels.means.TILE", kernels)
        monkeypatch.setattr("hf_lowmem.kernels.means.ACCELERATOR_TILE", kernels)
    actual, optimizer = run(cls, options, start, grads)
    # A code on the boundary of two may fall to either side: one code is 1.4 % of its block's largest entry.
    tolerance = 1e-6 if bits == 32 else 2e-3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=tolerance)
    mine, theirs = next(iter(optimizer.state.values())), next(iter(reference.state.values()))
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


@pytest.mark.parametrize("bits", [32, 16, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_state_bytes_equal_the_declared_bytes(cls: type, options: dict, shape: tuple[int, ...], bits: int) -> None:
    options = {**options, "state_bits": bits, "min_8bit_size": 0}
    _, optimizer = run(cls, options, torch.randn(shape), gradients(shape, 1))
    (param,) = optimizer.state
    declared = optimizer.plan(optimizer.param_groups[0], shape)
    assert sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values()) == declared.nbytes(shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in optimizer.state[param].items()} == {
        n: (s.shape, s.dtype) for n, s in declared.specs(shape).items()
    }


@pytest.mark.parametrize("bits", [32, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_bfloat16_weights_follow_the_float32_rule(cls: type, options: dict, shape: tuple[int, ...], bits: int) -> None:
    options = {**options, "state_bits": bits, "min_8bit_size": 0}
    torch.manual_seed(0)  # how many entries lie on a boundary is a matter of luck
    start, grads = torch.randn(shape).bfloat16(), gradients(shape, 1, torch.bfloat16)
    actual, optimizer = run(cls, options, start, grads)
    expected, _ = run(cls, options, start.float(), [g.float() for g in grads])
    assert actual.dtype == torch.bfloat16
    assert (actual != expected.bfloat16()).sum() <= max(1, 0.005 * start.numel())  # one may lie on the boundary of two
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=2.0**-7, atol=0)
    if cls not in BY_SIGN and bits == 32:
        assert all(t.dtype == torch.float32 for t in optimizer.state[next(iter(optimizer.state))].values())


def test_lowmem_adamw_is_adamw() -> None:
    start, grads = torch.randn(37, 19), gradients((37, 19), 20)
    actual, _ = run(LowMemAdamW, {}, start, grads)
    expected, _ = run(torch.optim.AdamW, {}, start, grads)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7, 64, 67]), max_size=4).map(tuple)


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    which=st.sampled_from([declared.cls for declared in FULL_SPACE]),
    bits=st.sampled_from([32, 16, 8]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_any_shape(shape: tuple[int, ...], which: type, bits: int, transposed: bool, data: st.DataObject) -> None:
    """Size-1 and prime axes, 0-d, empty, 3-D and 4-D, weights and gradients that are not contiguous."""
    options: dict[str, Any] = {"state_bits": bits, "min_8bit_size": 0}
    if "axes" in which.layout_options and shape:
        options["axes"] = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    start, grads = torch.randn(shape), gradients(shape, 2)
    expected, _ = run(which, options, start, grads)
    assert torch.isfinite(expected).all()
    if transposed:
        order = tuple(reversed(range(len(shape))))
        actual, _ = run(
            which,
            options,
            start.permute(order).contiguous().permute(order),
            [g.permute(order).contiguous().permute(order) for g in grads],
        )
        if which in BY_SIGN:  # a momentum of almost nothing has either sign
            assert ((actual - expected).abs() > 1e-3).sum() <= 1 + 1e-5 * actual.numel()
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3 if bits == 8 else 1e-5)


# -- NaN and Inf ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [32, 16, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_non_finite_gradients_do_what_they_do_under_adamw(
    cls: type, options: dict, shape: tuple[int, ...], bits: int, bad: float
) -> None:
    grads = gradients(shape, 6)
    grads[2].view(-1)[5] = bad
    options = {**options, "state_bits": bits, "min_8bit_size": 0, "block_size": 64}
    actual, _ = run(cls, options, torch.ones(shape), grads)
    adamw, _ = run(torch.optim.AdamW, {}, torch.ones(shape), grads)
    assert torch.isfinite(adamw).sum() == adamw.numel() - 1
    assert torch.isfinite(actual)[torch.isfinite(adamw)].all()
    assert torch.equal(torch.isfinite(actual), torch.isfinite(adamw))


def test_tables_are_made_whatever_the_default_device_is() -> None:
    from hf_lowmem.codecs.dynamic_map import decode_table, encode_table

    known = [table(True, torch.device("cpu")) for table in (decode_table, encode_table)]
    for default in (lambda: torch.device("meta"), lambda: default_dtype(torch.bfloat16)):
        with default():
            fresh = [table.__wrapped__(True, torch.device("cpu")) for table in (decode_table, encode_table)]
        assert all(not table.is_meta and torch.equal(table, old) for table, old in zip(fresh, known, strict=True))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


PROJECTED = {"rank": 4, "update_interval": 2, "reproject_factor": 2}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((LowMemAdamW, {}), (SlimAdamW, {"axes": (1,)}), (Signum, {})),
        *((CoapAdamW, PROJECTED), (CoapAdafactor, PROJECTED), (Soap, {"precondition_frequency": 2})),
    ],
)
def test_the_default_dtype_changes_nothing(cls, options, bits, compiled, force) -> None:
    """Scripts set it to bfloat16 to load a model."""
    if not compiled:
        force("rule")
    generator, found = torch.Generator(), []
    for dtype in (torch.float32, torch.bfloat16):
        generator.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (32, 16, 3, 3))]
        with default_dtype(dtype):
            optimizer = cls(params[: 1 if cls is SlimAdamW else 2], state_bits=bits, min_8bit_size=0, **options)
            for _ in range(5):
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
                optimizer.step()
        states = (tensor for state in optimizer.state.values() for tensor in state.values())
        found.append([*params, *states])
    assert any("proj" in name for name in optimizer.state[params[0]]) == (cls in (CoapAdamW, CoapAdafactor, Soap))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))


def test_signum_in_8_bit_stops_small_entries_earlier() -> None:
    """An entry seen once moves by lr until its momentum is below what its block's codes can hold."""

    def last_move(bits: int) -> int:
        param = nn.Parameter(torch.zeros(1, 64))
        optimizer = Signum([param], lr=1.0, betas=(0.5, 0.9), state_bits=bits, min_8bit_size=0)
        moves = []
        for step in itertools.count():
            param.grad = torch.ones_like(param)
            param.grad[0, 0] = 1.0 if step == 0 else 0.0
            before = param[0, 0].item()
            optimizer.step()
            moves.append(param[0, 0].item() != before)
            if step == 60:
                return max(i for i, moved in enumerate(moves) if moved)
        raise AssertionError

    assert last_move(32) == 60
    assert 15 < last_move(8) < 40


@pytest.mark.compiler
@pytest.mark.slow
def test_compiled_steps_do_not_recompile_with_the_lr() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start, grads = torch.randn(16, 128), gradients((16, 128))
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    options = {"axes": (1,), "state_bits": 8, "min_8bit_size": 0}
    compiled, plain = SlimAdamW(params[:1], compile=True, **options), SlimAdamW(params[1:], **options)
    for step, grad in enumerate(grads):
        for param, optimizer in zip(params, (compiled, plain), strict=True):
            param.grad = grad
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(params[0], params[1], rtol=1e-4, atol=1e-3)


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options", "shape"),
    [(LowMemAdamW, {}, (5, 300)), (SlimAdamW, {"axes": (1,)}, (7, 513)), (Signum, {}, (9, 30, 3, 3))],
)
def test_compiled_steps_take_short_blocks(cls: type, options: dict, shape: tuple[int, ...]) -> None:
    options, start, grads = {**options, "state_bits": 8, "min_8bit_size": 0}, torch.randn(shape), gradients(shape)
    expected, plain = run(cls, options, start, grads)
    actual, compiled = run(cls, {**options, "compile": True}, start, grads)
    (mine,), (theirs,) = compiled.state.values(), plain.state.values()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-2 if cls in BY_SIGN else 1e-3)  # a sign may flip
    assert (actual - expected).abs().gt(1e-4).float().mean() < 0.02
    torch.testing.assert_close(mine["exp_avg_absmax"], theirs["exp_avg_absmax"], rtol=1e-2, atol=0)
    assert (mine["exp_avg"].int() - theirs["exp_avg"].int()).abs().float().mean() < 0.02


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.sampled_from([1, 2, 3, 5]), max_size=3),
    columns=st.sampled_from([1, 2, 7, 63, 64, 65, 127, 129, 251, 255, 256, 257, 521]),
    which=st.sampled_from([LowMemAdamW, SlimAdamW, Signum]),
    block_size=st.sampled_from([256, 128, 64]),
)
def test_8_bit_state_of_any_size_is_as_planned_and_resumes(
    rows: list[int], columns: int, which: type, block_size: int
) -> None:
    """Bytes as declared, and a run that is saved and loaded goes on bit for bit."""
    shape = (*rows, columns)
    options: dict[str, Any] = {"state_bits": 8, "min_8bit_size": 0, "block_size": block_size}
    options |= {"axes": (len(shape) - 1,)} if which is SlimAdamW else {}
    start, grads = torch.randn(shape), gradients(shape, 4)
    whole, _ = run(which, options, start, grads)
    half, optimizer = run(which, options, start, grads[:2])
    (state,) = optimizer.state.values()
    declared = optimizer.plan(optimizer.param_groups[0], shape)
    assert sum(t.numel() * t.itemsize for t in state.values()) == declared.nbytes(shape)
    assert (state["exp_avg"].dtype == torch.uint8) == (start.numel() > 1)
    assert state["exp_avg"].shape == shape
    param = nn.Parameter(half.clone())
    resumed = which([param], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[2:]:
        param.grad = grad
        resumed.step()
    assert torch.equal(param, whole)
