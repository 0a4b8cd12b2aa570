"""AdamW whose second moment is made of means: the base of SlimAdam, Adam-mini, Adalayer and factored AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hf_lowmem.algorithms.adamw import LowMemAdamW
from hf_lowmem.algorithms.candidates import AUTO, rule_of
from hf_lowmem.moments import Full, GroupMean, Segment, whole
from hf_lowmem.options import Legal, Options, at_least, decided_by_role, flag, recipe_only
from hf_lowmem.param_groups import EMBEDDINGS, Recipe, RoleOptions, check_axes
from hf_lowmem.roles import ParamRole
from hf_lowmem.rules import read_axes
from hf_lowmem.snr.choice import HEAD, ROW_COL
from hf_lowmem.snr.measure import BY_HEAD
from hf_lowmem.state import Moment, StatePlan

PAPER = "paper"  # the value of `rules` that keeps to the paper's table
LOSE_BY_MEANS = frozenset(
    ("mlp_up", "mlp_gate", "mlp_gate_up", "mlp_down", "lm_head", *EMBEDDINGS)
)  # roles: docs/quality.md

WHAT_IT_LIMITS = (
    "the largest update of an entry, as a multiple of the learning rate, in weights whose second moment is averaged "
    "or factored, all of it or some of its parts; `inf` limits nothing"
)
# The kernels divide by it in float32.
LIMITS = Legal(
    'a number of at least 1e-6, or "auto"',
    lambda value: value == AUTO or (isinstance(value, float | int) and value >= 1e-6),
)


@dataclass(frozen=True)
class LimitedOptions(Options):
    """The option that limits updates of weights whose second moment is made of means."""

    update_limit: float | Literal["auto"] = flag(math.inf, f"{WHAT_IT_LIMITS}.", LIMITS)


@dataclass(frozen=True)
class GroupedOptions(LimitedOptions):
    """Options that say which entries of a weight share one number of the second moment."""

    axes: tuple[int, ...] = decided_by_role(
        (), "axes of the weight that the second moment is averaged over; without any, it keeps every entry."
    )
    cross_axes: tuple[int, ...] = decided_by_role(
        (),
        "axes of a second mean beside the one over `axes`; the product of both, divided by the mean of all entries, "
        "is then the second moment.",
    )
    rows_per_block: int = decided_by_role(
        1, "number of consecutive entries of the last axis that is kept which share one number too.", at_least(1)
    )
    segments: tuple[tuple, ...] = decided_by_role(
        (),
        "for fused weights, the tuple (name, axis, outer, start, stop, axes, rows_per_block) of each part instead, "
        "with `cross_axes` at its end if it has any: `axis`, of size n, is viewed as (outer, n // outer), and the "
        "part is `[:, start:stop]` of it.",
    )


def largest_update(beta1: float, beta2: float) -> float:
    """Return how far AdamW's largest update can move an entry, as a multiple of the learning rate.

    By Cauchy and Schwarz, |m| / sqrt(v) is at most (1 - b1) sqrt(sum of (b1^2 / b2)^t / (1 - b2)): 1.2 for betas of
    0.9 and 0.95, and 7.3 for 0.9 and 0.999. It has no bound where b1^2 is b2 or more.
    """
    if beta1 == 0:
        return 1 / math.sqrt(1 - beta2)
    ratio = beta1**2 / beta2 if beta2 else math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio)) if ratio < 1 else math.inf


class GroupedAdamW(LowMemAdamW):
    """AdamW whose second moment is made of means of g^2: SlimAdam, Adam-mini, Adalayer and factored AdamW.

    Without `roles` the groups say what is averaged, by the options of `GroupedOptions`, which by default average
    nothing.
    """

    takes_flat_pieces = False

    options_cls = GroupedOptions

    @classmethod
    def second_moment(cls, shape: tuple[int, ...], options: Mapping[str, Any]) -> Moment:
        if options["segments"]:
            moment = GroupMean(tuple(Segment(*segment) for segment in options["segments"]))
            moment.check(shape)
            return moment
        if options["cross_axes"] and not options["axes"]:
            raise ValueError(f"cross_axes={options['cross_axes']} needs axes, those of the other mean: give both.")
        if options["axes"]:
            return whole(shape, options["axes"], options["rows_per_block"], options["cross_axes"])
        return Full(signed=False)

    @classmethod
    def rule_of(cls, plan: StatePlan, group: Mapping[str, Any]) -> str:
        cls.options_cls.check_values({"update_limit": group["update_limit"]})
        averaged = isinstance(plan.moments["exp_avg_sq"], GroupMean)
        return "limited_adamw" if averaged and group["update_limit"] != math.inf else cls.rule

    @classmethod
    def flags_of(cls, rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
        flags = super().flags_of(rule, group)
        if flags.get("update_limit") == AUTO:
            flags["update_limit"] = largest_update(*map(float, group["betas"]))
        return flags


@dataclass(frozen=True)
class RulesRecipe(Recipe):
    """A recipe that has a table of means by role, some of which it factors, and that a rules file overrides."""

    update_limit: float | Literal["auto"] = flag(
        AUTO,
        f'{WHAT_IT_LIMITS}. "auto" is the largest that AdamW itself can take, 7.3 for betas of 0.9 and 0.999, and inf '
        "where the algorithm is the paper's, as with `rules=paper`.",
        LIMITS,
    )
    rules: str | None = recipe_only(
        None,
        "path of a JSON file that goes before what the optimizer does by role: "
        '`{"exact": {name: rule}, "regex": [[pattern, rule]], "role": {role: rule}, "unknown": rule}`, or a flat '
        "`{name: rule}` as SlimAdam's authors and `hf-lowmem snr` write it. A rule is a list of axes to average over, "
        '"row_col" (a factored second moment), "head" (a number per head of queries or keys), "full", or for a fused '
        "weight `{part: rule}`. A rule by role reaches the parts of fused weights, too. Under `factored_adamw` and "
        '`slim_adamw`, "auto" finds the rules in the run itself. Under `slim_adamw`, `adam_mini` and `adalayer`, '
        '"paper" keeps to the algorithm of the paper, of whose means some are factored by default.',
    )

    splits_parts: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False  # whether `rules=auto` is legal
    factored_roles: ClassVar[frozenset[str]] = frozenset()  # those whose means, which the paper takes, cost quality

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rules == PAPER and not self.factored_roles:
            raise ValueError(
                f"rules={PAPER} is for slim_adamw, adam_mini and adalayer: {self.algorithm} departs from no paper's "
                "table, so leave it out."
            )
        if self.rules == AUTO and not self.calibrates:
            raise ValueError(
                f"rules={AUTO} is for factored_adamw and slim_adamw alone: give {self.algorithm} the path of a rules "
                "file."
            )

    @property
    def rules_file(self) -> str | None:
        return None if self.rules == PAPER else self.rules

    @property
    def is_papers(self) -> bool:
        """Whether the algorithm is that of its paper, without a limit and with all of its means."""
        return self.rules == PAPER

    def shared_options(self) -> dict[str, Any]:
        limit = math.inf if self.is_papers and self.update_limit == AUTO else self.update_limit
        return {**super().shared_options(), "update_limit": limit}

    def options_of(self, role: ParamRole) -> RoleOptions:
        options, why = self.options_by_role(role)
        if self.is_papers or not options or role.role not in self.factored_roles:
            return options, why
        return factored(role), "factored, as a mean costs quality"

    def options_by_role(self, role: ParamRole) -> RoleOptions:
        """Return what `options_of` returns for the table of the paper."""
        raise NotImplementedError

    def read_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {part: self._read_rule(rule) for part, rule in value.items()}
        return self._read_rule(value)

    @staticmethod
    def _read_rule(value: Any) -> Any:
        if value in (HEAD, ROW_COL):
            return value
        return read_axes(value, also=f'"{ROW_COL}", "{HEAD}", an object of such rules by part')

    def options_from_file(self, role: ParamRole, value: Any) -> dict[str, Any]:
        if value == ROW_COL:
            return factored(role)
        if value == HEAD:
            return by_head(role, role.role)
        return by_part(role, value) if isinstance(value, dict) else super().options_from_file(role, value)

    def options_of_parts(self, role: ParamRole, values: dict[str, Any]) -> dict[str, Any]:
        if nested := [part for part, value in values.items() if isinstance(value, dict)]:
            raise ValueError(
                f"{nested[0]!r} of {role.name} is one part, which takes one rule, not an object of rules."
            )
        own = rule_of(self.options_of(role)[0])
        rules = own if isinstance(own, dict) else dict.fromkeys((part.name for part in role.parts), own)
        return self.options_from_file(role, {**self.read_value(rules), **values})


def factored(role: ParamRole) -> dict[str, Any]:
    """Return the options of a weight with a factored second moment: each expert and each fused part by itself.

    Raises:
        ValueError: the weight is no matrix.
    """
    if role.parts:
        part = {"axes": role.fan_in, "cross_axes": (role.fan_out,)}
        return segments_of(role, [part] * len(role.parts))
    if role.fan_out is not None and role.fan_in:
        return {"axes": role.fan_in, "cross_axes": (role.fan_out,)}
    if len(role.shape) == 2 and role.expert_axis is None:  # which of its axes is which makes no difference
        return {"axes": (1,), "cross_axes": (0,)}
    raise ValueError(f'"{ROW_COL}" does not fit {role.name} of shape {role.shape}, which is not known to be a matrix.')


def by_head(role: ParamRole, name: str) -> dict[str, Any]:
    """Return the options of queries or keys with a number per head; `name` is the role of the weight or the part.

    Raises:
        ValueError: the weight is neither, or its heads are not known.
    """
    if name not in BY_HEAD or role.head_dim is None:
        raise ValueError(f'"{HEAD}" does not fit {role.name}, which is not known to have heads of queries or keys.')
    return {"axes": role.fan_in, "rows_per_block": role.head_dim}


def by_part(role: ParamRole, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a fused weight by the rules of its parts; a part without one keeps every entry.

    Raises:
        ValueError: the weight has no such part, or a rule does not fit its part.
    """
    names = [part.name for part in role.parts]
    if unknown := rules.keys() - set(names):
        which = f"whose parts are {', '.join(names)}" if names else "which is not known to be fused"
        raise ValueError(f"{min(unknown)!r} is no part of {role.name}, {which}.")
    options = []
    for part in role.parts:
        rule = rules.get(part.name, ())
        if rule == HEAD:
            options.append(by_head(role, part.role))
        elif rule == ROW_COL:
            options.append({"axes": role.fan_in, "cross_axes": (role.fan_out,)})
        else:
            check_axes(role, rule)
            options.append({"axes": tuple(sorted({axis % len(role.shape) for axis in rule}))})
    return segments_of(role, options) if any(each["axes"] for each in options) else {}


def segments_of(role: ParamRole, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the options of a fused weight, made of the options of its parts in the order of `role.parts`."""
    return {
        "segments": tuple(
            (
                part.name,
                role.fan_out,
                part.outer,
                part.start,
                part.stop,
                options.get("axes", ()),
                options.get("rows_per_block", 1),
                *([options["cross_axes"]] if "cross_axes" in options else []),
            )
            for part, options in zip(role.parts, parts, strict=True)
        )
    }
