"""COAP's optimizers on stacks, transposed weights and other dtypes, in kernels, in any shape and from checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.tiles import Tiles
from hf_lowmem.projections import low_rank, tucker
from tests.support.coap_runs import (
    BOTH,
    CONV,
    CONV_1,
    EACH,
    LEFT,
    RIGHT,
    SOON,
    assert_orthonormal,
    bases,
    build,
    gradients,
    random,
    run,
    same,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- stacks, transposed weights, dtypes -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)], ids=str)
def test_a_stack_is_its_matrices(cls: type, bits: int, transposed: bool, shape: tuple[int, int]) -> None:
    options = {"rank": 32, "transposed": transposed, "state_bits": bits, "min_8bit_size": 0, **SOON}
    options |= {"restore_state": True, "eq5_scale": "rms"}
    start, grads = random(3, *shape), gradients((3, *shape), 14)
    grads[0][1] = 0
    grads[6][2] = 0
    stack, state = run(cls, start, grads, stacked=True, **options)
    assert (state["exp_avg"].dtype == torch.uint8) is (bits == 8)
    for expert in range(3):
        alone, own = run(cls, start[expert], [grad[expert] for grad in grads], **options)
        torch.testing.assert_close(stack[expert], alone, rtol=0, atol=1e-5 if bits == 32 else 2e-3)
        torch.testing.assert_close(state["proj"][expert], own["proj"], rtol=0, atol=1e-5 if bits == 32 else 2e-2)


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (16, 16), (3, *RIGHT), (3, *LEFT)], ids=str)
@pytest.mark.parametrize("options", [{}, {"eq5_scale": "rms", "restore_state": True, "scale": 0.25}])
def test_transposed_says_that_the_weight_is_stored_transposed(
    cls: type, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    options = {"stacked": len(shape) == 3, "rank": 5, **options, **SOON}
    start, grads = random(*shape), gradients(shape, 14)
    plain, mine = run(cls, start, grads, **options)
    turned, theirs = run(cls, start.mT.contiguous(), [g.mT.contiguous() for g in grads], transposed=True, **options)
    torch.testing.assert_close(turned.mT, plain, rtol=0, atol=1e-5)
    for name in mine:
        assert mine[name].shape == theirs[name].shape
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV, CONV_1], ids=str)
def test_the_layout_in_memory_does_not_matter(cls: type, shape: tuple[int, ...]) -> None:
    order = tuple(reversed(range(len(shape))))

    def strided(tensor: Tensor) -> Tensor:
        return tensor.permute(order).contiguous().permute(order)

    start, grads = random(*shape), gradients(shape, 8)
    options = {"restore_state": True, **SOON}
    expected, _ = run(cls, start, grads, **options)
    actual, _ = run(cls, strided(start), [strided(grad) for grad in grads], **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (2, 64, 96), CONV], ids=str)
def test_bfloat16_weights_follow_the_float32_rule(cls: type, bits: int, shape: tuple[int, ...]) -> None:
    options = {"state_bits": bits, "min_8bit_size": 0, "stacked": len(shape) == 3, "rank_ratio": 2, **SOON}
    start, grads = random(*shape).bfloat16(), [grad.bfloat16() for grad in gradients(shape, 8)]
    expected, _ = run(cls, start.float(), [grads[0].float()], **options)
    actual, state = run(cls, start, grads[:1], **options)
    assert actual.dtype == torch.bfloat16
    assert (actual == expected.bfloat16()).float().mean() > 0.999, "rounded more than once"
    torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=1e-6)
    assert all(tensor.dtype != torch.bfloat16 or name.startswith("proj") for name, tensor in state.items())
    later, _ = run(cls, start, grads, **options)
    assert later.isfinite().all()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"state_bits": 8}, torch.bfloat16),
        ({"state_bits": 16}, torch.bfloat16),
        ({"proj_bits": 16}, torch.bfloat16),
        ({"proj_bits": 32, "state_bits": 8}, torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [RIGHT, CONV], ids=str)
def test_the_bits_of_the_basis(options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    start, grads = random(*shape), gradients(shape, 3)  # a change of basis in noise would pick other signs
    weight, state = run(CoapAdamW, start, grads, **options, **SOON)
    stored = [tensor for name, tensor in state.items() if name in ("proj", "proj_0", "proj_1")]
    assert {basis.dtype for basis in stored} == {dtype}
    for basis in bases(state):
        assert_orthonormal(basis, 3e-2)
    expected, _ = run(CoapAdamW, start, grads, **(options | {"proj_bits": 32}), **SOON)
    assert (weight - expected).norm() < 0.05 * (expected - start).norm()


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    """Products of float32 may be taken in bfloat16, where the processor can."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), CONV], ids=str)
def test_a_basis_is_made_in_full_float32(shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    start, grads = random(*shape), gradients(shape, 7)
    _, exact = run(CoapAdamW, start, grads, **EACH)  # Eq. 5 takes the first moment, which is the user's
    request.getfixturevalue("reduced_precision")
    used = []
    with pytest.MonkeyPatch.context() as patch:
        for module, function in ((low_rank, "leading_rows"), (tucker, "decompose")):
            original = getattr(module, function)
            patch.setattr(
                module,
                function,
                lambda *args, original=original: (used.append(precisions()), original(*args))[1],
            )
        _, state = run(CoapAdamW, start, grads, **EACH)
    assert used == [("ieee", "ieee")] * 3
    assert precisions()[1] == "bf16", "the user's choice is back"
    assert same(bases(state), bases(exact))


def precisions() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


# -- kernels --------------------------------------------------------------------------------------------------------

SPACES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "right": ((96, 64), {}),
    "left": ((64, 96), {}),
    "right, transposed": ((64, 96), {"transposed": True}),
    "left, transposed": ((96, 64), {"transposed": True}),
    "stacked": ((2, 96, 64), {"stacked": True}),
    "stacked, transposed": ((2, 96, 64), {"stacked": True, "transposed": True}),
    "Tucker-2": (CONV, {}),
    "Tucker-1": (CONV_1, {}),
}


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("space", SPACES)
def test_kernels_compute_what_the_rules_define(space: str, bits: int, correct_bias: bool, force: Any) -> None:
    shape, options = SPACES[space]
    options = {**options, "state_bits": bits, "min_8bit_size": 0, "rank_ratio": 2, "correct_bias": correct_bias}
    options |= {"restore_state": not correct_bias, "scale": 0.25, **SOON}
    start, grads = random(*shape), gradients(shape, 8)
    actual, mine = run(CoapAdamW, start, grads, **options)
    force("rule")
    expected, theirs = run(CoapAdamW, start, grads, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol={32: 1e-5, 16: 1e-4, 8: 2e-3}[bits])
    assert {name: (t.shape, t.dtype) for name, t in mine.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize(("cls", "bits"), [(CoapAdamW, 8), (CoapAdafactor, 32)])
def test_compiled_steps_compute_what_the_rules_define(cls: type, bits: int) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"rank": 32, "state_bits": bits, "min_8bit_size": 0, **SOON}
    start, grads = random(64, 96), gradients((64, 96), 8)
    expected, _ = run(cls, start, grads, **options)
    actual, _ = run(cls, start, grads, compile=True, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -- any shape ------------------------------------------------------------------------------------------------------

sizes = st.sampled_from([1, 2, 3, 5, 32, 67])


def assert_sound(cls: type, shape: tuple[int, ...], saved_at: int, options: dict[str, Any]) -> None:
    """Finite, stored as declared, and the same again from a checkpoint, over both kinds of refresh."""
    grads = gradients(shape, 8)
    param, optimizer = build(cls, random(*shape), **options, **SOON)
    for _ in train(param, optimizer, grads[:saved_at]):
        pass
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin, other = build(cls, param.detach(), **options, **SOON)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for p, o in ((param, optimizer), (twin, other)):
        for _ in train(p, o, grads[saved_at:]):
            pass
    assert torch.equal(param, twin)
    state = optimizer.state[param]
    assert all(torch.equal(tensor, other.state[twin][name]) for name, tensor in state.items())

    assert param.isfinite().all()
    declared = optimizer.plan(optimizer.param_groups[0], shape)
    assert sum(t.untyped_storage().nbytes() for t in state.values()) == declared.nbytes(shape)
    expected = {name: (spec.shape, spec.dtype) for name, spec in declared.specs(shape).items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == expected
    for basis in bases(state):
        assert_orthonormal(basis, 5e-2 if options["state_bits"] == 8 else 1e-2)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 3), sizes, sizes)),
    cls=st.sampled_from([CoapAdamW, CoapAdafactor]),
    bits=st.sampled_from([32, 16, 8]),
    ratio=st.floats(1, 8),
    transposed=st.booleans(),
    restore=st.sampled_from([False, True, "reference"]),
    eq5_scale=st.sampled_from(["none", "rms"]),
    saved_at=st.integers(1, 7),
)
def test_any_matrix(
    shape: tuple[int, ...],
    cls: type,
    bits: int,
    ratio: float,
    transposed: bool,
    restore: Any,
    eq5_scale: str,
    saved_at: int,
) -> None:
    options = {"state_bits": bits, "min_8bit_size": 0, "rank_ratio": ratio, "restore_state": restore}
    options |= {"transposed": transposed, "stacked": len(shape) == 3, "eq5_scale": eq5_scale}
    assert_sound(cls, shape, saved_at, options)


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("ratio", [1.0, 7.5])
@pytest.mark.parametrize(
    "shape", [CONV, CONV_1, (100, 1, 10, 10), (2, 600, 3, 3), (1, 97, 97, 1), (8, 4, 3, 3)], ids=str
)
def test_any_convolution(cls: type, bits: int, ratio: float, shape: tuple[int, ...]) -> None:
    assert_sound(cls, shape, 5, {"state_bits": bits, "min_8bit_size": 0, "rank_ratio": ratio})


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (4 * 50, [3, 2]), (1 << 20, [5])])
def test_weights_share_inner_steps_up_to_a_tile(
    limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch, force: Any
) -> None:
    """Entries of rank 4: 24, 24, 16, 24 and 24 times as many; whatever shares a step, the weights are the same."""
    shapes, taken = [RIGHT, LEFT, (16, 16), RIGHT, LEFT], []
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", limit)
    force("in_place", "tiles")
    step = Tiles.step

    def counted(backend: Tiles, bucket: Bucket, hyper: Hyper) -> None:
        taken.append(len(bucket.params))
        step(backend, bucket, hyper)

    monkeypatch.setattr(Tiles, "step", counted)
    params = [nn.Parameter(random(*shape, seed=seed)) for seed, shape in enumerate(shapes)]
    alone = [build(CoapAdamW, param.detach(), rank=4) for param in params]
    optimizer = CoapAdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, rank=4)
    for param in params:
        param.grad = random(*param.shape, seed=9)
    optimizer.step()
    assert taken == sizes
    for param, (single, by_itself) in zip(params, alone, strict=True):
        single.grad = param.grad
        by_itself.step()
        assert torch.equal(param, single)


@BOTH
def test_copies_continue_alike(cls: type) -> None:
    param, optimizer = build(cls, random(*RIGHT), **SOON)
    for _ in train(param, optimizer, gradients(RIGHT, 3)):
        pass
    twin, other = copy.deepcopy((param, optimizer))
    for p, o in ((param, optimizer), (twin, other)):
        for _ in train(p, o, gradients(RIGHT, 5)):
            pass
    assert torch.equal(param, twin)


def test_the_schedule_may_change_on_resume_but_not_the_rank() -> None:
    param, optimizer = build(CoapAdamW, random(*RIGHT), rank=4, **SOON)
    for _ in train(param, optimizer, gradients(RIGHT, 2)):
        pass
    _, other = build(CoapAdamW, random(*RIGHT), rank=4, update_interval=5, scale=0.5)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["update_interval"], other.param_groups[0]["scale"]) == (5, 0.5)
    _, wrong = build(CoapAdamW, random(*RIGHT), rank=5)
    with pytest.raises(ValueError, match="rank=4, expected 5"):
        wrong.load_state_dict(optimizer.state_dict())


def test_statistics_of_a_3d_weight_are_its_own_unless_it_is_a_stack() -> None:
    def moved(stacked: bool) -> torch.Tensor:
        param = nn.Parameter(torch.zeros(4, 1, 4))
        optimizer = CoapAdafactor([param], lr=1.0, betas=(0.0, 0.999), stacked=stacked, project=False)
        for call in range(3):
            param.grad = torch.ones_like(param)
            param.grad[0] *= 10 if call == 2 else 1
            before = param.detach().clone()
            optimizer.step()
        return (param.detach() - before).abs().amax((1, 2))

    assert moved(stacked=True).tolist() == pytest.approx([1, 1, 1, 1], rel=0.01)
    whole = moved(stacked=False)
    assert whole[0] > 1.2 > 1 > whole[1]


def test_rows_longer_than_a_tile_in_blocks_of_an_odd_size() -> None:
    param = nn.Parameter(torch.randn(4, 270000))  # a multiple of 240, and of no power of two above 16
    optimizer = CoapAdamW([param], rank=2, state_bits=8)
    for _ in range(2):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    assert param.isfinite().all()


@pytest.mark.parametrize("cls", [CoapAdamW, CoapAdafactor])
def test_a_step_inside_autocast_is_float32(cls: type) -> None:
    results = []
    for enabled in (False, True):
        param = nn.Parameter(random(24, 16, seed=1))
        optimizer = cls([param], update_interval=1, reproject_factor=2)
        for seed in range(4):
            param.grad = random(24, 16, seed=seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
