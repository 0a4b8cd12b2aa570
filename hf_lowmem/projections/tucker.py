"""COAP's projection of a convolution: Tucker factors of its output and input channels.

Source: arXiv:2412.00071; authors' code bytedance/coap@deabc3a, whose decomposition is HOOI as in tensorly 0.10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.moments import Full
from hf_lowmem.projections.basis import COSINE_FLOOR, BasisOptions, clipped_step, watch_for_mask
from hf_lowmem.projections.precision import full_float32, product
from hf_lowmem.state import Moments, Space, State, TensorSpec, widened

_MIN_SWEEPS, _MAX_SWEEPS, _TOLERANCE = 3, 100, 1e-4

Factors = list[Tensor]  # one or two factors (rank, channels) with orthonormal rows


@dataclass(frozen=True)
class Tucker:
    """A projection of the output and input channels of a convolution (out, in, kh, kw) to `ranks` dimensions.

        core = G x_0 P_0 x_1 P_1  (r0, r1, kh, kw)     back: core x_0 P_0^T x_1 P_1^T

    With a single rank only the output channels are projected (Tucker-1). The moments are stored as (r0, r1 * kh * kw),
    so that their rows are long enough for 8-bit blocks, and a factored moment does not factor the kernel.

    State: `proj_0` (r0, out), `proj_1` (r1, in); `proj_count`, which is 1 once there is a basis.

    Args:
        shape: the shape (out, in, kh, kw) of the weight.
        ranks: the number of dimensions kept of axis 0, or of axes 0 and 1.
        options: how the basis follows the gradient.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    options: BasisOptions

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        factors = {
            f"proj_{axis}": TensorSpec((rank, shape[axis]), (None, axis), self.options.dtype)
            for axis, rank in enumerate(self.ranks)
        }
        return {**factors, "proj_count": TensorSpec((), (), on_host=True)}

    def space(self, shape: tuple[int, ...], moment: str) -> Space:
        rows, *others = self._core_shape
        return (rows, math.prod(others)), (None, None)

    def describe(self, shape: tuple[int, ...]) -> str:
        channels = " x ".join(f"{rank} of {size}" for rank, size in zip(self.ranks, shape, strict=False))
        return f"Tucker {channels} channels"

    def project(self, state: State, grad: Tensor) -> Tensor:
        return contract(grad, self._stored(state)).flatten(1)

    def project_back(self, state: State, update: Tensor) -> Tensor:
        return self.options.scale * expand(self._core(update), self._stored(state))

    def add_back(self, state: State, param: Tensor, update: Tensor, decay: float) -> bool:
        return False  # the way back takes more than one product

    def takes_gradient(self, state: State) -> bool:
        return not state["proj_count"].item() or self.options.event(state) is not None

    def before_step(self, grad: Tensor, state: State, moments: Moments) -> None:
        if not self.takes_gradient(state):
            return
        event, exists = self.options.event(state), bool(state["proj_count"].item())
        magnitude = grad.abs().max().float()
        if not (magnitude.isfinite() and magnitude > 0):
            return
        if event != "correct":
            watch_for_mask(grad.unsqueeze(0), range(1, 1 + len(self.ranks)), spares_slices=True)
        with full_float32():
            if not exists:
                self._store(state, decompose(widened(grad), self.ranks))
                state["proj_count"] += 1
            else:
                self._change(widened(grad), state, moments, event == "recompute")

    def after_step(self, grad: Tensor, state: State, moments: Moments, beta2: float) -> None:
        pass

    def _change(self, grad: Tensor, state: State, moments: Moments, recompute: bool) -> None:
        old = [factor.clone() for factor in self._factors(state, grad.dtype)]
        if recompute:
            found = decompose(grad, self.ranks)
            new = [self.options.aligned(factor, before) for factor, before in zip(found, old, strict=True)]
        else:
            exp_avg = self._core(moments["exp_avg"].load())
            new = corrected_factors(grad, old, exp_avg, unit=self.options.eq5_scale == "rms")
        self._store(state, new)
        if self.options.restore_state == "none":
            return
        rotations = [factor @ before.mT for factor, before in zip(self._factors(state, grad.dtype), old, strict=True)]
        for name, squared in (("exp_avg", False), ("exp_avg_sq", True)):
            if isinstance(moments[name].moment, Full):
                core = self._core(moments[name].load())
                moments[name].store(self._carried(core, rotations, squared).flatten(1).contiguous())

    def _carried(self, core: Tensor, rotations: Factors, squared: bool) -> Tensor:
        if not squared:
            return contract(core, rotations)
        if self.options.restore_state == "reference":
            return contract(core.sqrt(), rotations).square()
        return contract(core, [rotation.square() for rotation in rotations])

    @property
    def _core_shape(self) -> tuple[int, ...]:
        return (*self.ranks, *self.shape[len(self.ranks) :])

    def _core(self, moment: Tensor) -> Tensor:
        """Return a moment (r0, r1 * kh * kw) as a view (r0, r1, kh, kw)."""
        return moment.view(self._core_shape)

    def _stored(self, state: State) -> Factors:
        return [state[f"proj_{axis}"] for axis in range(len(self.ranks))]

    def _factors(self, state: State, dtype: torch.dtype) -> Factors:
        return [factor.to(dtype) for factor in self._stored(state)]

    def _store(self, state: State, factors: Factors) -> None:
        for stored, factor in zip(self._stored(state), factors, strict=True):
            stored.copy_(factor)


def contract(tensor: Tensor, factors: Factors) -> Tensor:
    """Return tensor x_0 P_0 x_1 P_1, in which the size of axis i goes from P_i's columns to its rows."""
    for axis, factor in enumerate(factors):
        tensor = product(tensor.movedim(axis, -1), factor.mT, factor).movedim(-1, axis)
    return tensor


def expand(tensor: Tensor, factors: Factors) -> Tensor:
    """Return tensor x_0 P_0^T x_1 P_1^T, the transpose of `contract`."""
    return contract(tensor, [factor.mT for factor in factors])


def unfold(tensor: Tensor, axis: int) -> Tensor:
    """Return the tensor as a matrix with a row for each index of `axis`."""
    return tensor.movedim(axis, 0).flatten(1)


def decompose(grad: Tensor, ranks: tuple[int, ...]) -> Factors:
    """Return the factors from higher-order orthogonal iteration.

    Each factor in turn is set to the leading subspace of the gradient projected by the other factors.
    """
    factors = [leading_left(unfold(grad, axis), rank) for axis, rank in enumerate(ranks)]
    energy = _energy(grad)
    error = math.inf
    for sweep in range(_MAX_SWEEPS):
        for axis, rank in enumerate(ranks):
            others = [_identity(grad, i) if i == axis else factor for i, factor in enumerate(factors)]
            factors[axis] = leading_left(unfold(contract(grad, others), axis), rank)
        before = error
        error = math.sqrt(abs(energy - _energy(contract(grad, factors))) / energy)
        if sweep + 1 >= _MIN_SWEEPS and abs(before - error) < _TOLERANCE:
            break
    return factors


def _energy(tensor: Tensor) -> float:
    """Return |tensor|^2 in float64, where the squares of a tiny or huge gradient do not underflow or overflow."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).item()) ** 2


def _identity(tensor: Tensor, axis: int) -> Tensor:
    return torch.eye(tensor.shape[axis], dtype=tensor.dtype, device=tensor.device)


def leading_left(matrix: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors as rows, with signs that make the largest entry positive."""
    u = torch.linalg.svd(matrix, full_matrices=rank > min(matrix.shape)).U[:, :rank].mT
    largest = u.gather(1, u.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -u, u)


def corrected_factors(grad: Tensor, factors: Factors, exp_avg: Tensor, *, unit: bool) -> Factors:
    """Return the factors after one gradient step on Eq. 5, in which the gradient of each factor is clipped by itself.

    The cosines of Eq. 5 are taken along the input channels.

    Args:
        grad: G (out, in, kh, kw).
        factors: P_i (r_i, channels of axis i).
        exp_avg: M (r0, r1, kh, kw).
        unit: whether G is scaled to a root mean square of 1 first.
    """
    if unit:
        grad = grad / grad.abs().max()
        grad = grad / grad.square().mean().sqrt()
    m_hat, residual = expand(exp_avg, factors), expand(contract(grad, factors), factors) - grad
    root = m_hat.square().sum(1, keepdim=True).sqrt()
    a = root.clamp(min=COSINE_FLOOR)
    b = grad.square().sum(1, keepdim=True).sqrt().clamp(min=COSINE_FLOOR)
    cosine = (m_hat * grad).sum(1, keepdim=True) / (a * b)
    along = torch.where(root > COSINE_FLOOR, cosine / a.square(), 0.0)
    by_g_hat = 2 / grad.numel() * (1 - cosine.mean()) * residual
    by_m_hat = -residual.square().mean() / cosine.numel() * (grad / (a * b) - along * m_hat)

    corrected = []
    for axis, factor in enumerate(factors):
        others = [_identity(grad, i) if i == axis else other for i, other in enumerate(factors)]
        g = unfold(expand(contract(grad, others), others), axis)  # so that G_hat = P^T P g along this axis
        m = unfold(expand(exp_avg, [_identity(exp_avg, i) if i == axis else p for i, p in enumerate(factors)]), axis)
        d_g, d_m = unfold(by_g_hat, axis), unfold(by_m_hat, axis)
        gradient = factor @ (g @ d_g.mT + d_g @ g.mT) + m @ d_m.mT
        corrected.append(clipped_step(factor, gradient))
    return corrected
