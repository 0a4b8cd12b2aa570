"""What the projections share: COAP's schedule and steps for a basis, and a warning about masked gradients.

Source: arXiv:2412.00071, equations 5 to 7; authors' code bytedance/coap@deabc3a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem.log import get_logger
from hf_lowmem.state import State

logger = get_logger(__name__)

EQ5_LR, EQ5_CLIP = 0.1, 1.0
COSINE_FLOOR = 1e-8
LEAST_MASK = 0.01  # share of a gradient's entries; fewer zeros than this may come from rounding to a narrow dtype


@dataclass(frozen=True)
class BasisOptions:
    """The options of a basis that follows the gradient.

    Args:
        dtype: the dtype that the basis is stored in.
        update_interval: the number of steps between two changes of the basis.
        reproject_factor: every `reproject_factor`-th change recomputes the basis (Eq. 6 and 7); the others correct it
            (Eq. 5).
        scale: the factor that every update is multiplied by.
        restore_state: what happens to the moments when the basis changes by the rotation R. "squared" multiplies the
            first moment by R and the second by R * R; "reference" multiplies the root of the second moment by R, as
            the authors do; "none" leaves both as they are.
        eq5_scale: "rms" scales the gradient to a root mean square of 1 in Eq. 5; "none" does not scale it.
        align: how a recomputed basis is brought close to the old one: "sign", "procrustes" or "none".
    """

    dtype: torch.dtype
    update_interval: int
    reproject_factor: int
    scale: float
    restore_state: str
    eq5_scale: str
    align: str

    def event(self, state: State) -> Literal["recompute", "correct"] | None:
        """Return what is due before the step numbered `state["step"]`, that is, after k completed steps."""
        k = int(state["step"].item()) - 1
        if k == 0 or k % self.update_interval:
            return None
        return "correct" if k % (self.update_interval * self.reproject_factor) else "recompute"

    def aligned(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the basis `new` (..., rank, side) with the signs, or the rotation, that bring it closest to `old`."""
        if self.align == "none":
            return new
        if self.align == "procrustes":
            u, _, vh = torch.linalg.svd(new @ old.mT)
            new = (u @ vh).mT @ new
            return new
        agreement = (new * old).sum(-1, keepdim=True)
        return torch.where(agreement < 0, -new, new)


def clipped_step(basis: Tensor, gradient: Tensor) -> Tensor:
    """Return the basis (..., rank, side) after one gradient step whose gradient is clipped to a norm of 1.

    A basis whose gradient has a norm that is not finite is returned unchanged.
    """
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    new = basis - EQ5_LR * gradient * (EQ5_CLIP / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), new, basis)


def as_stack(tensor: Tensor) -> Tensor:
    """Return a view (matrices, ...) of a matrix or a stack of matrices."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def watch_for_mask(grad: Tensor, axes: Sequence[int], *, spares_slices: bool) -> None:
    """Warn once per process if many entries of the gradient are zero that an update through a basis moves anyway.

    An update does not move an entry whose fibre along the projected axes is all zero, because no basis vector reaches
    it.

    Args:
        grad: the gradient (matrices, ...), in which each matrix has its own basis.
        axes: the projected axes.
        spares_slices: whether an update also spares a slice across a projected axis that is all zero. In an eigenbasis
            it does not: directions without variance carry rounding errors into the slice, and Adam scales them up.
    """
    inner = range(1, grad.ndim)
    reached = _not_zero(grad, axes)  # the number of entries of each matrix that an update moves
    for axis in axes:
        reached = reached * (_not_zero(grad, [i for i in inner if i != axis]) if spares_slices else grad.shape[axis])
    if torch.count_nonzero(grad) < (1 - LEAST_MASK) * reached.sum():
        _warn_of_mask()


def _not_zero(stack: Tensor, over: Sequence[int]) -> Tensor:
    """Return for each matrix of the stack (matrices, ...) how many slices along the axes `over` are not all zero."""
    magnitude = torch.linalg.vector_norm(stack, torch.inf, dim=tuple(over))  # does not copy the gradient
    counts: Tensor = (magnitude != 0).view(len(stack), -1).sum(1)
    return counts


@cache
def _warn_of_mask() -> None:
    logger.warning(
        "The gradient of a projected weight has scattered zeros. If a mask is meant to keep these entries fixed, note "
        "that the update moves them all the same: leave such weights out (rules, target_modules)."
    )
