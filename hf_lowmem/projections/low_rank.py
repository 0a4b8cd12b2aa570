"""COAP's low-rank projection: a basis of a matrix's smaller side that follows the gradient.

Source: arXiv:2412.00071, equations 5 to 7; authors' code bytedance/coap@deabc3a.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.moments import Full
from hf_lowmem.projections.basis import COSINE_FLOOR, BasisOptions, as_stack, clipped_step, watch_for_mask
from hf_lowmem.projections.precision import full_float32, product, product_dtype, rounded_once
from hf_lowmem.state import Moments, Space, State, TensorSpec, widened

SKETCH_SEED = 3407
ENTRIES_AT_ONCE = 1 << 22  # the largest product that is held in memory before it is added to the weight


@dataclass(frozen=True)
class LowRank:
    """A projection of the smaller side of a matrix W (m outputs, n inputs) to `rank` dimensions.

        right, m >= n:  g = G P^T  (m, rank)     back: u P
        left,  m < n:   g = P G    (rank, n)     back: P^T u

    In a stack (experts, m, n), each matrix has its own basis. The first basis is computed from the first gradient that
    is not zero. A matrix whose gradient is zero or not finite keeps its basis.

    State: `proj` (rank, n) or (rank, m), with orthonormal rows; `proj_count`, the number of matrices with a basis.

    Args:
        rank: the number of dimensions that are kept.
        transposed: whether the weight is stored as (fan_in, fan_out), as in Conv1D and some experts. W is then its
            transpose.
        options: how the basis follows the gradient.
    """

    rank: int
    transposed: bool
    options: BasisOptions

    # -- shapes -----------------------------------------------------------------------------------------------------

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        *stack, m, n = self._oriented(shape)
        out_axis, in_axis = self._oriented(tuple(range(len(shape))))[-2:]
        side, axis = (n, in_axis) if m >= n else (m, out_axis)
        dims = (*range(len(stack)), None, axis)
        return {
            "proj": TensorSpec((*stack, self.rank, side), dims, self.options.dtype),
            "proj_count": TensorSpec((), (), on_host=True),
        }

    def space(self, shape: tuple[int, ...], moment: str) -> Space:
        *stack, m, n = self._oriented(shape)
        out_axis, in_axis = self._oriented(tuple(range(len(shape))))[-2:]
        if m >= n:
            return (*stack, m, self.rank), (*range(len(stack)), out_axis, None)
        return (*stack, self.rank, n), (*range(len(stack)), None, in_axis)

    def describe(self, shape: tuple[int, ...]) -> str:
        *stack, m, n = self._oriented(shape)
        side = f"{n} inputs" if m >= n else f"{m} outputs"
        return f"rank {self.rank} of {side}{f', {stack[0]} experts' if stack else ''}"

    def _oriented(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return the weight, or its gradient, as W (..., outputs, inputs)."""
        return weight.mT if self.transposed else weight

    # -- projecting -------------------------------------------------------------------------------------------------

    def project(self, state: State, grad: Tensor) -> Tensor:
        matrix, basis = self._matrix(grad), state["proj"]
        return product(matrix, basis.mT, basis) if is_right(matrix) else product(basis, matrix, basis)

    def project_back(self, state: State, update: Tensor) -> Tensor:
        return product(*self._back(state, self.options.scale * update), state["proj"])

    def add_back(self, state: State, param: Tensor, update: Tensor, decay: float) -> bool:
        left, right = self._back(state, update)
        dtype = product_dtype(left, right, state["proj"])
        if dtype == param.dtype:
            add_product = param.baddbmm_ if param.ndim == 3 else param.addmm_
            with rounded_once() if dtype == torch.bfloat16 else nullcontext():
                add_product(left.to(dtype), right.to(dtype), beta=decay, alpha=self.options.scale)
            return True
        if param.dtype != torch.float32:
            return False
        # The product is added to a float32 weight some rows at a time, so that no temporary is as large as the weight.
        rows = max(ENTRIES_AT_ONCE // (param.numel() // param.shape[-2]), 1)
        for part, factor in zip(param.split(rows, -2), left.split(rows, -2), strict=True):
            part.mul_(decay).add_(product(factor, right, state["proj"]), alpha=self.options.scale)
        return True

    def _back(self, state: State, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two matrices whose product is the update in the layout of the weight."""
        basis = state["proj"]
        right = update.shape[-1] == self.rank  # a left projection has the longer side here, which exceeds the rank
        first, second = (update, basis) if right else (basis.mT, update)
        return (second.mT, first.mT) if self.transposed else (first, second)

    # -- the basis --------------------------------------------------------------------------------------------------

    def takes_gradient(self, state: State) -> bool:
        # While an expert has got no token, its stack is incomplete, which costs a pass over the gradient at each step.
        incomplete = state["proj_count"].item() < len(as_stack(state["proj"]))
        return incomplete or self.options.event(state) is not None

    def before_step(self, grad: Tensor, state: State, moments: Moments) -> None:
        if not self.takes_gradient(state):
            return
        event, proj = self.options.event(state), as_stack(state["proj"])
        matrix = as_stack(self._matrix(grad))
        magnitude = torch.linalg.vector_norm(matrix, torch.inf, dim=(1, 2)).float()
        usable = magnitude.isfinite() & (magnitude > 0)
        exists = proj.abs().amax((1, 2)) > 0
        with full_float32():
            if event:
                self._change(proj, matrix, (usable & exists).nonzero().flatten(), event, moments)
            new = (usable & ~exists).nonzero().flatten()
            if len(new) or event == "recompute":
                watch_for_mask(matrix, (2,) if is_right(matrix) else (1,), spares_slices=True)
            if len(new):
                found = first_basis(long_side_first(pick(matrix, new)), self.rank)
                proj[new] = found.to(proj.dtype)
                state["proj_count"] += len(new)

    def _change(self, proj: Tensor, matrix: Tensor, which: Tensor, event: str, moments: Moments) -> None:
        """Correct or recompute the bases of the matrices `which`, and carry their moments over to the new bases."""
        if not len(which):
            return
        options = self.options
        grad = pick(matrix, which)
        old = proj[which].to(grad.dtype)
        if event == "recompute":
            new = options.aligned(recomputed_basis(long_side_first(grad), old), old)
        else:
            exp_avg = pick(as_stack(moments["exp_avg"].load()), which)
            new = corrected_basis(grad, old, exp_avg, unit=options.eq5_scale == "rms")
        proj[which] = new.to(proj.dtype)
        if options.restore_state != "none":
            rotation = old @ proj[which].to(old.dtype).mT
            carry_over(moments, which, rotation, is_right(grad), reference=options.restore_state == "reference")

    def after_step(self, grad: Tensor, state: State, moments: Moments, beta2: float) -> None:
        pass


def is_right(matrix: Tensor) -> bool:
    return matrix.shape[-2] >= matrix.shape[-1]


def pick(stack: Tensor, which: Tensor) -> Tensor:
    """Return the matrices `which` of a stack in float32 or float64, without a copy where that is possible."""
    return widened(stack if len(which) == len(stack) else stack[which])


def long_side_first(matrix: Tensor) -> Tensor:
    """Return X (..., long, short), the matrix or its transpose with the projected side last."""
    return matrix if is_right(matrix) else matrix.mT


def first_basis(x: Tensor, rank: int) -> Tensor:
    """Return P (..., rank, short) from a randomized range finder with one sketch for all matrices and processes."""
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    sketch = torch.randn(x.shape[-1], rank, generator=generator, dtype=torch.float32, device="cpu").to(x)
    return leading_rows(x, sketch)


def recomputed_basis(x: Tensor, basis: Tensor) -> Tensor:
    """Return P (..., rank, short) from one subspace iteration that starts at the old basis."""
    return leading_rows(x, basis.mT)


def leading_rows(x: Tensor, sketch: Tensor) -> Tensor:
    """Return the leading right singular vectors of X (..., long, short), as Eq. 6 and 7 find them.

    With Q an orthonormal basis of X @ sketch, they are the right singular vectors of B = Q^T X. B has r rows only, so
    its SVD is a QR decomposition of B^T and an SVD of the r x r factor.
    """
    size = torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    q = torch.linalg.qr(x @ (sketch / size)).Q  # scaling X does not change its singular vectors
    q_b, r_b = torch.linalg.qr(x.mT @ (q / size))
    rows: Tensor = torch.linalg.svd(r_b.mT).Vh @ q_b.mT
    return rows


def corrected_basis(grad: Tensor, basis: Tensor, exp_avg: Tensor, *, unit: bool) -> Tensor:
    """Return P after one clipped gradient step on the loss of Eq. 5, whose gradient is computed in closed form.

        L(P) = MSE(G_hat, G) (1 - mean_i cos(M_hat_i, G_i))

    G_hat is G projected and projected back, M_hat is the first moment M projected back, and i runs over the rows of
    W (m, n).

    Args:
        grad: G (..., m, n).
        basis: P (..., rank, n) if m >= n, else (..., rank, m).
        exp_avg: M (..., m, rank) or (..., rank, n).
        unit: whether G is scaled to a root mean square of 1 first.
    """
    largest = torch.linalg.vector_norm(grad, torch.inf, dim=(-2, -1), keepdim=True)
    if unit and (largest.min() < 1e-12 or largest.max() > 1e12):
        grad = grad / largest  # the squares would overflow or underflow in float32
    rows = torch.linalg.vector_norm(grad, dim=-1)
    size = rows.square().mean(-1)[..., None, None].sqrt() / grad.shape[-1] ** 0.5
    factor = 1 / size if unit else torch.ones_like(size)
    gradient = eq5_gradient_right if is_right(grad) else eq5_gradient_left
    return clipped_step(basis, gradient(grad, basis, exp_avg, rows * factor[..., 0], factor))


def eq5_gradient_right(grad: Tensor, basis: Tensor, exp_avg: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
    """Return dL/dP for `factor` G (m, n), whose rows have the norms `rows` (m), P (r, n) and M (m, r), m >= n."""
    m, n = grad.shape[-2:]
    a, s = factor * (grad @ basis.mT), basis @ basis.mT
    aa = a.mT @ a
    row_m, row_mu, h = _cosines((exp_avg @ s * exp_avg).sum(-1), (exp_avg * a).sum(-1), rows)
    f = _residual(rows, aa, s) / (m * n)
    outer = 2 * h / (m * n)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    by_grad = outer * (s - 2 * eye) @ a.mT - f / m * (row_m * exp_avg).mT
    by_basis = outer * aa + f / m * (exp_avg.mT @ (row_mu * exp_avg))
    return (factor * by_grad) @ grad + by_basis @ basis


def eq5_gradient_left(grad: Tensor, basis: Tensor, exp_avg: Tensor, rows: Tensor, factor: Tensor) -> Tensor:
    """Return dL/dP for `factor` G (m, n), whose rows have the norms `rows` (m), P (r, m) and M (r, n), m < n."""
    m, n = grad.shape[-2:]
    a, s = factor * (basis @ grad), basis @ basis.mT
    aa = a @ a.mT
    k, mm = factor * (exp_avg @ grad.mT), exp_avg @ exp_avg.mT  # (r, m), (r, r)
    row_m, row_mu, h = _cosines((mm @ basis * basis).sum(-2), (basis * k).sum(-2), rows)
    f = _residual(rows, aa, s) / (m * n)
    outer = 2 * h / (m * n)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    fit = outer * ((s - 2 * eye) @ (factor * (a @ grad.mT)) + aa @ basis)
    return fit - f / m * (row_m.mT * k - mm @ (row_mu.mT * basis))


def _residual(rows: Tensor, aa: Tensor, s: Tensor) -> Tensor:
    """Return |G_hat - G|^2 = |G|^2 - 2 |A|^2 + <S, A A^T> as (..., 1, 1)."""
    trace = aa.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = rows.square().sum(-1) - 2 * trace + (s * aa).sum((-2, -1))
    return total.clamp(min=0)[..., None, None]


def _cosines(square: Tensor, dot: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 / (a b) and c / a^2 as (..., m, 1), and 1 - mean(c), where a = |M_hat_i|, b = |G_i|, c = their cosine.

    Args:
        square: |M_hat_i|^2 (..., m).
        dot: <M_hat_i, G_i> (..., m).
        rows: |G_i| (..., m).
    """
    root = square.clamp(min=0).sqrt()
    a, b = root.clamp(min=COSINE_FLOOR), rows.clamp(min=COSINE_FLOOR)
    c = dot / (a * b)
    along = torch.where(root > COSINE_FLOOR, c / a.square(), 0.0)
    return (1 / (a * b))[..., None], along[..., None], (1 - c.mean(-1))[..., None, None]


def carry_over(moments: Moments, which: Tensor, rotation: Tensor, right: bool, *, reference: bool) -> None:
    """Carry the moments of the matrices `which` over a change of basis by the rotation R = P_old P_new^T (..., r, r).

    The first moment is multiplied by R. The second is a variance and is multiplied by R * R (or, for `reference`, its
    root by R); a factored second moment stays as it is.
    """

    def turn(name: str, factor: Tensor, root: bool = False) -> None:
        value = moments[name].load().clone()
        stack = as_stack(value)
        part = stack[which].sqrt() if root else stack[which]
        part = part @ factor if right else factor.mT @ part
        stack[which] = part.square() if root else part
        moments[name].store(value)

    turn("exp_avg", rotation)
    if isinstance(moments["exp_avg_sq"].moment, Full):
        turn("exp_avg_sq", rotation if reference else rotation.square(), root=reference)
