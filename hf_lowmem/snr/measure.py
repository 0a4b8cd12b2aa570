"""The signal-to-noise ratio of a second moment: how well a mean, or a product of means, stands for its entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.moments import Segment
from hf_lowmem.roles import ParamRole
from hf_lowmem.snr.choice import HEAD, ROW_COL

TILE, CPU_TILE = 1 << 22, 1 << 19  # entries that are converted to float64 at a time; fewer on a CPU, for its caches
EXACT = 1e24  # a larger ratio is that of equal entries, between which float64 has found nothing but its own rounding
BY_HEAD = ("attention_query", "attention_key")


def snr(v: Tensor, axes: Sequence[int]) -> Tensor:
    """Return the signal-to-noise ratio of a second moment whose entries are averaged over `axes`.

        SNR_K(v) = mean over the other axes of [ mean_K(v)^2 / var_K(v) ]

    The variance is that of the population. Groups whose ratio is not finite, because all their entries are equal, do
    not count. The arithmetic is float64, because float32 squares of entries below 1e-22 underflow.

    Source: arXiv:2503.01843; authors' code dayal-kalra/low-memory-adam@bb3652c, `estimate_snr`.

    Args:
        v: the second moment, without bias correction, of at least one axis, in any floating dtype.
        axes: the axes K.

    Returns:
        The ratio as a 0-D float64 tensor on the device of `v`; NaN if no group has a finite one.

    >>> v = torch.tensor([[2.0, 4.0], [3.0, 3.0]])
    >>> snr(v, (1,))  # 3^2 / 1 in the first row; the second has no variance
    tensor(9., dtype=torch.float64)
    """
    return SecondMoment(v).ratio(axes).snr


def factored_snr(v: Tensor, axes: Sequence[int], cross_axes: Sequence[int]) -> Tensor:
    """Return the signal-to-noise ratio of the rank-1 estimate of a second moment from its row and column means.

    The ratio of a matrix is mean(estimate^2) / mean((v - estimate)^2), where the estimate is row * col / mean(row).
    For a constant estimate it would be `snr`, so the two compare. The ratio of several matrices is their harmonic
    mean, because the ratio of a matrix that is nearly of rank 1 is so large that it would hide all others.

    Args:
        v: as for `snr`.
        axes: the axes that the row means are over.
        cross_axes: the axes that the column means are over. What is left of the axes counts matrices.

    Returns:
        As for `snr`; infinite if the estimate is exact, and NaN if all matrices are zero.

    >>> v = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    >>> factored_snr(v, (1,), (0,)) > snr(v, (0, 1))
    tensor(True)
    """
    return SecondMoment(v).ratio(axes, cross_axes).snr


def snr_of(v: Tensor, segment: Segment) -> Tensor:
    """Return the signal-to-noise ratio of what `segment` keeps of the second moment `v` of a whole weight."""
    return next(ratios_of(v, [segment])).snr


def ratios_of(v: Tensor, segments: Iterable[Segment]) -> Iterator[Ratio]:
    """Yield the ratio of what each of several segments keeps of a second moment `v`.

    The segments are of the same entries. Those with the same `rows_per_block` share the means that are known.
    """
    moments: dict[int, SecondMoment] = {}
    for segment in segments:
        if segment.rows_per_block not in moments:
            moments[segment.rows_per_block] = SecondMoment(segment.view(v))
        yield moments[segment.rows_per_block].ratio(*(mean.mean_dims for mean in segment.means))


def unreduced(role: ParamRole) -> list[Segment]:
    """Return a weight, or each part of a fused one, as a segment along fan_out that averages nothing."""
    if role.parts:
        assert role.fan_out is not None
        return [Segment(part.name, role.fan_out, part.outer, part.start, part.stop, ()) for part in role.parts]
    axis = role.fan_out or 0
    return [Segment("", axis, 1, 0, role.shape[axis] if role.shape else 1, ())]


def candidates(role: ParamRole) -> dict[str, dict[str, Segment]]:
    """Return what the second moment of a weight may be reduced to, by part and by name.

    The names are "fan_in" and "fan_out" (the axis that is averaged over), "head" (fan_in and the rows of a head, for
    queries and keys), "both", and "row_col" (factored). The part is "" for a weight that is not fused. Axes of experts
    are never averaged over. Vectors, norms, biases and tensors of unknown axes have no candidates.

    >>> from hf_lowmem.roles import ParamRole
    >>> role = ParamRole("k_proj.weight", (8, 16), "attention_key", fan_out=0, fan_in=(1,), head_dim=4)
    >>> {name: segment.axes for name, segment in candidates(role)[""].items()}
    {'fan_in': (1,), 'fan_out': (0,), 'head': (1,), 'both': (0, 1), 'row_col': (1,)}
    """
    if role.fan_out is None or not role.fan_in or len(role.shape) < 2:
        return {}
    roles = [part.role for part in role.parts] or [role.role]
    return {
        segment.name: {how: replace(segment, **means) for how, means in _reductions(role, name).items()}
        for name, segment in zip(roles, unreduced(role), strict=True)
    }


def _reductions(role: ParamRole, name: str) -> dict[str, dict[str, Any]]:
    """Return the fields of `Segment` by candidate of a weight, or a part of it, whose role is `name`."""
    assert role.fan_out is not None
    fan_in, fan_out = role.fan_in, (role.fan_out,)
    by_head = role.head_dim and name in BY_HEAD
    return {
        "fan_in": {"axes": fan_in},
        "fan_out": {"axes": fan_out},
        **({HEAD: {"axes": fan_in, "rows_per_block": role.head_dim}} if by_head else {}),
        "both": {"axes": tuple(sorted((*fan_in, *fan_out)))},
        ROW_COL: {"axes": fan_in, "cross_axes": fan_out},
    }


class Ratio(NamedTuple):
    """A signal-to-noise ratio, and the means of what it is made of over all groups: 0-D float64 each."""

    snr: Tensor
    mean_sqr: Tensor
    var: Tensor


class SecondMoment:
    """A second moment of which any ratios are measured, in float64.

    It is converted in tiles along its longest axis, which saves memory on a GPU and time on a CPU.
    """

    def __init__(self, v: Tensor) -> None:
        self._v = v
        self._axis = max(range(v.ndim), key=lambda axis: v.shape[axis])
        tile = CPU_TILE if v.device.type == "cpu" else TILE
        self._size = max(1, tile * v.shape[self._axis] // max(v.numel(), 1))
        self._means: dict[tuple[int, ...], Tensor] = {}  # the means that are known, by their axes

    def ratio(self, axes: Sequence[int], cross_axes: Sequence[int] = ()) -> Ratio:
        """Return the ratio of the mean over `axes`, or with `cross_axes` of the rank-1 estimate from both means."""
        rows, dims = self._positive(axes), self._positive((*axes, *cross_axes))
        row = self._mean(rows)
        if cross_axes:
            col = self._mean(self._positive(cross_axes)) / row.mean(dims, keepdim=True)
            signal = row.square().mean(dims, keepdim=True) * col.square().mean(dims, keepdim=True)
            noise = self._mean_of(lambda tile, at: self._part(row, at) * self._part(col, at) - tile, dims)
            inverse = noise / signal
            known = inverse.isfinite()
            inverse = inverse.where(known & (inverse > 1 / EXACT), 0)
            snr = known.sum() / inverse.sum()
        else:
            signal = row.square()
            noise = self._mean_of(lambda tile, at: tile - self._part(row, at), dims)
            ratios = signal / noise
            known = ratios < EXACT  # False for NaN too
            snr = ratios.where(known, 0).sum() / known.sum()
        return Ratio(snr, signal.mean(), noise.mean())

    def _positive(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({axis % self._v.ndim for axis in axes}))

    def _mean(self, dims: tuple[int, ...]) -> Tensor:
        """Return the mean over `dims`, from that over some of them where it is known."""
        if dims not in self._means:
            fewer = next((self._means[known] for known in self._means if set(known) < set(dims)), None)
            mean = self._mean_of(None, dims) if fewer is None else fewer.mean(dims, keepdim=True)
            self._means[dims] = mean
        return self._means[dims]

    def _mean_of(self, error: Callable[[Tensor, int], Tensor] | None, dims: tuple[int, ...]) -> Tensor:
        """Return the mean over `dims`, with kept axes: of the entries, or of the squares of `error` of each tile."""
        shape = [1 if axis in dims else size for axis, size in enumerate(self._v.shape)]
        total = self._v.new_zeros(shape, dtype=torch.float64)
        for start in range(0, self._v.shape[self._axis], self._size):
            tile = self._cut(self._v, start).double()
            if error is not None:
                tile = error(tile, start).square_()
            self._part(total, start).add_(tile.sum(dims, keepdim=True))
        return total / (self._v.numel() // math.prod(shape))

    def _part(self, means: Tensor, start: int) -> Tensor:
        """Return the means of the tile at `start`, broadcastable to it."""
        return means if means.shape[self._axis] == 1 else self._cut(means, start)

    def _cut(self, tensor: Tensor, start: int) -> Tensor:
        return tensor.narrow(self._axis, start, min(self._size, tensor.shape[self._axis] - start))
