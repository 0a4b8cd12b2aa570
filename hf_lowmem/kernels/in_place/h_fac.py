"""H-Fac in three passes: the sums of rows and columns, the energy of the normalized gradient, and the update."""

from __future__ import annotations

import math
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


class Side(NamedTuple):
    """The contribution of the rows, or of the columns, of a matrix to its step, broadcastable to the weight.

    Args:
        factor: multiplies the gradient; the factors of both sides make it the normalized gradient.
        shift: their half of the correction, times the learning rate.
    """

    factor: Tensor
    shift: Tensor


class Sweeps(Protocol):
    """The passes over a weight; an entry whose square is not finite counts as zero in every sum."""

    def sum_sides(self) -> list[Tensor]:
        """Return the sums of g and of g^2 of each row, then those of each column, of the shapes of the means."""

    def sum_energy(self, row: Side, col: Side) -> Tensor:
        """Return the sum of squares of the normalized gradient, or that of each matrix of a stack."""

    def update(self, row: Side, col: Side, step_size: Tensor) -> None:
        """Write the weight; `step_size`, of the shape of the energy, is that of the normalized gradient."""


def in_passes(sweeps_of: Callable[[ParamStep, Hyper], Sweeps]) -> Callable[[ParamStep, Hyper], Passes]:
    """Return how `h_fac_rule` is taken by what `sweeps_of` returns."""

    def h_fac(step: ParamStep, hyper: Hyper) -> Passes:
        sweeps = sweeps_of(step, hyper)
        row_sums, row_squares, col_sums, col_squares = sums = sweeps.sum_sides()
        yield [
            Sum(values, dims_of(step, side)) for values, side in zip(sums, ("row", "row", "col", "col"), strict=True)
        ]
        row = averaged(step, hyper, "row", row_sums, row_squares)
        col = averaged(step, hyper, "col", col_sums, col_squares)
        # The mean over the rows is the same, but a shard does not have all rows.
        mean_square = step.state["exp_avg_sq_col"].mean(matrix_dims(step), keepdim=True)
        col = col._replace(factor=col.factor * mean_square.sqrt())
        energy = sweeps.sum_energy(row, col)
        yield [Sum(energy, dims_of_matrix(step, step.param.ndim))]
        rms = (energy / entries_of_matrix(step)).sqrt()
        sweeps.update(row, col, hyper.lr / (rms / hyper.flags["clip_threshold"]).clamp(min=1.0))

    return h_fac


def covers(step: ParamStep) -> bool:
    """Return whether a parameter is a matrix that is stepped in float32, or a stack of them."""
    plan = step.plan
    if plan.arithmetic != torch.float32 or plan.projection is not FULL_SPACE or isinstance(step.step, Tensor):
        return False
    return all(type(moment) is GroupMean for moment in plan.moments.values())


def averaged_axes(step: ParamStep, side: str) -> tuple[int, ...]:
    """Return the axes that the means of the rows ("row") or of the columns ("col") are taken over."""
    rows, *columns = matrix_dims(step)
    return tuple(columns) if side == "row" else (rows,)


def dims_of(step: ParamStep, side: str) -> tuple[int | None, ...]:
    """Return the `dims` of the sums of a side."""
    return tuple(None if axis in averaged_axes(step, side) else axis for axis in range(step.param.ndim))


def averaged(step: ParamStep, hyper: Hyper, side: str, sums: Tensor, squares: Tensor) -> Side:
    """Average the sums of a side into its means, and return what the side contributes to the step."""
    entries = math.prod(step.shape[axis] for axis in averaged_axes(step, side))
    mean, mean_square = step.state[f"exp_avg_{side}"], step.state[f"exp_avg_sq_{side}"]
    decay1, decay2 = (unbiased_decay(beta, step.step) for beta in (hyper.beta1, hyper.beta2))
    found = sums / entries
    mean.mul_(decay1).add_(found, alpha=1 - decay1)
    mean_square.mul_(decay2).add_(squares / entries + SMALLEST, alpha=1 - decay2)
    root = mean_square.rsqrt()
    share = 0.5 if hyper.flags["momentum_in_correction"] == "previous" else 0.5 * decay1
    return Side(root, (mean - found).mul_(root).mul_(hyper.lr * share))


class InTiles:
    """The sweeps in plain torch."""

    def __init__(self, step: ParamStep, hyper: Hyper) -> None:
        self.step, self.hyper, self.weight = step, hyper, step.weight()
        self.indices, self.scratch = list(tiles_of(step)), Scratch(step.param.device)
        self.overflows = False  # whether the square of an entry may not be finite

    def sum_sides(self) -> list[Tensor]:
        sides = [(side, averaged_axes(self.step, side)) for side in ("row", "col")]
        totals = [torch.zeros_like(self.step.state[f"exp_avg_{side}"]) for side, _ in sides for _ in range(2)]
        for index in self.indices:
            grad = scaled_grad(self.step, index)
            square = torch.mul(grad, grad, out=self.scratch.get("square", grad.shape))
            if not known_finite(square.sum()):
                self.overflows, finite = True, square.isfinite()
                grad, square = grad.masked_fill(~finite, 0.0), square.masked_fill_(~finite, 0.0)
            found = [tensor.sum(axes, keepdim=True) for _, axes in sides for tensor in (grad, square)]
            for total, tile in zip(totals, found, strict=True):
                broadcast_tile(total, index).add_(tile)
        return totals

    def sum_energy(self, row: Side, col: Side) -> Tensor:
        dims = matrix_dims(self.step)
        energy = torch.zeros_like(self.step.state["exp_avg_col"].sum(dims, keepdim=True))
        for index in self.indices:
            square = self._normalized(index, row, col).square_()
            found = square.sum(dims, keepdim=True)
            if not known_finite(found):
                found = square.nan_to_num_(0.0, 0.0, 0.0).sum(dims, keepdim=True)
            broadcast_tile(energy, index).add_(found)
        return energy

    def update(self, row: Side, col: Side, step_size: Tensor) -> None:
        decay = 1 - self.hyper.lr * self.hyper.weight_decay
        for index in self.indices:
            tile = self.weight[index]
            update = self._normalized(index, row, col).mul_(broadcast_tile(step_size, index))
            update.add_(broadcast_tile(row.shift, index)).add_(broadcast_tile(col.shift, index))
            tile.store(tile.load(self.scratch).mul_(decay).sub_(update))

    def _normalized(self, index: Index, row: Side, col: Side) -> Tensor:
        grad = scaled_grad(self.step, index)
        if self.overflows:
            grad = torch.where(grad.square().isfinite(), grad, grad * 0.0)
        scaled = torch.mul(grad, broadcast_tile(row.factor, index), out=self.scratch.get("square", grad.shape))
        return scaled.mul_(broadcast_tile(col.factor, index))


H_FAC = RulePasses(covers, in_passes(InTiles))
