"""What COAP's two kinds of space share: when a basis changes, how far, and what becomes of the moments then.

Source: arXiv:2412.00071, equations 5 to 7; authors' code bytedance/coap@deabc3a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem.state import State

EQ5_LR, EQ5_CLIP = 0.1, 1.0
COSINE_FLOOR = 1e-8


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
