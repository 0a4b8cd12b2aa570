"""The candidates that a second moment may be folded to, and the choice between them by signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.moments import Segment
from hf_lowmem.options import POSITIVE, Options, at_least, run
from hf_lowmem.roles import ParamRole
from hf_lowmem.snr.choice import FULL, HEAD, ROW_COL, best, mean_of_terms, term
from hf_lowmem.snr.measure import candidates, ratios_of, unreduced

AUTO = "auto"  # the value of `rules` with which a run finds its own


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """When and by which signal-to-noise ratio `rules=auto` folds second moments."""

    calibration_steps: int = run(
        100,
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
        """Return the layout options of a weight that is not fused."""
        return {"axes": self.axes, "rows_per_block": self.rows_per_block, "cross_axes": self.cross_axes}


class Part(NamedTuple):
    """A weight, or one part of a fused weight, with its candidates.

    Args:
        role: the role of the weight or of the part.
        place: the name, axis, outer, start and stop of its `Segment`. For a weight that is not fused, the name is ""
            and stop is None, because the weight may grow.
        candidates: what its second moment may be reduced to.
    """

    role: str
    place: tuple[str, int, int, int, int | None]
    candidates: tuple[Candidate, ...]

    def segment(self, candidate: Candidate, shape: tuple[int, ...]) -> Segment:
        """Return the means that a candidate keeps of this part of a weight of `shape`."""
        name, axis, outer, start, stop = self.place
        return Segment(name, axis, outer, start, shape[axis] if stop is None else stop, *candidate.means)

    def smallest(self, shape: tuple[int, ...]) -> Candidate:
        """Return the candidate that keeps the fewest numbers of a weight of `shape`."""
        sizes = [sum(mean.spec(shape).nbytes for mean in self.segment(c, shape).means) for c in self.candidates]
        return self.candidates[sizes.index(min(sizes))]


Parts = tuple[Part, ...]


def candidates_option(role: ParamRole) -> tuple[tuple, ...]:
    """Return the value of the option `candidates` for a weight: plain tuples, which `parts_of` reads."""
    named = candidates(role)
    if not named:
        return ()
    roles = [part.role for part in role.parts] or [role.role]
    found = []
    for name, segment in zip(roles, unreduced(role), strict=True):
        each = [(key, s.axes, s.rows_per_block, s.cross_axes) for key, s in named[segment.name].items()]
        place = (segment.name, segment.axis, segment.outer, segment.start, segment.stop if segment.name else None)
        found.append((name, place, tuple(each)))
    return tuple(found)


def parts_of(option: Sequence[Sequence[Any]]) -> Parts:
    """Return the parts that the option `candidates` describes."""
    return tuple(Part(role, place, tuple(Candidate(*each) for each in found)) for role, place, found in option)


def measured(v: Tensor, parts: Parts) -> Tensor:
    """Return what is summed (`term`) of the ratio of each candidate of each part: float64, on v's device."""
    shape, terms = tuple(v.shape), []
    for part in parts:
        ratios = ratios_of(v, (part.segment(each, shape) for each in part.candidates))
        terms += [term(each.name, ratio.snr) for each, ratio in zip(part.candidates, ratios, strict=True)]
    return torch.stack(terms)


def chosen(parts: Parts, sums: Tensor, counts: Tensor, cutoff: float) -> list[Candidate | None]:
    """Return what each part is folded to, by the sums of finite terms and their number; None keeps every entry."""
    measured = iter(zip(sums.tolist(), counts.tolist(), strict=True))
    ratios = [{each: mean_of_terms(each.name, *next(measured)) for each in part.candidates} for part in parts]
    return [best(each, cutoff) for each in ratios]


def folded_options(parts: Parts, kept: Sequence[Candidate | None]) -> dict[str, Any]:
    """Return the layout options of a weight whose parts keep these candidates, as a rule for it would give them."""
    if not any(kept):
        return {}
    if not parts[0].place[0]:
        assert kept[0] is not None
        return kept[0].options
    segments = []
    for part, candidate in zip(parts, kept, strict=True):
        axes, rows_per_block, cross_axes = candidate.means if candidate else ((), 1, ())
        segments.append((*part.place, axes, rows_per_block, *([cross_axes] if cross_axes else [])))
    return {"segments": tuple(segments)}


def rule_of(options: Mapping[str, Any]) -> Any:
    """Return what a rules file says of a weight with these layout options: a rule, or one for each part by name."""
    if segments := options.get("segments"):
        return {name: _rule(*means) for name, _, _, _, _, *means in segments}
    return _rule(options.get("axes", ()), options.get("rows_per_block", 1), options.get("cross_axes", ()))


def _rule(axes: tuple[int, ...], rows_per_block: int = 1, cross_axes: tuple[int, ...] = ()) -> Any:
    if cross_axes:
        return ROW_COL
    return HEAD if rows_per_block > 1 else list(axes) or FULL
