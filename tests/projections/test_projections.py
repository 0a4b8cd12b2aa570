"""COAP's low-rank spaces: the mathematics of the basis, and what the optimizers do with it."""

from __future__ import annotations

import copy
import io
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hf_lowmem
from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.tiles import Tiles
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.projections import low_rank, tucker
from hf_lowmem.projections.basis import as_stack
from hf_lowmem.trainer.optim_args import recipe_for

BOTH = pytest.mark.parametrize("cls", [CoapAdamW, CoapAdafactor])
SOON = {"update_interval": 3, "reproject_factor": 2}  # init at call 1, Eq. 5 at 4 and 10, recomputed at 7 and 13
EACH = {"update_interval": 3, "reproject_factor": 1}  # recomputed at 4, 7, 10 and 13
RIGHT, LEFT = (24, 16), (16, 24)
CONV, CONV_1 = (40, 30, 3, 3), (64, 50, 3, 1)  # two ranks and one


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    return [random(*shape, seed=step + 1) for step in range(steps)]


def build(cls: type, start: Tensor, **options: Any) -> tuple[nn.Parameter, LowMemOptimizer]:
    param = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    return param, cls([param], **{"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, **options})


def train(param: nn.Parameter, optimizer: LowMemOptimizer, grads: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Take the steps; yields the live state after each."""
    for grad in grads:
        param.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
        yield optimizer.state[param]


def run(cls: type, start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param, optimizer = build(cls, start, **options)
    for _ in train(param, optimizer, grads):
        pass
    return param.detach(), optimizer.state[param]


def bases(state: dict[str, Tensor]) -> list[Tensor]:
    return [tensor.float().clone() for name, tensor in state.items() if name in ("proj", "proj_0", "proj_1")]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def moment(optimizer: LowMemOptimizer, param: nn.Parameter, name: str) -> Tensor:
    """A full moment, decoded."""
    plan = optimizer.plan(optimizer.param_groups[0], tuple(param.shape))
    return plan.bind(optimizer.state[param], tuple(param.shape))[name].load().clone()


def projected(optimizer: LowMemOptimizer, param: nn.Parameter, grad: Tensor) -> Tensor:
    plan = optimizer.plan(optimizer.param_groups[0], tuple(param.shape))
    return plan.projection.project(optimizer.state[param], grad)


def assert_orthonormal(rows: Tensor, tolerance: float = 1e-5) -> None:
    assert (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype)).abs().max() < tolerance


# -- Eq. 5 ----------------------------------------------------------------------------------------------------------


def eq5_loss(g_hat: Tensor, m_hat: Tensor, grad: Tensor, along: int) -> Tensor:
    """MSE(G_hat, G) (1 - mean cos(M_hat, G)), norms floored at 1e-8, as the authors write it."""
    norms = [torch.linalg.vector_norm(t, dim=along).clamp(min=1e-8) for t in (m_hat, grad)]
    cosine = (m_hat * grad).sum(along) / (norms[0] * norms[1])
    return (g_hat - grad).square().mean() * (1 - cosine.mean())


def eq5_of_a_matrix(grad: Tensor, basis: Tensor, exp_avg: Tensor) -> Tensor:
    """dL/dP by autograd."""
    p = basis.clone().requires_grad_()
    right = low_rank.is_right(grad)
    g_hat, m_hat = (grad @ p.mT @ p, exp_avg @ p) if right else (p.mT @ (p @ grad), p.mT @ exp_avg)
    (gradient,) = torch.autograd.grad(eq5_loss(g_hat, m_hat, grad, -1), p)
    return gradient


def clipped_step(basis: Tensor, gradient: Tensor) -> Tensor:
    return basis - 0.1 * gradient * min(1.0, 1.0 / (gradient.norm().item() + 1e-6))


@settings(deadline=None, max_examples=60)
@given(
    stack=st.sampled_from([(), (1,), (3,)]),
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    unit=st.booleans(),
    data=st.data(),
)
def test_eq5_is_the_gradient_of_its_loss(
    stack: tuple[int, ...], m: int, n: int, scale: float, unit: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    zero_rows = data.draw(st.sets(st.integers(0, m - 1), max_size=m - 1))
    grad = scale * random(*stack, m, n, seed=1).double()
    grad[..., sorted(zero_rows), :] = 0
    exp_avg = scale * random(*stack, *((m, rank) if m >= n else (rank, n)), seed=2).double()
    exp_avg[..., 0, :] = 0 if data.draw(st.booleans()) else exp_avg[..., 0, :]
    basis = random(*stack, rank, min(m, n), seed=3).double()

    closed_form = low_rank.eq5_gradient_right if m >= n else low_rank.eq5_gradient_left
    closed = closed_form(grad, basis, exp_avg, grad.norm(dim=-1), torch.ones_like(grad[..., :1, :1]))
    new = low_rank.corrected_basis(grad, basis, exp_avg, unit=unit)
    assert closed.shape == new.shape == basis.shape
    triples = zip(*(as_stack(t) for t in (grad, basis, exp_avg, closed, new)), strict=True)
    for g, p, m_, closed_, new_ in triples:
        expected = eq5_of_a_matrix(g, p, m_)
        torch.testing.assert_close(closed_, expected, rtol=1e-8, atol=1e-9 * scale**2)
        unit_g = g / g.square().mean().sqrt() if unit else g
        torch.testing.assert_close(new_, clipped_step(p, eq5_of_a_matrix(unit_g, p, m_)), rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(1, 3)),
    factors=st.integers(1, 2),
    unit=st.booleans(),
    zeros=st.booleans(),
    data=st.data(),
)
def test_eq5_of_tucker_factors_is_the_gradient_of_its_loss(
    shape: tuple[int, ...], factors: int, unit: bool, zeros: bool, data: st.DataObject
) -> None:
    ranks = [data.draw(st.integers(1, size)) for size in shape[:factors]]
    grad = random(*shape, seed=1)
    exp_avg = random(*ranks, *shape[factors:], seed=2)
    if zeros:
        grad[0], exp_avg[0] = 0, 0
    given_factors = [random(rank, size, seed=3) for rank, size in zip(ranks, shape, strict=False)]

    scaled = grad / grad.square().mean().sqrt() if unit else grad
    leaves = [factor.clone().requires_grad_() for factor in given_factors]
    down, up = [("oihw,ro->rihw", "rihw,ro->oihw"), ("oihw,ro,si->rshw", "rshw,ro,si->oihw")][factors - 1]
    g_hat = torch.einsum(up, torch.einsum(down, scaled, *leaves), *leaves)
    m_hat = torch.einsum(up, exp_avg, *leaves)
    expected = torch.autograd.grad(eq5_loss(g_hat, m_hat, scaled, 1), leaves)

    found = tucker.corrected_factors(grad, given_factors, exp_avg, unit=unit)
    for new, old, gradient in zip(found, given_factors, expected, strict=True):
        torch.testing.assert_close(new, clipped_step(old, gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [RIGHT, LEFT])
@pytest.mark.parametrize("magnitude", [1e-30, 1e12])
@pytest.mark.parametrize("eq5_scale", ["none", "rms"])
def test_gradients_of_extreme_size_leave_a_basis_that_is_finite(
    shape: tuple[int, int], magnitude: float, eq5_scale: str
) -> None:
    """Squares of such numbers, or their sums, are not float32's."""
    grads = [magnitude * grad for grad in gradients(shape, 7)]
    _, state = run(CoapAdamW, random(*shape), grads, rank=4, eq5_scale=eq5_scale, **SOON)
    assert state["proj"].isfinite().all()
    assert_orthonormal(state["proj"])


# -- Eq. 6 and 7 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 12), (12, 12), (2, 30, 12)])
def test_leading_rows_are_the_singular_vectors_of_a_matrix_of_that_rank(shape: tuple[int, ...]) -> None:
    rank, n = 4, shape[-1]
    x = random(*shape[:-1], rank, seed=1) @ random(*shape[:-2], rank, n, seed=2)
    found = low_rank.leading_rows(x, random(n, rank, seed=3))
    exact = torch.linalg.svd(x).Vh[..., :rank, :]
    torch.testing.assert_close((found * exact).sum(-1).abs(), torch.ones(*shape[:-2], rank), rtol=0, atol=1e-5)
    assert_orthonormal(found)
    projection = found.mT @ found
    torch.testing.assert_close(x @ projection, x, rtol=1e-4, atol=1e-4)


def test_leading_rows_of_a_stack_are_those_of_its_matrices() -> None:
    x, sketch = random(5, 20, 9, seed=1), random(9, 4, seed=2)
    together = low_rank.leading_rows(x, sketch)
    for matrix, rows in zip(x, together, strict=True):
        torch.testing.assert_close(low_rank.leading_rows(matrix, sketch), rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank_of_x", [0, 1, 3])
def test_leading_rows_of_a_deficient_matrix_are_orthonormal(rank_of_x: int) -> None:
    x = random(20, rank_of_x, seed=1) @ random(rank_of_x, 9, seed=2)
    found = low_rank.leading_rows(x, random(9, 6, seed=3))
    assert_orthonormal(found)
    torch.testing.assert_close(x @ found.mT @ found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "ranks"), [(CONV, (10, 6)), (CONV_1, (8,)), ((2, 600, 3, 3), (2, 20))])
def test_tucker_factors_capture_a_core_of_their_ranks(shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    factors = [torch.linalg.qr(random(size, r, seed=1)).Q.mT for size, r in zip(shape, ranks, strict=False)]
    x = tucker.expand(random(*ranks, *shape[len(ranks) :], seed=2), factors)
    found = tucker.decompose(x, ranks)
    for factor in found:
        assert_orthonormal(factor)
    torch.testing.assert_close(tucker.expand(tucker.contract(x, found), found), x, rtol=1e-3, atol=1e-4)


# -- when the basis changes -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (2, *RIGHT), CONV, CONV_1], ids=str)
def test_schedule(cls: type, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[int]] = defaultdict(list)
    call = 0

    def count(module: Any, function: str) -> None:
        original = getattr(module, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            made[function].append(call)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)

    for function in ("first_basis", "recomputed_basis", "corrected_basis"):
        count(low_rank, function)
    for function in ("decompose", "corrected_factors"):
        count(tucker, function)
    param, optimizer = build(cls, random(*shape), stacked=len(shape) == 3, **SOON)
    before, changed = bases(optimizer.init_state(param)), []
    for call, grad in enumerate(gradients(shape, 14), start=1):
        (after,) = [bases(state) for state in train(param, optimizer, [grad])]
        if not same(before, after):
            changed.append(call)
        before = after
    assert changed == [1, 4, 7, 10, 13]
    if len(shape) == 4:
        assert made == {"decompose": [1, 7, 13], "corrected_factors": [4, 10]}
    else:
        assert made == {"first_basis": [1], "recomputed_basis": [7, 13], "corrected_basis": [4, 10]}


def nearness(shape: tuple[int, ...], align: str) -> list[tuple[Tensor, Tensor]]:
    """(old, new) of each basis at the first recompute."""
    param, optimizer = build(CoapAdamW, random(*shape), align=align, rank_ratio=2, **EACH)
    history = [bases(state) for state in train(param, optimizer, gradients(shape, 4))]
    return list(zip(history[2], history[3], strict=True))


@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_recomputed_basis_is_matched_to_the_old_one(shape: tuple[int, ...]) -> None:
    by = {align: nearness(shape, align) for align in ("none", "sign", "procrustes")}
    flipped = 0
    for (old, free), (_, signed), (_, turned) in zip(*by.values(), strict=True):
        assert (signed * old).sum(-1).min() >= 0
        assert torch.equal(signed.abs(), free.abs())
        flipped += int(((free * old).sum(-1) < 0).sum())
        torch.testing.assert_close(turned.mT @ turned, free.mT @ free, rtol=0, atol=1e-5)  # spans the same
        agreement = turned @ old.mT  # symmetric and not negative: no rotation of the rows comes nearer
        torch.testing.assert_close(agreement, agreement.mT, rtol=0, atol=1e-5)
        assert torch.linalg.eigvalsh(agreement).min() > -1e-5
        assert (turned - old).norm() <= (signed - old).norm() <= (free - old).norm()
    assert flipped, "no row had the other sign: this shows nothing"


# -- moments over a change of basis ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("call", [4, 7])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (2, 96, 64), CONV], ids=str)
@pytest.mark.parametrize("restore", [False, True, "reference"])
def test_moments_over_a_change_of_basis(
    cls: type, bits: int, call: int, shape: tuple[int, ...], restore: bool | str
) -> None:
    stored = {"state_bits": bits, "min_8bit_size": 0, "proj_bits": 32}
    options = {"rank_ratio": 2, "restore_state": restore, "eq5_scale": "rms", "stacked": len(shape) == 3, **SOON}
    param, optimizer = build(cls, random(*shape), **options, **stored)
    grads = gradients(shape, call)
    for _ in train(param, optimizer, grads[:-1]):
        pass
    names = ["exp_avg"] + (["exp_avg_sq"] if cls is CoapAdamW else [])
    before = {name: moment(optimizer, param, name) for name in names}
    old = bases(optimizer.state[param])
    for _ in train(param, optimizer, grads[-1:]):
        pass
    new = bases(optimizer.state[param])

    def carried(value: Tensor, name: str) -> Tensor:
        rotations = [p_old @ p_new.mT for p_old, p_new in zip(old, new, strict=True)]
        root = restore == "reference" and name == "exp_avg_sq"
        if not restore:
            return value
        if name == "exp_avg_sq" and not root:
            rotations = [rotation.square() for rotation in rotations]
        value = value.sqrt() if root else value
        if len(shape) == 4:
            core = value.view(len(new[0]), len(new[1]), *shape[2:])
            value = torch.einsum("abhw,ac,bd->cdhw", core, *rotations).flatten(1)
        else:
            value = value @ rotations[0] if shape[-2] >= shape[-1] else rotations[0].mT @ value
        return value.square() if root else value

    if cls is CoapAdafactor:  # its average is of finished updates: zero, once its learning rate is
        repeat_param, repeat = build(cls, random(*shape), **options, **stored)
        for _ in train(repeat_param, repeat, grads[:-1]):
            pass
        repeat.param_groups[0]["lr"] = 0.0
        for _ in train(repeat_param, repeat, grads[-1:]):
            pass
        expected, found = 0.9 * carried(before["exp_avg"], "exp_avg"), moment(repeat, repeat_param, "exp_avg")
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=(0.02 if bits == 8 else 1e-6) * expected.abs().max()
        )
        return
    g = projected(optimizer, param, grads[-1])
    for name, beta, value in (("exp_avg", 0.9, g), ("exp_avg_sq", 0.95, g.square())):
        expected = beta * carried(before[name], name) + (1 - beta) * value
        found = moment(optimizer, param, name)
        if name == "exp_avg_sq":  # stored as its root
            expected, found = expected.sqrt(), found.sqrt()
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=(0.02 if bits == 8 else 1e-5) * expected.abs().max()
        )


# -- gradients that a basis cannot be made of -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_zero_first_gradient_defers_the_basis(cls: type, shape: tuple[int, ...]) -> None:
    start, zero = random(*shape), torch.zeros(shape)
    param, optimizer = build(cls, start, **SOON)
    for state in train(param, optimizer, [zero] * 4):  # call 4 would be Eq. 5's
        assert state["proj_count"] == 0
        assert not any(basis.any() for basis in bases(state))
    torch.testing.assert_close(param.detach(), start * (1 - 1e-2 * 0.1) ** 4)
    for state in train(param, optimizer, gradients(shape, 1)):
        assert state["proj_count"] == 1
        for basis in bases(state):
            assert_orthonormal(basis)
    assert (param.detach() - start).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_waits_for_a_gradient_of_its_own(cls: type, shape: tuple[int, int], transposed: bool) -> None:
    grads = gradients((4, *shape), 7)
    grads[0][[1, 3]] = 0
    grads[1][1] = 0
    for grad in grads:
        grad[3] = 0
    param, optimizer = build(cls, random(4, *shape), stacked=True, transposed=transposed, **SOON)
    history = [(state["proj"].clone(), int(state["proj_count"])) for state in train(param, optimizer, grads)]
    assert [count for _, count in history] == [2, 2, 3, 3, 3, 3, 3]
    assert not history[1][0][[1, 3]].any()
    assert torch.equal(history[0][0][[0, 2]], history[2][0][[0, 2]])
    assert_orthonormal(history[2][0][:3])
    assert not history[-1][0][3].any()
    torch.testing.assert_close(param.detach()[3], random(4, *shape)[3] * (1 - 1e-2 * 0.1) ** 7)


@BOTH
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("call", [4, 7])
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (2, *RIGHT), CONV], ids=str)
def test_a_gradient_that_is_zero_or_not_finite_keeps_the_basis(
    cls: type, bad: float, call: int, shape: tuple[int, ...]
) -> None:
    grads = gradients(shape, call)
    spoilt = grads[-1][0] if len(shape) == 3 else grads[-1]  # of the stack, the first matrix only
    spoilt.view(-1)[0 if bad else slice(None)] = bad
    param, optimizer = build(cls, random(*shape), stacked=len(shape) == 3, restore_state=True, **SOON)
    history = [bases(state) for state in train(param, optimizer, grads)]
    assert all(basis.isfinite().all() for basis in history[-1])
    if len(shape) == 3:
        assert torch.equal(history[-1][0][0], history[-2][0][0])
        assert not torch.equal(history[-1][0][1], history[-2][0][1])
        assert param[1].isfinite().all()
    else:
        assert same(history[-1], history[-2])
    assert bad or param.isfinite().all()


def test_a_first_gradient_that_is_not_finite_defers_the_basis() -> None:
    grad = random(*RIGHT)
    grad[0, 0] = math.nan
    _, state = run(CoapAdamW, random(*RIGHT), [grad])
    assert not state["proj"].any()
    assert state["proj_count"] == 0


@pytest.mark.parametrize("size", [1e20, 3e37])
@pytest.mark.parametrize("call", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_finite_gradient_whose_square_is_not_leaves_the_weight_finite(
    shape: tuple[int, ...], call: int, size: float
) -> None:
    """As AdamW does, to which such entries are lost but not the weights."""
    grads = gradients(shape, 8)
    grads[call - 1] = size * grads[call - 1].clamp(-1, 1)
    adamw, _ = run(torch.optim.AdamW, random(*shape), grads)
    assert adamw.isfinite().all()
    weight, state = run(CoapAdamW, random(*shape), grads, **SOON)
    assert all(basis.isfinite().all() for basis in bases(state))
    assert weight.isfinite().all()


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


# -- the size of steps ----------------------------------------------------------------------------------------------


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


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^rank=0 must be a whole number of at least 1\.$"),
        ({"rank": 4, "rank_ratio": 4.0}, r"^rank=4 and rank_ratio=4\.0 both set the rank: give one of them\.$"),
        ({"update_interval": 0}, r"^update_interval=0 must be a whole number of at least 1\.$"),
        ({"reproject_factor": 0}, r"^reproject_factor=0 must be a whole number of at least 1\.$"),
        ({"rank_ratio": 0.5}, r"^rank_ratio=0\.5 must be .*at least 1"),
        ({"conv_rank_ratio": 0.5}, r"^conv_rank_ratio=0\.5 must be .*at least 1"),
        ({"scale": 0.0}, r"^scale=0\.0 must be a finite number above 0\.$"),
        ({"restore_state": "all"}, "restore_state='all' is not"),
        ({"eq5_scale": "unit"}, "eq5_scale='unit' is not"),
        ({"align": "signs"}, "align='signs' is not"),
        ({"proj_bits": 8}, "proj_bits=8 is not"),
        ({"ranks": 4}, "no (option|key) 'ranks'"),
    ],
)
@pytest.mark.parametrize("name", ["coap_adamw", "coap_adafactor"])
def test_bad_options_are_told_in_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    cls = recipe_for(name).optimizer_cls
    with pytest.raises((ValueError, TypeError), match=message):
        cls([nn.Parameter(torch.ones(64, 32))], **options)
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(32, 64)})})
    for build_it in (
        lambda: hf_lowmem.build_optimizer(model, name, lr=1e-3, optim_args=options),
        lambda: hf_lowmem.explain(model, name, options),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build_it()
        assert str(error.value).rstrip(".").count(". ") == 0


@pytest.mark.parametrize("group", [{"rank": 0}, {"rank_ratio": 0.5}, {"update_interval": 0}, {"align": "signs"}])
def test_bad_options_of_a_group_are_told_too(group: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(group))):
        CoapAdamW([{"params": [nn.Parameter(torch.ones(8, 4))], **group}])


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("shape", "rank"), [((64, 32), 32), ((32, 64), 33), ((3, 64, 32), 256)], ids=str)
def test_a_rank_that_would_keep_all_of_a_weight_is_no_rank_at_all(
    shape: tuple[int, ...], rank: int, bits: int, cls: type, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"stacked": len(shape) == 3, "state_bits": bits, "min_8bit_size": 0}
    start, grads = random(*shape), gradients(shape, 3)
    expected, _ = run(cls, start, grads, project=False, **options)
    assert "unprojected" not in caplog.text
    moved, state = run(cls, start, grads, rank=rank, **options)
    assert not any(name.startswith("proj") for name in state)
    assert state["exp_avg"].shape == shape
    if len(shape) == 2:  # statistics of a stack's matrices are each its own
        assert torch.equal(moved, expected)
    (line,) = [record.message for record in caplog.records if "unprojected" in record.message]
    assert f"leaves unprojected: 1, such as one of shape {shape} (its smaller side is 32: rank {rank}" in line


def test_weights_too_small_for_the_rank_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(8, 4), (4, 16), (16, 16), (8,)]
    first, second, large, vector = (nn.Parameter(torch.ones(size)) for size in sizes)
    groups = [
        {"params": [first, large]},
        {"params": [second, vector], "rank": 8},
        {"params": [vector.clone().detach()]},
    ]
    optimizer = CoapAdamW(groups, rank=5)
    (record,) = caplog.records
    assert "unprojected: 2, such as one of shape (8, 4) (its smaller side is 4: rank 5 would keep" in record.message
    large.grad = torch.ones_like(large)
    optimizer.step()
    assert optimizer.state[large]["proj"].shape == (5, 16)
    assert "proj" not in optimizer.state[second]


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


def low_rank_space(shape: tuple[int, ...], transposed: bool, **options: Any) -> low_rank.LowRank:
    options = {"rank": 4, "transposed": transposed, "stacked": len(shape) == 3, **options}
    return CoapAdamW.make_plan(shape, **{**CoapAdamW.plan_options(), **options}).projection


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (2, *LEFT)])
def test_an_update_has_the_layout_of_its_weight(shape: tuple[int, ...], transposed: bool) -> None:
    space = low_rank_space(shape, transposed)
    state = {"proj": random(*space.specs(shape)["proj"].shape)}
    update = space.project_back(state, random(*space.space(shape, "exp_avg")[0]))
    assert update.shape == shape
    assert update.is_contiguous()


@pytest.mark.parametrize("eq5_scale", ["none", "rms"])
@pytest.mark.parametrize("shape", [(2048, 512), (512, 2048)])
def test_a_change_of_basis_makes_no_copy_of_the_gradient(shape: tuple[int, int], eq5_scale: str) -> None:
    for factor in (1, 100):  # recomputed, corrected
        param = nn.Parameter(torch.randn(shape))
        optimizer = CoapAdamW([param], rank=8, update_interval=1, reproject_factor=factor, eq5_scale=eq5_scale)
        assert peak_of_a_step(optimizer, param) < 0.4


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


def test_a_groups_own_rank_or_ratio_wins() -> None:
    params = [nn.Parameter(torch.zeros(32, 16)) for _ in range(3)]
    groups = [{"params": [params[0]], "rank_ratio": 8.0}, {"params": [params[1]], "rank": 3}, {"params": [params[2]]}]
    optimizer = CoapAdamW(groups, rank=5)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert [len(optimizer.state[param]["proj"]) for param in params] == [2, 3, 5]
    with pytest.raises(ValueError, match="give one of them"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(8, 8))], "rank": 2, "rank_ratio": 2.0})


def test_rows_longer_than_a_tile_in_blocks_of_an_odd_size() -> None:
    param = nn.Parameter(torch.randn(4, 270000))  # a multiple of 240, and of no power of two above 16
    optimizer = CoapAdamW([param], rank=2, state_bits=8)
    for _ in range(2):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == torch.uint8
    assert param.isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_decomposition_does_not_depend_on_the_gradients_size(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = []
    leading_left = tucker.leading_left
    monkeypatch.setattr(tucker, "leading_left", lambda *args: sweeps.append(args) or leading_left(*args))
    tucker.decompose(scale * random(*CONV, seed=1), (20, 15))
    assert len(sweeps) < 40


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_rate": 0.8}, "decay_rate=0.8"),
        ({"clip_threshold": 0.0}, "clip_threshold=0"),
        ({"update_interval": None}, "update_interval=None"),
    ],
)
def test_adafactors_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoapAdafactor([nn.Parameter(torch.zeros(2, 2))], **options)
