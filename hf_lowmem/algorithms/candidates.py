"""What a second moment may be folded to once its signal-to-noise ratio is known, and how the choice is made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.moments import Segment, whole
from hf_lowmem.options import POSITIVE, Options, at_least, run
from hf_lowmem.roles import ParamRole
from hf_lowmem.snr.measure import SecondMoment, candidates, snr_of

AUTO = "auto"  # the value of `rules` with which a run finds its own
FULL, HEAD, ROW_COL = "full", "head", "row_col"  # rules beside lists of axes
MEASUREMENTS = 20  # of a calibration, beside the one after the first step


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """When and by which signal-to-noise ratio `rules=auto` folds second moments."""

    calibration_steps: int = run(
        300,
        "with `rules=auto`, the number of a weight's own steps in which it keeps its full second moment and the "
        "signal-to-noise ratio of that is measured; then it is averaged where the ratio allows it.",
        at_least(1),
    )
    snr_cutoff: float = run(
        1.0,
        "with `rules=auto`, the signal-to-noise ratio that a second moment must exceed to be averaged.",
        POSITIVE,
    )


class Candidate(NamedTuple):
    """One way to reduce a second moment: its name, and what `Segment` says of the means."""

    name: str
    axes: tuple[int, ...]
    rows_per_block: int
    cross_axes: tuple[int, ...]

    @property
    def means(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        """Return `axes`, `rows_per_block` and `cross_axes`, in the order in which `Segment` and `whole` take them."""
        return self.axes, self.rows_per_block, self.cross_axes

    @property
    def options(self) -> dict[str, Any]:
        """Return the layout options of a weight that is no fused one."""
        return {"axes": self.axes, "rows_per_block": self.rows_per_block, "cross_axes": self.cross_axes}


class Part(NamedTuple):
    """A weight, or one part of a fused weight, with its candidates.

    Args:
        role: the role of the weight or of the part.
        place: the name, axis, outer, start and stop of a part's `Segment`; empty for a weight that is not fused.
        candidates: what its second moment may be reduced to.
    """

    role: str
    place: tuple[str, int, int, int, int] | tuple[()]
    candidates: tuple[Candidate, ...]

    def segment(self, candidate: Candidate, shape: tuple[int, ...]) -> Segment:
        """Return the means that a candidate keeps of this part of a weight of `shape`."""
        if self.place:
            return Segment(*self.place, *candidate.means)
        return whole(shape, *candidate.means).segments[0]

    def smallest(self, shape: tuple[int, ...]) -> Candidate:
        """Return the candidate that keeps the fewest numbers of a weight of `shape`."""
        sizes = [sum(mean.spec(shape).nbytes for mean in self.segment(c, shape).means) for c in self.candidates]
        return self.candidates[sizes.index(min(sizes))]

    def chosen(self, ratios: Sequence[float], cutoff: float) -> Candidate | None:
        """Return the candidate with the highest of the mean ratios, which are in the order of the candidates.

        None, which keeps every entry, is returned where no ratio exceeds the cut-off.
        """
        above = [pair for pair in zip(ratios, self.candidates, strict=True) if pair[0] > cutoff]  # NaN never is
        return max(above, key=lambda pair: pair[0])[1] if above else None


Parts = tuple[Part, ...]


def candidates_option(role: ParamRole) -> tuple[tuple, ...]:
    """Return the value of the option `candidates` for a weight: plain tuples, which `parts_of` reads."""
    roles = [part.role for part in role.parts] or [role.role]
    found = []
    for name, (part, named) in zip(roles, candidates(role).items(), strict=False):
        any_segment = next(iter(named.values()))
        place = (part, any_segment.axis, any_segment.outer, any_segment.start, any_segment.stop) if part else ()
        each = [(key, s.axes, s.rows_per_block, s.cross_axes) for key, s in named.items()]
        found.append((name, place, tuple(each)))
    return tuple(found)


def parts_of(option: Sequence[Sequence[Any]]) -> Parts:
    """Return the parts that the option `candidates` describes."""
    return tuple(Part(role, place, tuple(Candidate(*each) for each in found)) for role, place, found in option)


def measured(v: Tensor, parts: Parts) -> Tensor:
    """Return the signal-to-noise ratio of each candidate of each part, one after the other: float64, on v's device."""
    return torch.stack([ratio for part in parts for ratio in _ratios(v, part)])


def _ratios(v: Tensor, part: Part) -> Iterator[Tensor]:
    """Yield the ratio of each candidate of one part, by one float64 copy of what most of them are measured on."""
    whole_part = SecondMoment(part.segment(part.candidates[0], tuple(v.shape)).view(v) if part.place else v)
    for each in part.candidates:
        segment = part.segment(each, tuple(v.shape))
        if each.rows_per_block > 1:
            yield snr_of(v, segment)
        elif part.place:
            yield whole_part.ratio(*(mean.mean_dims for mean in segment.means)).snr
        else:
            yield whole_part.ratio(each.axes, each.cross_axes).snr


def chosen(parts: Parts, sums: Tensor, counts: Tensor, cutoff: float) -> list[Candidate | None]:
    """Return what each part is folded to, by the sums of finite ratios and their number; None keeps every entry."""
    means = [total / count if count else math.nan for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]
    found = []
    for part in parts:
        own, means = means[: len(part.candidates)], means[len(part.candidates) :]
        found.append(part.chosen(own, cutoff))
    return found


def folded_options(parts: Parts, kept: Sequence[Candidate | None]) -> dict[str, Any]:
    """Return the layout options of a weight whose parts keep these candidates, as a rule for it would give them."""
    if not any(kept):
        return {}
    if not parts[0].place:
        assert kept[0] is not None
        return kept[0].options
    segments = []
    for part, candidate in zip(parts, kept, strict=True):
        axes, rows_per_block, cross_axes = candidate.means if candidate else ((), 1, ())
        segments.append((*part.place, axes, rows_per_block, *([cross_axes] if cross_axes else [])))
    return {"segments": tuple(segments)}


def rule_of(options: Mapping[str, Any]) -> Any:
    """Return what a rules file says of a weight with these layout options: a rule, or one for each part by name."""
    if options["segments"]:
        return {name: _rule(*means) for name, _, _, _, _, *means in options["segments"]}
    return _rule(options["axes"], options["rows_per_block"], options["cross_axes"])


def _rule(axes: tuple[int, ...], rows_per_block: int = 1, cross_axes: tuple[int, ...] = ()) -> Any:
    if cross_axes:
        return ROW_COL
    return HEAD if rows_per_block > 1 else list(axes) or FULL
