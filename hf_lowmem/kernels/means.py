"""Sums of squared gradients for second moments that are means, found one tile at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, ParamStep
from hf_lowmem.moments import GroupMean
from hf_lowmem.state import StatePlan

Index = tuple[slice, ...]  # of the leading axes; those after them are whole
TILE = 1 << 17  # entries of a tile on the CPU, which stays in the cache with its temporaries
ACCELERATOR_TILE = 1 << 24  # on an accelerator, which that many keep busy


def tile_size(device: torch.device) -> int:
    """Return how many entries a step in plain torch takes at a time."""
    return TILE if device.type == "cpu" else ACCELERATOR_TILE


def tiles(shape: Sequence[int], limit: int, depth: int) -> Iterator[Index]:
    """Cover `shape` with tiles of at most `limit` entries, cutting only the first `depth` axes."""
    if math.prod(shape) <= limit or depth == 0:
        yield ()
        return
    row = math.prod(shape[1:])
    if shape[0] > 1 and (row <= limit or depth == 1):
        rows = max(limit // row, 1)
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])),)
        return
    for start in range(shape[0]):
        for rest in tiles(shape[1:], limit, depth - 1):
            yield (slice(start, start + 1), *rest)


def square_sums(step: ParamStep) -> dict[str, Tensor]:
    """Return the sums of the squared gradient by the name of the state that averages them, of the state's shape."""
    found: dict[str, Tensor] = {}
    for name, moment in means_of(step.plan):
        totals = [torch.zeros_like(stored, dtype=torch.float64) for stored in moment.stored(step.state, name)]
        for index in tiles(step.grad.shape, tile_size(step.grad.device), step.grad.ndim):
            moment.add_squares(totals, scaled_grad(step, index).square(), index)
        found |= dict(zip(moment.state_names(name), totals, strict=True))
    return found


def scaled_grad(step: ParamStep, index: Index) -> Tensor:
    """Return a tile of the gradient in the plan's arithmetic, clipped; it may be the gradient's own memory."""
    grad = step.grad[index].to(step.plan.arithmetic)
    return grad if step.clip is None else grad * step.clip.scale


def average(step: ParamStep, sums: dict[str, Tensor], beta2: float) -> None:
    """Average sums of squares over whole weights into the stored means."""
    for name, moment in means_of(step.plan):
        totals = [sums[key] for key in moment.state_names(name)]
        moment.average(moment.stored(step.state, name), totals, step.grad.numel(), beta2)


def means_of(plan: StatePlan) -> list[tuple[str, GroupMean]]:
    """Return the moments, by name, that are means of the squared gradient: a second moment alone can be one."""
    moment = plan.moments.get("exp_avg_sq")
    return [("exp_avg_sq", moment)] if isinstance(moment, GroupMean) else []


class Sums:
    """The sums of squares of a bucket's weights, which compiled kernels find as means in memory that is kept.

    They average the squares, with a weight of 1, into means of zero that take the place of the optimizer's.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._means: list[list[tuple[str, Tensor, int]]] = []
        states = []
        for step in bucket:
            means: list[tuple[str, Tensor, int]] = []
            for name, moment in means_of(step.plan):
                names = moment.state_names(name)
                found = [torch.zeros_like(step.state[each]) for each in names]
                sizes = moment.group_sizes(step.grad.numel(), [mean.numel() for mean in found])
                means += zip(names, found, sizes, strict=True)
            states.append({**step.state, **{name: mean for name, mean, _ in means}})
            self._means.append(means)
        self._bucket = replace(bucket, states=states, kept={})

    @classmethod
    def of(cls, bucket: Bucket) -> Sums:
        """Return those that the bucket keeps."""
        found: Sums | None = bucket.kept.get(cls)
        if found is None:
            found = bucket.kept[cls] = cls(bucket)
        return found

    def taking(self, bucket: Bucket) -> Bucket:
        """Return the bucket as it is now, but with means of zero."""
        if means := [mean for each in self._means for _, mean, _ in each]:
            torch._foreach_zero_(means)
        return replace(self._bucket, grads=bucket.grads, clip=bucket.clip)

    def read(self) -> list[dict[str, Tensor]]:
        """Return the sums of each weight by name, float64."""
        return [{name: mean.double() * size for name, mean, size in means} for means in self._means]


@dataclass(frozen=True)
class TileMean:
    """A mean of squared gradients as the rule takes it for one tile.

    Args:
        totals: where the sums of squares are added up.
        averaged: whether the stored means hold this step's gradient already.
    """

    moment: GroupMean
    stored: list[Tensor]
    totals: list[Tensor]
    averaged: bool
    index: Index = ()

    @classmethod
    def of(cls, moment: GroupMean, step: ParamStep, name: str, averaged: bool) -> TileMean:
        stored = moment.stored(step.state, name)
        return cls(
            moment,
            stored,
            [] if averaged else [mean.new_zeros(mean.shape, dtype=torch.float64) for mean in stored],
            averaged,
        )

    def at(self, index: Index) -> TileMean:
        return TileMean(self.moment, self.stored, self.totals, self.averaged, index)

    def ema(self, value: Tensor, beta: float | Tensor) -> Tensor:
        """Average `value`, the squared gradient, in where that has not been done, and return the estimate."""
        if self.averaged:
            return self.moment.estimate(self.stored, self.index, value.shape)
        return self.moment.ema_of_tile(self.stored, self.totals, value, self.index, beta)
