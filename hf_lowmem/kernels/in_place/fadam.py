"""FAdam in three passes: the gradient's energy, that of the natural gradient and decay, and the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.in_place.updates import broadcast_tile, dims_of_matrix, entries_of_matrix, matrix_dims
from hf_lowmem.kernels.means import Index, scaled_grad
from hf_lowmem.kernels.passes import Passes, RulePasses, Sum
from hf_lowmem.kernels.tiles import full_moments, tiles_of
from hf_lowmem.moments import Full
from hf_lowmem.scratch import Scratch, known_finite
from hf_lowmem.state import FULL_SPACE
from hf_lowmem.update_rules import SMALLEST, unbiased_decay


class Sweeps(Protocol):
    """The passes over a weight. Each sum has one number for the weight, or one for each weight of a stack."""

    def sum_gradient(self) -> Tensor:
        """Return the sum of g^2, without squares that are not finite."""

    def sum_quotients(self) -> list[Tensor]:
        """Return the sum of n^2 in the same way and, where the weight decays, that of r^2, by the sum of g^2."""

    def update(self) -> None:
        """Write weight and moments, by all sums."""


def in_passes(sweeps_of: Callable[[ParamStep, Hyper], Sweeps]) -> Callable[[ParamStep, Hyper], Passes]:
    """Return how `fadam_rule` is taken by what `sweeps_of` returns."""

    def fadam(step: ParamStep, hyper: Hyper) -> Passes:
        sweeps, dims = sweeps_of(step, hyper), dims_of_matrix(step, step.param.ndim)
        yield [Sum(sweeps.sum_gradient(), dims)]
        yield [Sum(found, dims) for found in sweeps.sum_quotients()]
        sweeps.update()

    return fadam


def has_fisher_moments(step: ParamStep) -> bool:
    """Return whether a step in float32 has a full momentum and a full Fisher information, and nothing else."""
    plan = step.plan
    if plan.arithmetic != torch.float32 or plan.projection is not FULL_SPACE:
        return False
    return plan.moments == {"exp_avg": Full(), "fim": Full(signed=False)}


def covers(step: ParamStep) -> bool:
    return has_fisher_moments(step) and not isinstance(step.step, Tensor)


class InTiles:
    """The sweeps in plain torch; the letters are those of `FAdam`."""

    def __init__(self, step: ParamStep, hyper: Hyper) -> None:
        self.step, self.hyper, self.weight = step, hyper, step.weight()
        self.indices, self.scratch = list(tiles_of(step)), Scratch(step.param.device)
        shape = [1 if axis in matrix_dims(step) else size for axis, size in enumerate(step.param.shape)]
        self.sums = [torch.zeros(shape, device=step.param.device) for _ in range(3 if hyper.weight_decay else 2)]
        self.keep = unbiased_decay(hyper.beta2, step.step)

    def sum_gradient(self) -> Tensor:
        for index in self.indices:
            self._add(0, index, scaled_grad(self.step, index))
        return self.sums[0]

    def sum_quotients(self) -> list[Tensor]:
        rms = self._rms(0)
        self.has_grad, self.eps = rms > 0, (self.hyper.eps * rms.clamp(max=1.0)).clamp(min=SMALLEST)
        for index in self.indices:
            grad = scaled_grad(self.step, index)
            fim = self._fim(index, grad)
            scale = self._scale(index, fim)
            self._add(1, index, torch.div(grad, scale, out=self.scratch.get("quotient", grad.shape)))
            if self.hyper.weight_decay:
                decay = self._decay(index, fim, scale, self.weight[index].load(self.scratch))
                broadcast_tile(self.sums[2], index).add_(self._summed(decay.square_()))
        return self.sums[1:]

    def update(self) -> None:
        clip = [(self._rms(n) / self.hyper.flags["clip_threshold"]).clamp(min=1.0) for n in range(1, len(self.sums))]
        for index in self.indices:
            grad, tile, moments = scaled_grad(self.step, index), self.weight[index], full_moments(self.step, index)
            fim = self._fim(index, grad)
            scale, param = self._scale(index, fim), tile.load(self.scratch)
            natural = torch.div(grad, scale, out=self.scratch.get("quotient", grad.shape))
            momentum = (
                moments["exp_avg"].load().lerp_(natural.div_(broadcast_tile(clip[0], index)), 1 - self.hyper.beta1)
            )
            if self.hyper.weight_decay:
                decay = self._decay(index, fim, scale, param).div_(broadcast_tile(clip[1], index))
                param = param.sub_(decay, alpha=self.hyper.lr * self.hyper.weight_decay)
            tile.store(param.sub_(momentum, alpha=self.hyper.lr))
            moments["exp_avg"].store(momentum)
            moments["fim"].store(fim)

    def _fim(self, index: Index, grad: Tensor) -> Tensor:
        """Return the new f of a tile."""
        square = torch.mul(grad, grad, out=self.scratch.get("fim", grad.shape))
        return square.mul_(1 - self.keep).add_(full_moments(self.step, index)["fim"].load(), alpha=self.keep)

    def _scale(self, index: Index, fim: Tensor) -> Tensor:
        return torch.sqrt(fim, out=self.scratch.get("scale", fim.shape)).add_(broadcast_tile(self.eps, index))

    def _decay(self, index: Index, fim: Tensor, scale: Tensor, param: Tensor) -> Tensor:
        """Return r before it is clipped, in place of the quotient by the scale."""
        decays = param.isfinite() & fim.isfinite() & broadcast_tile(self.has_grad, index)
        if self.hyper.flags["mask_decay"]:
            decays &= fim > 0
        return torch.div(param, scale, out=scale).masked_fill_(~decays, 0.0)

    def _add(self, number: int, index: Index, tensor: Tensor) -> None:
        """Add the squares of a tile to a sum, without those that are not finite."""
        square = torch.mul(tensor, tensor, out=self.scratch.get("square", tensor.shape))
        found = self._summed(square)
        if not known_finite(found):
            found = self._summed(square.nan_to_num_(0.0, 0.0, 0.0))
        broadcast_tile(self.sums[number], index).add_(found)

    def _summed(self, tile: Tensor) -> Tensor:
        return tile.sum(matrix_dims(self.step), keepdim=True)

    def _rms(self, number: int) -> Tensor:
        return (self.sums[number] / entries_of_matrix(self.step)).sqrt()


FADAM = RulePasses(covers, in_passes(InTiles))
