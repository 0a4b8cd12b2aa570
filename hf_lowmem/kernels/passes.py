"""Steps in passes over a weight, between which sums over all of it have to be complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.registry import Backend
from hf_lowmem.sharding import add_up


class Sum(NamedTuple):
    """A sum over a weight that the passes after it need.

    Args:
        values: what the entries at hand add up to. Whoever holds a shard of a weight replaces them, in place, by what
            all shards add up to.
        dims: for each axis of `values`, the axis of the weight that it runs along entry by entry, as
            `TensorSpec.param_dims`. A sum that runs along the axis that the weight is cut along is complete in itself.
    """

    values: Tensor
    dims: tuple[int | None, ...]


Passes = Iterator[list[Sum]]  # what one pass has found, until nothing more is needed


class RulePasses(NamedTuple):
    """How a backend takes the steps of one rule.

    Args:
        covers: returns whether it can step a parameter.
        passes: steps a parameter; it yields the sums of each pass that another one follows.
    """

    covers: Callable[[ParamStep], bool]
    passes: Callable[[ParamStep, Hyper], Passes]


class InPasses(Backend):
    """Steps of rules that are not elementwise, one weight at a time.

    Args:
        name: the backend's name.
        rules: how it steps each rule.
        devices: the types of device that it is written for; empty for all.
    """

    adds_up_shards = True

    def __init__(self, name: str, rules: Mapping[str, RulePasses], devices: tuple[str, ...] = ()) -> None:
        self.name, self.rules, self.devices = name, rules, devices

    def covers(self, rule: str, step: ParamStep) -> bool:
        return rule in self.rules and self.rules[rule].covers(step) and self.available()

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        self.step(bucket, hyper)  # none of its rules has means of groups

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        for step in bucket:
            for sums in self.rules[bucket.rule].passes(step, hyper):
                if bucket.solo is not None:  # else all entries are at hand, so the sums are complete
                    add_up((found.values, bucket.solo.tile.incomplete_over(found.dims)) for found in sums)
