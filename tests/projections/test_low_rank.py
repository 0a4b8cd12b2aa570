"""COAP's bases: Eq. 5 against its loss, Eq. 6 and 7 against the singular value decomposition, and Tucker factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowmem.algorithms import CoapAdamW
from hf_lowmem.projections import low_rank, tucker
from hf_lowmem.projections.basis import as_stack
from tests.support.coap_runs import CONV, CONV_1, LEFT, RIGHT, SOON, assert_orthonormal, gradients, random, run

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_decomposition_does_not_depend_on_the_gradients_size(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = []
    leading_left = tucker.leading_left
    monkeypatch.setattr(tucker, "leading_left", lambda *args: sweeps.append(args) or leading_left(*args))
    tucker.decompose(scale * random(*CONV, seed=1), (20, 15))
    assert len(sweeps) < 40
