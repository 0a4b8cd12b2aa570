"""AdamW that finds in its first steps which second moments may be averaged, and folds them in place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import get_annotations
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowmem.algorithms.candidates import (
    AUTO,
    CalibrationOptions,
    Candidate,
    Parts,
    candidates_option,
    chosen,
    folded_options,
    measured,
    parts_of,
    rule_of,
)
from hf_lowmem.algorithms.grouped import GroupedAdamW, GroupedOptions, RulesRecipe
from hf_lowmem.kernels.means import tile_size, tiles
from hf_lowmem.log import announce, get_logger, is_first_process
from hf_lowmem.moments import Full, GroupMean
from hf_lowmem.options import decided_by_role
from hf_lowmem.param_groups import Assignment, RoleOptions
from hf_lowmem.param_layouts import GroupLayouts, ParamLayout, as_tuple
from hf_lowmem.planned_optimizer import Group
from hf_lowmem.roles import ParamRole
from hf_lowmem.sharding import local
from hf_lowmem.shards import whole_moment
from hf_lowmem.sizes import readable
from hf_lowmem.snr.choice import FULL, interval
from hf_lowmem.state import State, StatePlan, TensorSpec

logger = get_logger(__name__)

SNR_SUM, SNR_COUNT = "snr_sum", "snr_count"  # the sum of each candidate's terms (`snr.choice.term`), and their number
SECOND, CANDIDATES, CALIBRATED = "exp_avg_sq", "candidates", "calibrated"


@dataclass(frozen=True)
class CalibratedOptions(CalibrationOptions, GroupedOptions):
    """Options of a weight whose second moment may be folded during the run."""

    candidates: tuple[tuple, ...] = decided_by_role(
        (),
        "(role, place, candidates) of a weight, or of each part of a fused one, that calibrates: `place` is the name, "
        "axis, outer, start and stop of the part, and a candidate the tuple (name, axes, rows_per_block, cross_axes).",
    )
    calibrated: bool = decided_by_role(False, "whether a calibration has chosen what the second moment is folded to.")


class CalibratedAdamW(GroupedAdamW):
    """AdamW whose second moments may begin in full and be folded to means after `calibration_steps`.

    Where a weight has `candidates`, it keeps its full second moment v at first, stored in `state_bits`. After its
    first step, after every `calibration_steps // 20` steps, and after the last, the signal-to-noise ratio of each
    candidate is measured on v, which is not corrected for its bias. Then the candidate with the highest mean ratio is
    chosen, if that exceeds `snr_cutoff`; otherwise v stays full. The mean of the factored estimate is harmonic. The
    means of v over the chosen axes take its place, and its memory is given back.

    Source: the choice is SlimAdam's (arXiv:2503.01843; authors' code dayal-kalra/low-memory-adam@bb3652c).
    It departs from it: the authors take the ratios from a separate run, measure before the step, and know no factored
    estimate and no means by head.

    The state of a weight that calibrates is `exp_avg`, `exp_avg_sq`, `snr_sum` and `snr_count`, the latter two with
    one float64 number per candidate. A weight counts by its own `step`, so that one that seldom has a gradient
    calibrates for longer than others.
    """

    options_cls = CalibratedOptions
    full_options: ClassVar[dict[str, Any]] = {}  # the layout options of a weight that keeps its full second moment

    def _forget_caches(self) -> None:
        super()._forget_caches()
        self._calibrates = True  # until a step finds no weight that does

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        plan = super().make_plan(shape, **options)
        parts = parts_of(options[CANDIDATES])
        if not parts:
            return plan
        number = sum(len(part.candidates) for part in parts)
        ratios = TensorSpec((number,), (None,), torch.float64)
        moments = {**plan.moments, SECOND: Full(signed=False)}
        return replace(plan, moments=moments, statistics={SNR_SUM: ratios, SNR_COUNT: ratios})

    def _layouts_of(self, group: Group) -> GroupLayouts:
        self._calibrates = True
        layouts = super()._layouts_of(group)
        if group["capturable"] and any(layout.option(CANDIDATES) for layout in layouts.layouts):
            raise ValueError(
                "capturable=true does not go with rules=auto, which replaces state tensors that a captured graph "
                "writes to: leave one of them out."
            )
        return layouts

    # -- measuring and folding --------------------------------------------------------------------------------------

    def after_step(self, stepped: Sequence[Tensor]) -> None:
        """Measure the second moments that are due, and fold those whose calibration is over."""
        if not self._calibrates:
            return
        self._calibrates, moved, report = False, set(map(id, stepped)), FoldReport()
        folded: dict[Tensor, ParamLayout] = {}  # a group may name a parameter several times
        for group, layouts, place, param in self._calibrating():
            if param in folded:
                layouts.layouts[place] = folded[param]
                continue
            step, last = int(self.state[param]["step"]) if id(param) in moved else 0, group["calibration_steps"]
            due = step == 1 or step >= last or step % interval(last) == 0
            if step and due and not param.is_meta:
                layout, before = layouts.layouts[place], self.state[param]
                parts = self._measure(group, layout, param)
                if step >= last:
                    kept = self._kept(group, layout, param, parts)
                    layouts.layouts[place] = folded[param] = self._folded(layout, parts, kept)
                    self._fold(group, layout, folded[param], param)
                    report.add(parts, kept, nbytes_of(before) - nbytes_of(self.state[param]))
                    continue
            self._calibrates = True
        report.log()

    @property
    def calibrates(self) -> bool:
        """Return whether the second moment of some parameter is still to be folded."""
        return any(True for _ in self._calibrating())

    def _calibrating(self) -> Iterator[tuple[Group, GroupLayouts, int, Tensor]]:
        """Yield the places of the parameters whose second moment is still to be folded."""
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for place, param in enumerate(group["params"]):
                if layouts.layouts[place].option(CANDIDATES):
                    yield group, layouts, place, param

    def _measure(self, group: Group, layout: ParamLayout, param: Tensor) -> Parts:
        """Add the terms of a parameter's ratios to their sums; one that is not finite does not count."""
        parts, state = parts_of(layout.option(CANDIDATES)), self.state[param]
        terms = measured(whole_moment(self.plan_by(layout, group, param), SECOND, state, tuple(param.shape)), parts)
        finite = terms.isfinite()
        local(state[SNR_SUM]).add_(terms.where(finite, 0.0))
        local(state[SNR_COUNT]).add_(finite)
        return parts

    def _kept(self, group: Group, layout: ParamLayout, param: Tensor, parts: Parts) -> list[Candidate | None]:
        """Return what each part of a parameter is folded to.

        A fused weight of which too few parts are averaged keeps all of it, as the others would be float32.
        """
        state, shape = self.state[param], tuple(param.shape)
        kept = chosen(parts, local(state[SNR_SUM]), local(state[SNR_COUNT]), group["snr_cutoff"])
        full: list[Candidate | None] = [None] * len(parts)
        sizes = [self.plan_by(self._folded(layout, parts, each), group, param).nbytes(shape) for each in (kept, full)]
        return kept if sizes[0] < sizes[1] else full

    def _folded(self, layout: ParamLayout, parts: Parts, kept: Sequence[Candidate | None]) -> ParamLayout:
        """Return the layout of a parameter whose parts keep these candidates."""
        folded = folded_options(parts, kept) or self.full_options
        return layout.with_options({CANDIDATES: (), CALIBRATED: True, **folded})

    def _fold(self, group: Group, before: ParamLayout, after: ParamLayout, param: Tensor) -> None:
        """Lay the state of a parameter out anew."""
        old, new, shape = self.plan_by(before, group, param), self.plan_by(after, group, param), tuple(param.shape)
        state = {name: tensor for name, tensor in self.state[param].items() if name not in old.statistics}
        moment = new.moments[SECOND]
        if isinstance(moment, GroupMean):
            v, specs = whole_moment(old, SECOND, state, shape), self.specs_of(param, new, group)
            place = self.state_place(param, new, group)
            for name in old.moments[SECOND].specs(SECOND, shape, old.codec):
                del state[name]
            means = folded_means(v, moment, {name: specs[name] for name in moment.state_names(SECOND)})
            state |= {
                name: place.placed(place.part_of(mean, specs[name]), specs[name]) for name, mean in means.items()
            }
        self.replace_state(param, state)

    def chosen_rules(self) -> dict[str, Any]:
        """Return the rule of each parameter by name, as a rules file has them.

        A run with this file keeps what a calibration has chosen. A weight that still calibrates has the rule "full".

        >>> model = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4)
        >>> optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3, optim_args="rules=auto")
        >>> optimizer.chosen_rules()["linear1.weight"]
        'full'
        """
        layouts = [layout for group in self._layouts for layout in group.layouts if layout.name]
        return {layout.name: rule_of(dict(layout.options)) for layout in layouts}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def loaded_state(self, state_dict: Mapping[str, Any]) -> dict[Any, State]:
        """Load a checkpoint from before or after the fold into parameters that were added with candidates."""
        mine = [list(layouts.layouts) for layouts in self._layouts]
        ours = all(group.get("algorithm") == self.algorithm for group in state_dict["param_groups"])
        saved = state_dict.get("layouts") if ours else None  # another optimizer's checkpoint is refused below
        try:
            for layouts, entries in zip(self._layouts, saved or [], strict=False):
                for place, entry in zip(range(len(layouts.layouts)), entries, strict=False):
                    layouts.layouts[place] = self._as_saved(layouts.layouts[place], layouts.built[place], entry)
            loaded = super().loaded_state(state_dict)
        except Exception:
            for layouts, before in zip(self._layouts, mine, strict=True):
                layouts.layouts = before
            raise
        self._calibrates = True
        return loaded

    def _as_saved(self, layout: ParamLayout, built: ParamLayout, entry: Mapping[str, Any]) -> ParamLayout:
        """Return the layout of a parameter as a checkpoint has it, where the parameter was added with candidates.

        Raises:
            ValueError: the checkpoint's is still calibrating, but the parameter was added without candidates; or the
                other way round, and no calibration has ended.
        """
        calibrates, name = bool(entry.get(CANDIDATES)), entry.get("name") or "a parameter"
        if not built.option(CANDIDATES):
            if calibrates:
                raise ValueError(
                    f"The checkpoint was written while rules=auto calibrated {name!r}, whose second moment this "
                    "optimizer keeps by a rule: resume with rules=auto."
                )
            return layout.with_options({CALIBRATED: bool(entry.get(CALIBRATED))})
        if calibrates:
            return built
        if CALIBRATED in entry and not entry[CALIBRATED]:
            raise ValueError(
                f"The checkpoint was written without rules=auto, so the second moment of {name!r} was never measured "
                "in full: resume with the rules of its run."
            )
        by_role = self.options_cls.defaults("role")
        return built.with_options({CANDIDATES: (), **{name: as_tuple(entry[name]) for name in by_role & entry.keys()}})


@dataclass(frozen=True)
class CalibratedRecipe(RulesRecipe, CalibrationOptions):
    """A recipe of `CalibratedAdamW`, which by `rules=auto` leaves its choices to a calibration."""

    calibrates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        calibration = get_annotations(CalibrationOptions)
        for name, option in self.declared().items():
            if getattr(self, name) == option.default:
                continue
            given = f"{name}={str(getattr(self, name)).lower()}"
            if self.rules != AUTO and name in calibration:
                raise ValueError(f"{given} is an option of rules=auto: give that too, or leave it out.")
            if self.rules == AUTO and option.kind == "recipe" and name not in CalibratedRecipe.declared():
                raise ValueError(
                    f"{given} does not go with rules=auto, which measures what each weight keeps: leave one of them "
                    "out."
                )

    @property
    def rules_file(self) -> str | None:
        return None if self.rules == AUTO else super().rules_file

    def options_of(self, role: ParamRole) -> RoleOptions:
        if self.rules != AUTO:
            return super().options_of(role)
        if not (found := candidates_option(role)):
            return self.options_from_file(role, ()), "rules=auto: there are no axes to average over"
        names = list(dict.fromkeys(each[0] for _, _, candidates in found for each in candidates))
        why = f"rules=auto: measured for {self.calibration_steps} steps, then {', '.join(names)} or full"
        return {"candidates": found}, why

    def caution_for(self, assignments: Sequence[Assignment], numel: int, nbytes: int) -> str:
        calibrating = [each for each in assignments if each.param.requires_grad and each.options.get("candidates")]
        if not calibrating:
            return super().caution_for(assignments, numel, nbytes)
        saved = sum(self._most_saved(each) for each in calibrating)
        return (
            f"rules=auto keeps {nbytes / numel:.3f} bytes of state per parameter for the first "
            f"{self.calibration_steps} steps of each weight; afterwards it keeps at most as many, and "
            f"{(nbytes - saved) / numel:.3f} if every weight is averaged as far as it can be."
        )

    def _most_saved(self, assignment: Assignment) -> int:
        """Return the most bytes that a weight which calibrates may give back."""
        parts, shape = parts_of(assignment.options["candidates"]), assignment.role.shape
        options = {**assignment.options, **folded_options(parts, [part.smallest(shape) for part in parts])}
        folded = replace(assignment, options={**options, "candidates": ()})
        return self.state_plan(assignment).nbytes(shape) - self.state_plan(folded).nbytes(shape)


class FoldReport:
    """A count, by role, of what the second moments were folded to at one step, and of the bytes given back."""

    def __init__(self) -> None:
        self._kept: dict[str, Counter[str]] = defaultdict(Counter)
        self._nbytes: Counter[str] = Counter()
        self._averaged = 0

    def add(self, parts: Parts, kept: Sequence[Candidate | None], nbytes: int) -> None:
        """Count a weight whose parts keep these candidates and that has given back `nbytes`."""
        role = "/".join(part.role for part in parts)
        self._kept[role]["/".join(each.name if each else FULL for each in kept)] += 1
        self._nbytes[role] += nbytes
        self._averaged += any(kept)

    def log(self) -> None:
        """Log a line per role, and one of all; nothing where no calibration has ended."""
        if not self._kept or not is_first_process():
            return
        for role, kept in self._kept.items():
            choices = ", ".join(f"{name} ({number})" for name, number in kept.most_common())
            logger.info("rules=auto keeps for %s: %s; %s given back.", role, choices, readable(self._nbytes[role]))
        announce(
            "rules=auto averages the second moments of %d of %d weights from now on and has given back %s; "
            "optimizer.chosen_rules() returns what it has chosen.",
            self._averaged,
            sum(map(Counter.total, self._kept.values())),
            readable(sum(self._nbytes.values())),
        )


def folded_means(v: Tensor, moment: GroupMean, specs: Mapping[str, TensorSpec]) -> State:
    """Return the means of a second moment by name, as declared, summed in float64 a tile at a time."""
    found = {name: spec.zeros(v.device) for name, spec in specs.items()}
    totals = [mean.double() for mean in found.values()]
    for index in tiles(v.shape, tile_size(v.device), v.ndim):
        moment.add_squares(totals, v[index].double(), index)
    moment.average(list(found.values()), totals, v.numel(), 0.0)
    return found


def nbytes_of(state: State) -> int:
    """Return the bytes of a parameter's state."""
    return sum(tensor.nbytes for tensor in state.values())
