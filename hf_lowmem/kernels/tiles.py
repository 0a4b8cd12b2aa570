"""The update rule run on slices of weight, gradient and state: the fallback for every elementwise rule.

No temporary is as large as the weight. Where the second moment is a mean whose groups the slices would cut, a first
pass over the gradient finds the sums of squares, and the rule is run by the new means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.means import Index, TileMean, means_of, scaled_grad, tile_size, tiles
from hf_lowmem.kernels.registry import Backend
from hf_lowmem.kernels.rule import BoundProjection
from hf_lowmem.moments import Full, GroupMean
from hf_lowmem.state import FULL_SPACE, BoundMoment, StatePlan, TensorSpec
from hf_lowmem.update_rules import RULES


class Tiles(Backend):
    """The rule on tiles of at most `tile_size` entries, where the state's layout lets a tile be that small."""

    name = "tiles"
    is_slow = True

    def covers(self, rule: str, step: ParamStep) -> bool:
        plan, shape = step.plan, tuple(step.param.shape)
        # The sums that means take are those of squares, so no other moment may be a mean.
        kinds = all(
            type(moment) is Full or (type(moment) is GroupMean and name == "exp_avg_sq")
            for name, moment in plan.moments.items()
        )
        if not (kinds and RULES[rule].elementwise and plan.projection is FULL_SPACE):
            return False
        cut, limit = cut_of(plan, shape), tile_size(step.param.device)
        if means_of(plan) and not RULES[rule].averages_squares and not cut.keeps_groups(shape, limit):
            return False  # the sums of a first pass are not those that the rule averages
        return cut.axes > 0 or prod(shape) <= limit

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        for step in bucket:
            limit = tile_size(step.param.device)
            cut = cut_of(step.plan, tuple(step.param.shape))
            if cut.keeps_groups(step.param.shape, limit):
                run_tiles(bucket.rule, step, hyper, cut.uncrossed, averaged=False)
            else:
                super().step(Bucket.of([step], bucket.rule, self), hyper)

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        for step in bucket:
            run_tiles(bucket.rule, step, hyper, cut_of(step.plan, tuple(step.param.shape)).axes, averaged=True)


def run_tiles(rule: str, step: ParamStep, hyper: Hyper, axes: int, averaged: bool) -> None:
    """Step a parameter a tile at a time, cutting its first `axes` axes; see `TileMean` for `averaged`."""
    plan, weight = step.plan, step.weight()
    number = step.step.double() if isinstance(step.step, Tensor) else step.step
    means = {name: TileMean.of(moment, step, name, averaged) for name, moment in means_of(plan)}
    space, values = BoundProjection(FULL_SPACE, {}, plan.stacked), {**hyper.numbers, **hyper.flags}
    for index in tiles_of(step, axes):
        tile, grad = weight[index], scaled_grad(step, index)
        moments = {**full_moments(step, index), **{name: mean.at(index) for name, mean in means.items()}}
        tile.store(RULES[rule].function(tile.load(), grad, moments, space, number, **values))


def tiles_of(step: ParamStep, axes: int | None = None) -> Iterator[Index]:
    """Return the tiles of a parameter, cut along its first `axes` axes, or along all that its state lets be cut."""
    cut, limit = cut_of(step.plan, tuple(step.param.shape)), tile_size(step.param.device)
    return tiles(step.param.shape, max(limit - limit % cut.block, cut.block), cut.axes if axes is None else axes)


def full_moments(step: ParamStep, index: Index) -> dict[str, Any]:
    """Return the full moments of one tile of a parameter, to be read and written."""
    cut, plan = cut_of(step.plan, tuple(step.param.shape)), step.plan
    state = {name: step.state[name][state_index(spec, index)] for name, spec in cut.specs}
    shape = tuple(step.param[index].shape)
    return {
        name: BoundMoment(moment, state, name, plan.codec, shape, plan.arithmetic)
        for name, moment in plan.moments.items()
        if type(moment) is Full
    }


class Cut(NamedTuple):
    """How the weights of one plan and shape may be cut into tiles.

    Args:
        axes: how many leading axes weight and full moments may be cut along.
        uncrossed: how many of those may be cut without cutting a group of a mean.
        block: what divides a tile where the last axis is cut.
        specs: the state tensors of the full moments, by name.
    """

    axes: int
    uncrossed: int
    block: int
    specs: tuple[tuple[str, TensorSpec], ...]

    def keeps_groups(self, shape: Sequence[int], limit: int) -> bool:
        """Return whether tiles of at most `limit` entries cut no group, or need not."""
        return self.uncrossed == self.axes or prod(shape[self.uncrossed :]) <= limit


@lru_cache(maxsize=1 << 12)
def cut_of(plan: StatePlan, shape: tuple[int, ...]) -> Cut:
    """Return how weights of this plan and shape may be cut."""
    axes, block, specs = len(shape), 1, dict[str, TensorSpec]()
    for name, moment in plan.moments.items():
        if type(moment) is Full:
            specs |= moment.specs(name, shape, plan.codec)
    for spec in specs.values():
        own = next((axis for axis, dim in enumerate(spec.param_dims) if dim != axis), len(spec.param_dims))
        if spec.block > 1 and own == len(spec.param_dims) - 1 == len(shape) - 1:
            own, block = own + 1, max(block, spec.block)
        axes = min(axes, own)
    uncrossed = min([axes, *[moment.uncrossed_axes(len(shape)) for _, moment in means_of(plan)]])
    return Cut(axes, uncrossed, block, tuple(specs.items()))


def state_index(spec: TensorSpec, index: Index) -> Index:
    """Return the part of a state tensor that belongs to a tile of the weight."""
    if spec.block == 1 or len(index) < len(spec.shape):
        return index
    last = index[-1]
    return (*index[:-1], slice(last.start // spec.block, -(-last.stop // spec.block)))


TILES = Tiles()
