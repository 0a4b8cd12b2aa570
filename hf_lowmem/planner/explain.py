"""A table of what an optimizer does with every parameter of a model. Nothing is allocated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hf_lowmem.codecs import BFloat16, Int8Blockwise
from hf_lowmem.moments import Full
from hf_lowmem.param_groups import EMBEDDINGS, Assignment, Recipe, RolePlan, Roles
from hf_lowmem.planner.tables import change, table, wrapped
from hf_lowmem.sharding import first_rows
from hf_lowmem.shards import is_gathered
from hf_lowmem.sizes import readable
from hf_lowmem.state import STEP, StatePlan
from hf_lowmem.state_place import held_bytes


@dataclass(frozen=True)
class Row:
    """One parameter of the table.

    Args:
        name: the canonical name of the parameter.
        shape: its shape.
        role: its role.
        trainable: whether it is trained.
        compressed: what is smaller than in AdamW's state, in words.
        state: the (shape, dtype) of each state tensor by name.
        nbytes: the bytes of all state tensors, `step` included, or of what one process holds of them.
        why: the evidence or the option that decided this.
        rounded: whether the weight is rounded stochastically or by Kahan's method.
        dtype: the dtype of the weight.
        held: how many of its entries a process holds.
        step_nbytes: what its step takes beside, in bytes, where a process steps it whole.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    trainable: bool
    compressed: str
    state: dict[str, tuple[tuple[int, ...], str]]
    nbytes: int
    why: str
    rounded: bool
    dtype: str
    held: int
    step_nbytes: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weight that a process holds."""
        return self.held * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class Explanation:
    """The rows of all parameters. It prints as a table.

    Args:
        algorithm: the name of the algorithm.
        state_bits: None for torch's AdamW, whose moments have the dtype of the weights.
        rows: one for each parameter.
        caution: a sentence for the user, or "".
        ranks: the number of processes among which FSDP2 divides the rows of each weight. All bytes are those of the
            first process, which holds the most.
    """

    algorithm: str
    state_bits: int | None
    rows: tuple[Row, ...]
    caution: str = ""
    ranks: int = 1

    @cached_property
    def numel(self) -> int:
        """Return the number of trainable entries."""
        return sum(row.numel for row in self.rows if row.trainable)

    @cached_property
    def nbytes(self) -> int:
        """Return the bytes of optimizer state."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_param(self) -> float:
        return self.nbytes / max(self.numel, 1)

    @cached_property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights, including frozen ones."""
        return sum(row.weight_bytes for row in self.rows)

    @cached_property
    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients, which have the dtype of their weights."""
        return sum(row.weight_bytes for row in self.rows if row.trainable)

    @cached_property
    def adamw_nbytes(self) -> int:
        """Return the bytes of the state of torch's AdamW: two moments in the dtype of each weight, and `step`."""
        return sum(2 * row.weight_bytes + STEP.nbytes for row in self.rows if row.trainable)

    @property
    def total_bytes(self) -> int:
        """Return the bytes of weights, gradients and state."""
        return self.weight_bytes + self.gradient_bytes + self.nbytes

    @property
    def adamw_total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.adamw_nbytes

    @cached_property
    def step_nbytes(self) -> int:
        """Return the bytes that a step takes beside where processes take turns to step whole weights."""
        return max((row.step_nbytes for row in self.rows), default=0)

    @property
    def dtypes(self) -> str:
        """Return the dtypes of the trained weights in words."""
        return " and ".join(sorted({row.dtype for row in self.rows if row.trainable})) or "no dtype"

    def to_dict(self) -> dict[str, Any]:
        """Return the totals and the rows as plain values, ready for JSON."""
        return {**self.totals(), "rows": [asdict(row) for row in self.rows]}

    def totals(self) -> dict[str, Any]:
        """Return the totals as plain values, ready for JSON."""
        return {
            "algorithm": self.algorithm,
            "ranks": self.ranks,
            "state_bits": self.state_bits,
            "parameters": self.numel,
            "bytes": self.nbytes,
            "bytes_per_param": self.bytes_per_param,
            "weight_bytes": self.weight_bytes,
            "gradient_bytes": self.gradient_bytes,
            "adamw_bytes": self.adamw_nbytes,
            "step_bytes": self.step_nbytes,
        }

    def __str__(self) -> str:
        """Return the table with a line per parameter."""
        lines = [
            (r.name, "x".join(map(str, r.shape)), r.role, f"{r.nbytes:,}", readable(r.nbytes), _description(r))
            for r in self.rows
        ]
        head = ("parameter", "shape", "role", "bytes", "", "what is kept (why)")
        return "\n".join([*table(head, lines, left=(0, 1, 2, 5)), "", self._total()])

    def by_role(self) -> str:
        """Return what each role keeps and why, with counts of parameters and bytes, in at most 100 columns."""
        groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.role, _description(row)].append(row)
        lines = []
        for (role, _), rows in groups.items():
            numel, nbytes = sum(row.numel for row in rows), sum(row.nbytes for row in rows)
            each = f"{nbytes / max(numel, 1):.3f}"
            lines.append((role, str(len(rows)), f"{numel:,}", f"{nbytes:,}", readable(nbytes), each))
        head, *shown = table(("role", "tensors", "parameters", "bytes", "", "bytes/param"), lines)
        for at, (_, description) in enumerate(groups):
            shown[at] += "\n" + wrapped(description, indent=4)
        return "\n".join([head, *shown, "", self._total()])

    def _total(self) -> str:
        sums = (
            ("weights", self.weight_bytes, self.weight_bytes),
            ("gradients", self.gradient_bytes, self.gradient_bytes),
            ("optimizer state", self.nbytes, self.adamw_nbytes),
            ("all", self.total_bytes, self.adamw_total_bytes),
        )
        lines = [
            (what, f"{ours:,}", readable(ours), readable(adamw), change(ours, adamw) if ours != adamw else "")
            for what, ours, adamw in sums
        ]
        bits = "" if self.state_bits is None else f", state_bits={self.state_bits}"
        if self.step_nbytes:
            lines.append(("extra during a step", f"{self.step_nbytes:,}", readable(self.step_nbytes), "", ""))
        return "\n".join(
            [
                f"{self.algorithm}{bits}: {self.nbytes:,} bytes of state for {self.numel:,} trainable parameters",
                f"({self.bytes_per_param:.3f} bytes each; AdamW in {self.dtypes}: "
                f"{self.adamw_nbytes / max(self.numel, 1):.3f})",
                *([f"on each of {self.ranks} processes, among which FSDP2 divides the weights"] * (self.ranks > 1)),
                "",
                *table(("", "bytes", "", "with AdamW", ""), lines),
                *([wrapped(self.caution)] if self.caution else []),
            ]
        )


def explain_plan(plan: RolePlan, recipe: Recipe, ranks: int = 1) -> Explanation:
    """Return the table of a plan that `plan_roles(model, recipe)` has made, for one of some processes."""
    found: dict[tuple, dict[str, Any]] = {}  # most parameters are like one of an earlier layer
    rows = []
    for assignment in plan:
        role, param = assignment.role, assignment.param
        held = math.prod(first_rows(role.shape, ranks).shape)
        if not param.requires_grad:
            rows.append(Row(role.name, role.shape, role.role, False, "-", {}, 0, "frozen", False, _dtype(param), held))
            continue
        key = (role.shape, param.dtype, role.role in EMBEDDINGS, *sorted(assignment.options.items()))
        if key not in found:
            found[key] = _kept(assignment, recipe, ranks)
        kept: dict[str, Any] = {**found[key], "state": dict(found[key]["state"])}
        rows.append(
            Row(role.name, role.shape, role.role, True, **kept, why=assignment.why, dtype=_dtype(param), held=held)
        )
    found_rows = Explanation(recipe.algorithm, recipe.state_bits, tuple(rows), ranks=ranks)
    caution = recipe.caution_for(plan, found_rows.numel, found_rows.nbytes) if ranks == 1 else ""
    return replace(found_rows, caution=caution)


def explain_adamw(name: str, roles: Roles, ranks: int = 1) -> Explanation:
    """Return the table for torch's AdamW, whose two moments have the shape and the dtype of the weight.

    Args:
        name: the optim name.
        roles: the roles that `assign_roles(model)` has returned.
        ranks: the number of processes among which the rows of each weight are divided.
    """
    rows = []
    for param, role in roles:
        shape, dtype, trained = role.shape, _dtype(param), param.requires_grad
        held = math.prod(first_rows(shape, ranks).shape)
        state = {"step": ((), "float32"), "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)} if trained else {}
        nbytes = 2 * held * param.dtype.itemsize + STEP.nbytes if trained else 0
        what, why = ("full", "torch's AdamW keeps every entry in the weight's dtype") if trained else ("-", "frozen")
        rows.append(Row(role.name, shape, role.role, trained, what, state, nbytes, why, False, dtype, held))
    return Explanation(name, None, tuple(rows), ranks=ranks)


def _kept(assignment: Assignment, recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Return what a row says of a parameter's state: what is compressed in words, the state tensors, and bytes."""
    shape, plan = assignment.role.shape, recipe.state_plan(assignment)
    specs, tile = plan.specs(shape), first_rows(shape, ranks)
    optimizer, options = recipe.optimizer_cls, recipe.shared_options()
    gathered = ranks > 1 and is_gathered(optimizer.rule_of(plan, options), plan, tile)
    weight = assignment.param.dtype.itemsize * math.prod(shape)
    return {
        "compressed": _compressed(plan, assignment, recipe),
        "state": {name: (spec.shape, str(spec.dtype).removeprefix("torch.")) for name, spec in specs.items()},
        "nbytes": held_bytes(specs.values(), tile, gathered),
        "rounded": plan.rounding.kind != "nearest",
        "step_nbytes": whole_step_bytes(weight, plan.nbytes(shape)) if gathered else 0,
    }


def whole_step_bytes(weight: int, state: int) -> int:
    """Return the bytes that a process has at once to step a weight whole, without the temporaries of the step itself.

    Pieces of weights, gradients and state are received while others are sent, and then put together; later the new
    weight and state are sent while others are received.
    """
    return max(2 * (2 * weight + state), 3 * (weight + state))


def _compressed(plan: StatePlan, assignment: Assignment, recipe: Recipe) -> str:
    """Return in words what the plan makes smaller than AdamW's state, and what it leaves in float32 despite 8 bits."""
    shape = assignment.role.shape
    said = [described] if (described := plan.projection.describe(shape)) else []
    said += filter(None, (moment.describe(name) for name, moment in plan.moments.items()))
    if plan.moments.keys() == {"exp_avg"}:
        said.append("no exp_avg_sq")
    full = [name for name, moment in plan.moments.items() if isinstance(moment, Full)]
    said += _storage(plan, full, assignment, recipe) if full else []
    if plan.rounding.kind != "nearest":
        said.append({"kahan": "Kahan's buffer added", "stochastic": "stochastic rounding"}[plan.rounding.kind])
    return ", ".join(said) or "full"


def _storage(plan: StatePlan, full: list[str], assignment: Assignment, recipe: Recipe) -> list[str]:
    """Return in words how moments that keep every entry are stored; nothing where it is in float32."""
    codec = plan.codec
    if isinstance(codec, Int8Blockwise):
        stored = "both moments" if len(full) > 1 else full[0]
        return [f"{stored} in 8 bits, blocks of {codec.block_size}"]
    if isinstance(codec, BFloat16):
        return ["exp_avg in bfloat16"]
    if recipe.state_bits == 8:
        return [_why_float32(plan.projection.space(assignment.role.shape, "exp_avg")[0], assignment, recipe)]
    return []


def _why_float32(space: Sequence[int], assignment: Assignment, recipe: Recipe) -> str:
    """Return why moments of the shape `space` are not stored in 8 bits, although the recipe has 8."""
    if assignment.options["state_bits"] != 8:
        return "kept in float32 by embedding_bits=32"
    if not space or math.prod(space) < recipe.min_8bit_size:
        return f"fewer than {recipe.min_8bit_size:,} entries: kept in float32"
    return "rows of one entry: kept in float32"


def _dtype(param: torch.Tensor) -> str:
    return str(param.dtype).removeprefix("torch.")


def _description(row: Row) -> str:
    return f"{row.compressed} ({row.why})" if row.trainable else "frozen"
