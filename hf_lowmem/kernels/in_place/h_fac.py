"""H-Fac in three passes: the sums of rows and columns, the energy of the normalized gradient, and the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.in_place.updates import broadcast_tile, dims_of_matrix, entries_of_matrix, matrix_dims
from hf_lowmem.kernels.means import Index, scaled_grad
from hf_lowmem.kernels.passes import Passes, RulePasses, Sum
from hf_lowmem.kernels.tiles import tiles_of
from hf_lowmem.moments import GroupMean
from hf_lowmem.scratch import Scratch, known_finite
from hf_lowmem.state import FULL_SPACE
from hf_lowmem.update_rules import SMALLEST, unbiased_decay

SIDES = ("row", "col")


class Factors(NamedTuple):
    """What the rows and columns of a matrix are multiplied by and corrected by, broadcastable to the weight.

    Args:
        row, col: the factors of the gradient, which make it the normalized gradient.
        row_shift, col_shift: the correction, which is their sum, by its share of the learning rate.
    """

    row: Tensor
    col: Tensor
    row_shift: Tensor
    col_shift: Tensor


class Sweeps(Protocol):
    """What goes over a weight; an entry whose square is not finite counts as zero in every sum."""

    def sum_sides(self) -> list[Tensor]:
        """Return the sums of g and of g^2 of each row, then those of each column, of the shapes of the means."""

    def sum_energy(self, factors: Factors) -> Tensor:
        """Return the sum of squares of the normalized gradient, or that of each matrix of a stack."""

    def update(self, factors: Factors, step_size: Tensor) -> None:
        """Write the weight: `step_size`, of the shape of the energy, is that of the normalized gradient."""


def in_passes(sweeps_of: Callable[[ParamStep, Hyper], Sweeps]) -> Callable[[ParamStep, Hyper], Passes]:
    """Return how `h_fac_rule` is taken by what `sweeps_of` returns."""

    def h_fac(step: ParamStep, hyper: Hyper) -> Passes:
        sweeps, axes = sweeps_of(step, hyper), matrix_dims(step)
        sums = sweeps.sum_sides()
        dims = [tuple(None if axis in averaged_axes(step, side) else axis for axis in range(len(step.shape))) for side in SIDES]
        yield [Sum(values, dims[number // 2]) for number, values in enumerate(sums)]
        factors = averaged(step, hyper, sums)
        energy = sweeps.sum_energy(factors)
        yield [Sum(energy, dims_of_matrix(step))]
        rms = (energy / entries_of_matrix(step)).sqrt()
        sweeps.update(factors, hyper.lr / (rms / hyper.flags["clip_threshold"]).clamp(min=1.0))

    return h_fac
