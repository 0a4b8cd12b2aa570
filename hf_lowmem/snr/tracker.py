"""The tracker, which measures the second moments of a training run and appends their ratios to a CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowmem.log import is_first_process
from hf_lowmem.moments import Full
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.roles import ParamRole, assign_roles
from hf_lowmem.sharding import whole
from hf_lowmem.shards import whole_moment
from hf_lowmem.snr.choice import HEAD, ROW_COL
from hf_lowmem.snr.measure import Ratio, candidates, ratios_of, unreduced
from hf_lowmem.snr.ratios import keep_until, write_rows
from hf_lowmem.state import FULL_SPACE, StatePlan
from hf_lowmem.step_checks import check_whole

MOST_AXES = 4  # up to which all subsets of a weight's axes are measured
WITH_SECOND_MOMENT = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


def is_due(step: int, every: int | None = None) -> bool:
    """Return whether the second moments are measured after `step`: after the first, and then every `every` steps.

    By default that is every 100 steps below 1000, and then every 1000, as SlimAdam's authors do.
    """
    return step == 1 or step % (every or (100 if step < 1000 else 1000)) == 0


class SnrTracker:
    """Measures the signal-to-noise ratios of the second moments under an optimizer that keeps them in full.

    That is torch's AdamW or Adam, or `lowmem_adamw` in 32, 16 or 8 bits. Every weight is measured over every subset of
    its axes except that of experts; matrices also by head ("head 64" for heads of queries or keys with 64 entries) and
    for the estimate from the means of rows and columns ("row_col"); and the parts of a fused weight by themselves, as
    `name[query]`.

    Source: arXiv:2503.01843; the columns are those of the authors' code dayal-kalra/low-memory-adam@bb3652c.
    It departs from it: the second moments are measured after the step, and not before it.

    Args:
        model: the model that is trained.
        path: the CSV. What it holds is replaced, except up to `resumed_step`.
        resumed_step: the step from which a run is resumed.

    Raises:
        ValueError: a weight is a flat piece of weights, or the optimizer keeps no full second moment of it.

    >>> from hf_lowmem.snr import SnrTracker
    >>> model = torch.nn.Linear(16, 8)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> tracker = SnrTracker(model, "snr.csv")
    >>> for step in (1, 2):
    ...     model(torch.rand(4, 16)).square().sum().backward()
    ...     optimizer.step()
    ...     tracker.measure(optimizer, step)
    """

    def __init__(self, model: nn.Module, path: str | Path, resumed_step: int = 0) -> None:
        self.path = Path(path)
        self._roles = {id(param): role for param, role in assign_roles(model) if param.requires_grad}
        for param in model.parameters():
            if param.requires_grad:
                check_whole(param, self._roles[id(param)].name)
        if is_first_process():
            keep_until(self.path, resumed_step)

    @torch.no_grad()
    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError if the optimizer is known to keep no full second moment of a weight.

        One that is neither torch's nor ours is known by its state alone, after its first step.
        """
        if type(optimizer).__module__.startswith("torch.optim.") and not isinstance(optimizer, WITH_SECOND_MOMENT):
            raise ValueError(_no_second_moment(optimizer, "any weight"))
        for _ in second_moments(optimizer, self._roles):
            pass

    @torch.no_grad()
    def measure(self, optimizer: Optimizer, step: int) -> None:
        """Append the ratios after `step` to the CSV; the first process of a run does so for all.

        Raises:
            ValueError: the optimizer keeps no full second moment of a weight.
        """
        rows: list[tuple[str, tuple[int, ...], str]] = []
        ratios: list[Tensor] = []
        for param, v in second_moments(optimizer, self._roles):  # of shards, all processes gather it
            if v is not None and v.numel() and is_first_process():
                named = list(rows_of(v, self._roles[id(param)]))
                rows += [row for row, _ in named]
                ratios.append(torch.stack([torch.stack(ratio) for _, ratio in named]))
        if not is_first_process():
            return
        if not rows:
            raise ValueError(_no_second_moment(optimizer, "any weight"))
        numbers = torch.cat([each.to(ratios[0].device) for each in ratios]).tolist()  # waits for the device once
        write_rows(
            self.path,
            (
                (step, key, str(shape), how, *("" if math.isnan(number) else number for number in found))
                for (key, shape, how), found in zip(rows, numbers, strict=True)
            ),
        )


def second_moments(optimizer: Optimizer, roles: dict[int, ParamRole]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each parameter of known role with its second moment, None if it has not been stepped yet.

    Raises:
        ValueError: the optimizer keeps no full second moment of one of them.
    """
    listed: list[tuple[Tensor, StatePlan | None]]
    if isinstance(optimizer, LowMemOptimizer):
        optimizer.synchronize_state()  # it may be on its way to the host
        listed = [
            (param, optimizer.plan_by(layout, group, param))
            for _, group, layouts in optimizer.groups_with_layouts()
            for param, layout in zip(group["params"], layouts, strict=True)
        ]
    else:
        listed = [(param, None) for group in optimizer.param_groups for param in group["params"]]
    for param, plan in listed:
        role = roles.get(id(param))
        if role is None:
            continue
        state, shape = optimizer.state.get(param, {}), tuple(param.shape)
        if plan is not None:
            full = isinstance(plan.moments.get("exp_avg_sq"), Full) and plan.projection == FULL_SPACE
            v = whole_moment(plan, "exp_avg_sq", state, shape) if full and state else None
        else:
            v = whole(state.get("exp_avg_sq"))
            full = not state or (isinstance(v, Tensor) and v.shape == param.shape)
        if not full:
            raise ValueError(_no_second_moment(optimizer, role.name))
        yield param, v


def _no_second_moment(optimizer: Optimizer, name: str) -> str:
    return (
        f"{getattr(optimizer, 'optim_name', type(optimizer).__name__)} keeps no full second moment of {name}, so its "
        "signal-to-noise ratio cannot be measured: train with lowmem_adamw or adamw_torch."
    )


def rows_of(v: Tensor, role: ParamRole) -> Iterator[tuple[tuple[str, tuple[int, ...], str], Ratio]]:
    """Yield (key, shape, reduction as text) and the ratio of everything that is measured of a second moment."""
    found = candidates(role)
    for segment in unreduced(role):
        rows = segment.outer * (segment.stop - segment.start)
        shape = tuple(rows if axis == segment.axis else size for axis, size in enumerate(role.shape))
        key = f"{role.name}[{segment.name}]" if segment.name else role.name
        subsets = _subsets(range(v.ndim or 1), role.expert_axis)
        segments = {str(axes): replace(segment, axes=axes) for axes in subsets}
        named = found.get(segment.name, {})
        if ROW_COL in named:
            segments[ROW_COL] = named[ROW_COL]
        if HEAD in named:
            heads = math.prod(named[HEAD].spec(role.shape).shape)
            segments[f"{HEAD} {math.prod(shape) // heads}"] = named[HEAD]
        for how, ratio in zip(segments, ratios_of(v, segments.values()), strict=True):
            yield (key, shape, how), ratio


def _subsets(axes: Sequence[int], expert_axis: int | None) -> Iterator[tuple[int, ...]]:
    free = [axis for axis in axes if axis != expert_axis]
    for size in range(1, len(free) + 1 if len(axes) <= MOST_AXES else 2):
        yield from combinations(free, size)
