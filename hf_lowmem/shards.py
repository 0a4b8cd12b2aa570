"""A process steps its shard of a weight as weights of their own, by means that all processes have added up.

A kernel steps a shard as if it were a whole weight, with the second moments of the groups that lie in it. A shard that
cuts heads, or the parts of a fused weight, is described to the kernels by groups of other sizes, and one that begins
in the middle of a repeat of such parts is stepped in several pieces. The means of groups that cross shards are found
before the step: each process adds up its own squares, one collective adds up those of all, and the kernels take the
step by means that are averaged already.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.means import means_of
from hf_lowmem.moments import GroupMean, Segment
from hf_lowmem.moments.group_mean import average_by
from hf_lowmem.sharding import Groups, Tile, add_up, whole
from hf_lowmem.state import FULL_SPACE, State, StatePlan
from hf_lowmem.state_place import can_be_cut
from hf_lowmem.update_rules import RULES

SECOND = "exp_avg_sq"
_TINY = torch.finfo(torch.float32).tiny


class Source(NamedTuple):
    """A source says where the mean of a piece is: in a state tensor of the shard, all of it or a span of one axis."""

    name: str
    axis: int = 0
    span: tuple[int, int] | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a view of the source in one of the shard's tensors, of which there is one per name."""
        tensor = tensors[self.name]
        return tensor if self.span is None else tensor.narrow(self.axis, self.span[0], self.span[1] - self.span[0])


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a shard that is stepped as a weight of its own.

    Args:
        where: the part, as slices of the shard.
        start: the place of its first entry in the weight, in the weight's order.
        plan: the plan of its state, whose groups are counted from the start of the piece.
        sources: where the means of its plan are, by name.
        factored: the names of the two means of each factored segment that is cut, and the segment.
    """

    where: tuple[slice, ...]
    start: int
    plan: StatePlan
    sources: Mapping[str, Source]
    factored: tuple[tuple[str, str, Segment], ...]

    def state(self, shard: State) -> State:
        """Return the piece's state: views of the shard's, and copies of means that are not contiguous or scaled."""
        kept = {name: tensor[self.where] if tensor.ndim else tensor for name, tensor in shard.items()}
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith(SECOND) or not self.sources}
        scaled = {name for *names, _ in self.factored for name in names}
        means = {name: source.of(shard) for name, source in self.sources.items()}
        return kept | {n: copied(mean) if n in scaled else mean.contiguous() for n, mean in means.items()}

    def take_means(self, state: State, shard: State, totals: Mapping[str, Tensor]) -> None:
        """Write the shard's means into those of the piece that are copies.

        A kernel divides the product of a row's and a column's mean by the mean of the rows, or of the columns, that
        the piece has. So both are scaled, so that this mean becomes the one of the whole matrix, which `totals` has by
        the name of the row means.
        """
        for name, source in self.sources.items():
            if not is_view(state[name], mean := source.of(shard)):
                state[name].copy_(mean)
        for row, col, segment in self.factored:
            rows, cols = state[row].double(), state[col].double()
            total = totals[self.sources[row].name].clamp(min=_TINY)
            state[row].copy_(rows * (cols.mean(segment.axes, keepdim=True) / total))
            state[col].copy_(cols * (rows.mean(segment.cross_axes, keepdim=True) / total))


@dataclass(frozen=True)
class Cut:
    """How a weight of one plan is cut for one process.

    Args:
        gathered: whether one process steps the whole weight, whose pieces are gathered for it, since its state cannot
            be cut along with it.
        pieces: what is stepped of it here; nothing of an empty shard.
        sums: for each mean, the groups over which its sums of squares are added up.
    """

    gathered: bool
    pieces: tuple[Piece, ...]
    sums: Mapping[str, Groups]

    @property
    def crosses(self) -> bool:
        """Return whether some mean is taken over entries of other processes, too."""
        return any(self.sums.values())


class Shard:
    """The shard of a weight as it is stepped.

    Args:
        rule: the update rule.
        plan: the plan of the whole weight.
        tile: where the shard is.
        state: the shard's part of each state tensor.
    """

    def __init__(self, rule: str, plan: StatePlan, tile: Tile, state: State) -> None:
        self.tile, self.state, self.cut = tile, state, cut_of(rule, plan, tile)
        self.moment = None if self.cut.gathered else mean_of(rule, plan)
        self.is_solo = self.cut.gathered or rule in IN_PASSES
        self.spread = tuple(group for groups in tile.groups for group in groups)
        self.piece_states = [piece.state(state) for piece in self.cut.pieces]
        self._specs = {name: mean.spec(tile.whole) for name, mean in named_means(self.moment)}
        self._totals: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forget the sums of the last step."""
        self._totals = {name: torch.zeros_like(self.state[name], dtype=torch.float64) for name in self._specs}

    def add(self, number: int, sums: Mapping[str, Tensor]) -> None:
        """Add the sums of squares that a piece has found."""
        for name, source in self.cut.pieces[number].sources.items():
            source.of(self._totals).add_(sums[name].view(source.of(self._totals).shape))

    def sums(self) -> list[tuple[Tensor, Groups]]:
        """Return the sums of squares of all pieces, each with the groups over which it is to be added up."""
        return [(total, self.cut.sums[name]) for name, total in self._totals.items()]

    def take_sums(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return each mean, the sum of the squares of all shards, and the number of entries that it is taken over."""
        assert self.moment is not None
        sizes = self.moment.group_sizes(math.prod(self.tile.whole), [math.prod(s.shape) for s in self._specs.values()])
        found = [(self.state[n], total, size) for (n, total), size in zip(self._totals.items(), sizes, strict=True)]
        self._totals = {}
        return found

    def matrix_sums(self) -> list[tuple[Tensor, Groups]]:
        """Return the sums of the row means of each factored matrix that is cut, to be added up."""
        self._matrix_means: dict[str, Tensor] = {}
        found: list[tuple[Tensor, Groups]] = []
        if self.moment is None:
            return found
        for segment in self.moment.segments:
            if not (segment.cross_axes and is_cut(segment, self.tile)):
                continue
            row, col = (self.moment.state_name(SECOND, mean) for mean in segment.means)
            # The means of one side are all here if the other side is the one that is cut.
            name, axes = (
                (col, segment.axes) if self._is_cut(row) and not self._is_cut(col) else (row, segment.cross_axes)
            )
            total = self.state[name].sum(axes, keepdim=True, dtype=torch.float64)
            self._matrix_means[row] = total.div_(math.prod(self._specs[name].shape[axis] for axis in axes))
            others = [axis for axis in range(len(self.tile.whole)) if axis not in axes]
            found.append((total, self.tile.incomplete_over(others) if self._is_cut(name) else ()))
        return found

    def _is_cut(self, name: str) -> bool:
        """Return whether each process has a part of a mean alone; the answer is the same on all processes."""
        return any(axis in self._specs[name].param_dims for axis in self.tile.cut_axes)

    def hand_out(self) -> None:
        """Give the pieces the averaged means."""
        for piece, state in zip(self.cut.pieces, self.piece_states, strict=True):
            piece.take_means(state, self.state, self._matrix_means)


def average_over_shards(shards: Sequence[tuple[Shard, float]]) -> None:
    """Add up the sums of squares of all processes and average them by each beta2: in one collective, or two where a
    factored weight is cut along both of its axes."""
    add_up(pair for shard, _ in shards for pair in shard.sums())
    alike: dict[tuple[float, torch.device], list[tuple[Tensor, Tensor, int]]] = defaultdict(list)
    for shard, beta2 in shards:
        for mean, total, size in shard.take_sums():
            alike[beta2, mean.device].append((mean, total, size))
    for (beta2, _), found in alike.items():
        average(found, beta2)
    add_up(pair for shard, _ in shards for pair in shard.matrix_sums())
    for shard, _ in shards:
        shard.hand_out()


def average(found: Sequence[tuple[Tensor, Tensor, int]], beta2: float) -> None:
    """Average sums of squares into means: all at once, as there are many and they are small."""
    means, totals, sizes = zip(*found, strict=True)
    lengths = [mean.numel() for mean in means]
    flat, flat_totals = (torch.cat([each.reshape(-1) for each in tensors]) for tensors in (means, totals))
    each_size = torch.tensor(sizes, dtype=flat_totals.dtype).repeat_interleave(torch.tensor(lengths))
    average_by([flat], [flat_totals], [each_size.to(flat.device)], beta2)
    torch._foreach_copy_(means, [new.view(mean.shape) for new, mean in zip(flat.split(lengths), means, strict=True)])


def whole_moment(plan: StatePlan, name: str, state: State, shape: tuple[int, ...]) -> Tensor:
    """Return all of a full moment of a weight, which may be sharded, in the dtype of the arithmetic."""
    held = {key: whole(state[key]) for key in plan.moments[name].specs(name, shape, plan.codec)}
    return plan.bind(held, shape)[name].load()


def copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def is_view(tensor: Tensor, of: Tensor) -> bool:
    """Return whether two tensors of the same shape are the same memory."""
    return tensor.data_ptr() == of.data_ptr() and tensor.stride() == of.stride()


@lru_cache(maxsize=1 << 12)
def cut_of(rule: str, plan: StatePlan, tile: Tile) -> Cut:
    """Return how a weight is cut under an update rule and a plan; all processes find the same kind of cut."""
    if is_gathered(rule, plan, tile):
        return Cut(True, (), {})
    moment = mean_of(rule, plan)
    sums = {name: tile.incomplete_over(mean.spec(tile.whole).param_dims) for name, mean in named_means(moment)}
    pieces = [] if 0 in tile.shape else pieces_of(plan, tile, moment)
    return Cut(False, tuple(pieces), sums)


def mean_of(rule: str, plan: StatePlan) -> GroupMean | None:
    """Return the second moment if it is averaged from sums of squares that are found before the step."""
    found = means_of(plan) if RULES[rule].averages_squares else []
    return found[0][1] if found else None


def named_means(moment: GroupMean | None) -> list[tuple[str, Segment]]:
    """Return the plain means of a second moment by the names of their state tensors."""
    return [] if moment is None else [(moment.state_name(SECOND, mean), mean) for mean in moment.means]


def is_gathered(rule: str, plan: StatePlan, tile: Tile) -> bool:
    """Return whether the state of a weight cannot be cut with it, or its step needs more than sums over the pieces.

    So it is under projections, in SMMF's square view and MicroAdam's blocks, where 8-bit blocks lie in two pieces, and
    where the noise of stochastic rounding follows an order of the entries that the pieces do not have.
    """
    axes = tile.cut_axes
    if not axes:
        return False
    moment, rows = mean_of(rule, plan), 1 if plan.stacked else 0
    averaged = {name for name, _ in named_means(moment)}
    if not (RULES[rule].elementwise and (moment is None or RULES[rule].averages_squares)):
        if rule not in IN_PASSES or max(axes) > IN_PASSES[rule](rows, len(tile.whole)):
            return True
        if plan.arithmetic != torch.float32:  # in which alone their passes are written
            return True
        averaged = {name for name, each in plan.moments.items() if type(each) is GroupMean}
    if plan.projection is not FULL_SPACE or (plan.rounding.kind == "stochastic" and axes != (0,)):
        return True
    if (
        moment is not None
        and (split := moment.segments[0].axis) in axes
        and split > 0
        and moment.segments[0].outer > 1
    ):
        return True
    left_out = averaged | set(plan.statistics)  # which every process holds
    specs = {name: spec for name, spec in plan.specs(tile.whole).items() if spec.shape and name not in left_out}
    return not all(can_be_cut(spec, tile) for spec in specs.values())


# -- pieces -----------------------------------------------------------------------------------------------------------


def pieces_of(plan: StatePlan, tile: Tile, moment: GroupMean | None) -> Iterator[Piece]:
    """Yield the pieces of a shard that is not empty."""
    if moment is None:
        yield Piece((), first_place(tile, 0, 0), plan, {}, ())
        return
    axis = moment.segments[0].axis if tile.whole else 0
    if axis not in tile.cut_axes:
        sources = {name: Source(name) for name, _ in named_means(moment)}
        yield piece_of(plan, tile, moment, sources, axis, 0)
        return
    begin = tile.starts[axis]
    for first, last in ranges_of_repeats(begin, begin + tile.shape[axis], moment.length):
        segments, sources = segments_in(moment, first, last, begin)
        where = (*[slice(None)] * axis, slice(first - begin, last - begin))
        part = piece_of(plan, tile, replace(moment, segments=tuple(segments)), sources, axis, first - begin)
        yield part if last - first == tile.shape[axis] else replace(part, where=where)


def piece_of(
    plan: StatePlan, tile: Tile, moment: GroupMean, sources: Mapping[str, Source], axis: int, offset: int
) -> Piece:
    """Return a piece that begins `offset` entries along an axis after the start of its shard."""
    factored = []
    for segment in moment.segments:
        if segment.cross_axes and is_cut(segment, tile):
            row, col = (moment.state_name(SECOND, mean) for mean in segment.means)
            factored.append((row, col, segment))
    local_plan = replace(plan, moments={**plan.moments, SECOND: moment})
    return Piece((), first_place(tile, axis, offset), local_plan, sources, tuple(factored))


def is_cut(segment: Segment, tile: Tile) -> bool:
    """Return whether a factored matrix lies in several shards."""
    return bool(set(tile.cut_axes) & {*segment.axes, *segment.cross_axes})


def first_place(tile: Tile, axis: int, offset: int) -> int:
    """Return the place in the weight's order of an entry `offset` after the start of a shard along an axis."""
    place = 0
    for dim, size in enumerate(tile.whole):
        place = place * size + tile.starts[dim] + (offset if dim == axis else 0)
    return place


def ranges_of_repeats(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Divide a range of the split axis into whole repeats of `length` entries and the parts of repeats around them."""
    inside = min(-(-start // length) * length, stop)
    end = max(stop // length * length, inside)
    for first, last in ((start, inside), (inside, end), (end, stop)):
        if last > first:
            yield first, last


def segments_in(moment: GroupMean, first: int, last: int, begin: int) -> tuple[list[Segment], dict[str, Source]]:
    """Return the segments in a range of the split axis, counted from its start, and where their means are.

    Args:
        moment: the second moment of the whole weight.
        first, last: whole repeats of all segments, or a part of one.
        begin: where the shard begins, from which state that is cut with the weight is counted.
    """
    found: list[Segment] = []
    sources: dict[str, Source] = {}
    repeat, offset = divmod(first, moment.length)
    for segment in moment.segments:
        size, run = segment.stop - segment.start, segment.rows_per_block
        if offset == 0 and last - first >= moment.length:
            parts = [(segment.start, segment.stop, run, 0)]
            repeats, shift = (last - first) // moment.length, 0
        else:
            repeats, shift = 1, offset
            low, high = max(segment.start, offset), min(segment.stop, offset + last - first)
            parts = list(blocks_in(low - segment.start, high - segment.start, segment))
        for number, (low, high, rows, block) in enumerate(parts):
            name = segment.name if number == 0 else f"{segment.name}.{number}"
            part = replace(
                segment, name=name, outer=repeats, start=low - shift, stop=high - shift, rows_per_block=rows
            )
            found.append(part)
            blocks = repeats * ((high - low) // rows)
            for mean, local_mean in zip(segment.means, part.means, strict=True):
                at = repeat * (size // run) + block
                source = Source(moment.state_name(SECOND, mean))
                if segment.axis not in mean.axes:  # the mean has an entry per block of the split axis
                    at -= begin if is_whole(segment, moment) else 0
                    source = source._replace(axis=segment.axis, span=(at, at + blocks))
                sources[moment.state_name(SECOND, local_mean)] = source
    return found, sources


def blocks_in(low: int, high: int, segment: Segment) -> Iterator[tuple[int, int, int, int]]:
    """Divide a range of a segment's entries into whole blocks and the parts of blocks around them.

    Yields:
        The start and stop of each part within a repeat, the entries of its blocks, and the number of the first one.
    """
    run = segment.rows_per_block
    if low >= high:
        return
    if run == 1:
        yield segment.start + low, segment.start + high, 1, low
        return
    for first, last in ranges_of_repeats(low, high, run):
        yield segment.start + first, segment.start + last, min(run, last - first), first // run


def is_whole(segment: Segment, moment: GroupMean) -> bool:
    """Return whether a segment has a mean for each entry of the split axis, so that they are cut with the weight."""
    return len(moment.segments) == 1 and segment.outer == 1 and segment.rows_per_block == 1


# The last axis that a weight may be cut along under a rule that takes its step in passes, by its axis of rows and its
# number of axes. H-Fac takes the mean over a matrix from its columns, which must be whole.
IN_PASSES = {"fadam": lambda rows, ndim: ndim, "h_fac": lambda rows, ndim: rows}
