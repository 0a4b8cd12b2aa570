"""What the spaces share: when a basis of COAP changes and how far, and the entries that a basis moves despite a mask.

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
LEAST_MASK = 0.01  # of a gradient's entries: fewer zeros may be what a narrow dtype has rounded away


@dataclass(frozen=True)
class BasisOptions:
    """Options of a basis that follows the gradient.

    Args:
        dtype: storage of the basis.
        update_interval: steps between two changes of the basis.
        reproject_factor: each so many changes it is recomputed (Eq. 6 and 7) and not corrected (Eq. 5).
        scale: factor of every update.
        restore_state: "squared" carries the moments over a change of basis by its rotation R, the second by R * R;
            "reference" carries the root of the second by R, as the authors do; "none" leaves both.
        eq5_scale: "rms" scales the gradient to unit size in Eq. 5, "none" takes it as it is.
        align: what a recomputed basis is matched to the old one by: "sign", "procrustes" or "none".
    """

    dtype: torch.dtype
    update_interval: int
    reproject_factor: int
    scale: float
    restore_state: str
    eq5_scale: str
    align: str

    def event(self, state: State) -> Literal["recompute", "correct"] | None:
        """What is due before the step that `state["step"]` counts, k steps being completed."""
        k = int(state["step"].item()) - 1
        if k == 0 or k % self.update_interval:
            return None
        return "correct" if k % (self.update_interval * self.reproject_factor) else "recompute"

    def aligned(self, new: Tensor, old: Tensor) -> Tensor:
        """The basis `new` (..., rank, side) with the signs, or the rotation, that bring it nearest to `old`."""
        if self.align == "none":
            return new
        if self.align == "procrustes":
            u, _, vh = torch.linalg.svd(new @ old.mT)
            new = (u @ vh).mT @ new
            return new
        agreement = (new * old).sum(-1, keepdim=True)
        return torch.where(agreement < 0, -new, new)


def clipped_step(basis: Tensor, gradient: Tensor) -> Tensor:
    """The basis (..., rank, side) after one step down a gradient of at most unit norm.

    Where the squares of a huge gradient have overflowed the basis stays.
    """
    norm = torch.linalg.vector_norm(gradient, dim=(-2, -1), keepdim=True)
    new = basis - EQ5_LR * gradient * (EQ5_CLIP / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), new, basis)


def as_stack(tensor: Tensor) -> Tensor:
    """A matrix, or a stack of them, as a view (matrices, ...)."""
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)


def watch_for_mask(grad: Tensor, axes: Sequence[int], *, spares_slices: bool) -> None:
    """Warn, once in a process, of a gradient with zeros in entries that an update through a basis moves.

    An entry stays where its fibre along the projected axes is all zero, since no direction of the basis reaches it.

    Args:
        grad: (matrices, ...), each with a basis of its own.
        axes: the projected axes.
        spares_slices: whether a slice across a projected axis stays too where it is all zero. In an eigenbasis it does
            not: the directions without variance carry rounding errors there, which Adam scales up.
    """
    inner = range(1, grad.ndim)
    reached = _not_zero(grad, axes)  # of each matrix, the entries that an update moves
    for axis in axes:
        reached = reached * (_not_zero(grad, [i for i in inner if i != axis]) if spares_slices else grad.shape[axis])
    if torch.count_nonzero(grad) < (1 - LEAST_MASK) * reached.sum():
        _warn_of_mask()


def _not_zero(stack: Tensor, over: Sequence[int]) -> Tensor:
    """Of each matrix (matrices, ...), the number of slices over these axes that are not all zero."""
    magnitude = torch.linalg.vector_norm(stack, torch.inf, dim=tuple(over))  # makes no copy of the gradient
    counts: Tensor = (magnitude != 0).view(len(stack), -1).sum(1)
    return counts


@cache
def _warn_of_mask() -> None:
    logger.warning(
        "The gradient of a projected weight is zero in single entries: if a mask keeps them from being trained, the "
        "update moves them all the same, so leave such weights out (rules, target_modules)."
    )
