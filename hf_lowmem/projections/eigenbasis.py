"""SOAP's projection: the eigenvectors of the gradient's second-moment matrix along each preconditioned axis.

Source: arXiv:2409.11321, algorithm 3; authors' code nikhilvyas/SOAP@a1e5535.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem.projections.basis import as_stack, watch_for_mask
from hf_lowmem.projections.precision import full_float32, product, product_dtype
from hf_lowmem.state import Moments, Space, State, TensorSpec

# Times the largest diagonal entry. LAPACK may not converge on a tiny matrix with repeated eigenvalues.
_JITTER = 1e-7


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenvectors Q_i of L_i = E[G_(i) G_(i)^T] for each axis i.

        project(G) = G x_i Q_i^T over all preconditioned axes i

    The second moment is kept in this basis, the first moment in the axes of the weight. Each step uses Q and then
    averages the gradient into L. The first Q is the eigendecomposition of the first L. Every `frequency` updates, Q is
    replaced by a power step and a QR decomposition, and the second moment is permuted with the order of the
    eigenvalues.

    In a stack, each matrix has its own L and Q. A matrix gets its basis at the first gradient that is not zero, and
    keeps its L when its gradient is not finite.

    State: `gram_<axis>` (L, float32) and `proj_<axis>` (Q), both (size, size) or (experts, size, size); `proj_count`,
    the number of matrices that have a basis.

    Args:
        axes: the preconditioned axes of the weight.
        stacked: whether axis 0 counts matrices.
        dtype: the dtype that Q is stored in. Rounding to bfloat16 does not accumulate, because each power step returns
            a Q that is orthogonal in float32.
        frequency: the number of updates between two changes of the basis.
        shampoo_beta: the decay rate of L; None takes that of the second moment.
    """

    axes: tuple[int, ...]
    stacked: bool
    dtype: torch.dtype
    frequency: int
    shampoo_beta: float | None = None

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for axis in self.axes:
            size, dims = (*self._stack(shape), shape[axis], shape[axis]), (*self._stack((0,)), None, None)
            specs[f"gram_{axis}"] = TensorSpec(size, dims)
            specs[f"proj_{axis}"] = TensorSpec(size, dims, self.dtype)
        return {**specs, "proj_count": TensorSpec((), (), on_host=True)}

    def space(self, shape: tuple[int, ...], moment: str) -> Space:
        rotated = self.axes if moment == "exp_avg_sq" else ()
        return shape, tuple(None if axis in rotated else axis for axis in range(len(shape)))

    def describe(self, shape: tuple[int, ...]) -> str:
        return f"eigenbasis of {' and '.join(f'axis {axis} ({shape[axis]})' for axis in self.axes)}"

    def _stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:1] if self.stacked else ()

    def project(self, state: State, grad: Tensor) -> Tensor:
        for axis in self.axes:
            grad = rotate(grad, axis, state[f"proj_{axis}"])
        return grad

    def project_back(self, state: State, update: Tensor) -> Tensor:
        for axis in self.axes:
            update = rotate(update, axis, state[f"proj_{axis}"].mT)
        return update

    def takes_gradient(self, state: State) -> bool:
        return True

    def before_step(self, grad: Tensor, state: State, moments: Moments) -> None:
        pass

    def after_step(self, grad: Tensor, state: State, moments: Moments, beta2: float) -> None:
        stack = grad if self.stacked else grad.unsqueeze(0)
        decay = beta2 if self.shampoo_beta is None else self.shampoo_beta
        with full_float32():
            for axis in self.axes:
                gram = as_stack(state[f"gram_{axis}"])
                outer = outer_product(stack, self._stack_axis(axis))
                finite = outer.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
                gram.copy_(torch.where(finite, torch.lerp(gram, outer, 1 - decay), gram))
            self._change_basis(stack, state, moments)

    def _change_basis(self, grad: Tensor, state: State, moments: Moments) -> None:
        updates = int(state["step"].item()) - 1
        due = updates > 0 and updates % self.frequency == 0
        incomplete = state["proj_count"].item() < len(grad)
        if not due and not incomplete:
            return
        first = self.axes[0]
        exists = as_stack(state[f"proj_{first}"]).abs().amax((1, 2)) > 0
        found = as_stack(state[f"gram_{first}"]).abs().amax((1, 2)) > 0
        if due and exists.any():
            self._refresh(state, moments, exists.nonzero().flatten())
        new = (found & ~exists).nonzero().flatten()
        if not len(new):
            return
        watch_for_mask(grad, [self._stack_axis(axis) for axis in self.axes], spares_slices=False)
        for axis in self.axes:
            gram, proj = as_stack(state[f"gram_{axis}"]), as_stack(state[f"proj_{axis}"])
            proj[new] = eigenvectors(gram[new]).to(proj.dtype)
        state["proj_count"] += len(new)
        # The gradient that found the basis is not in the second moment, so it must not be in the first one either.
        exp_avg = moments["exp_avg"].load().clone()
        (exp_avg if self.stacked else exp_avg.unsqueeze(0))[new] = 0
        moments["exp_avg"].store(exp_avg)

    def _refresh(self, state: State, moments: Moments, which: Tensor) -> None:
        exp_avg_sq = moments["exp_avg_sq"].load().clone()
        stack = exp_avg_sq if self.stacked else exp_avg_sq.unsqueeze(0)
        for axis in self.axes:
            gram, proj = as_stack(state[f"gram_{axis}"]), as_stack(state[f"proj_{axis}"])
            basis, order = power_step(gram[which], proj[which].to(gram.dtype))
            proj[which] = basis.to(proj.dtype)
            stack[which] = permuted(stack[which], self._stack_axis(axis), order)
        moments["exp_avg_sq"].store(exp_avg_sq)

    def _stack_axis(self, axis: int) -> int:
        return axis if self.stacked else axis + 1


def rotate(tensor: Tensor, axis: int, basis: Tensor) -> Tensor:
    """Return tensor x_axis basis^T, the coordinates of `axis` in the columns of the basis (or of a stack of bases)."""
    return product(tensor.movedim(axis, -1), basis, basis).movedim(-1, axis)


def outer_product(stack: Tensor, axis: int) -> Tensor:
    """Return G_(axis) G_(axis)^T (experts, size, size) of gradients (experts, ...).

    The products of bfloat16 entries are exact, and their sums are float32.
    """
    unfolded = stack.movedim(axis, -1).flatten(1, -2)
    unfolded = unfolded.to(product_dtype(unfolded, unfolded, unfolded))
    return product(unfolded.mT, unfolded, unfolded)


def eigenvectors(gram: Tensor) -> Tensor:
    """Return the eigenvectors of the gram matrices as columns (experts, size, size), by descending eigenvalue."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    jittered = gram + _JITTER * gram.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] * eye
    try:
        vectors: Tensor = torch.linalg.eigh(jittered).eigenvectors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(jittered.double()).eigenvectors.to(gram.dtype)
    descending: Tensor = vectors.flip(-1)
    return descending


def power_step(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next Q (experts, size, size) by orthogonal iteration, and the order of the old eigenvalues."""
    image = gram @ basis
    order = (basis * image).sum(-2).argsort(dim=-1, descending=True)
    return torch.linalg.qr(permuted(image, 2, order)).Q, order


def permuted(stack: Tensor, axis: int, order: Tensor) -> Tensor:
    """Return a stack (experts, ...), permuted along `axis` by the `order` (experts, size) of each matrix."""
    shape = [1] * stack.ndim
    shape[0], shape[axis] = order.shape
    return stack.gather(axis, order.view(shape).expand(stack.shape))
