"""What an optimizer does with every parameter of a model, in a table, without allocating anything."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_lowmem.moments import Full, GroupMean, RowColMean
from hf_lowmem.param_groups import Assignment, Recipe, RolePlan
from hf_lowmem.state import StatePlan

ADAMW_BYTES = {32: 8, 16: 6, 8: 2}  # both moments of one parameter, by `state_bits`


@dataclass(frozen=True)
class Row:
    """One parameter: what is compressed, the state that is declared for it, and why.

    `state` maps the name of each state tensor to (shape, dtype); `nbytes` counts all of them, `step` included;
    `rounded` says that the weight is rounded at random or by Kahan's sum.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    trainable: bool
    compressed: str
    state: dict[str, tuple[tuple[int, ...], str]]
    nbytes: int
    why: str
    rounded: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Explanation:
    """The rows of all parameters; prints as a table."""

    algorithm: str
    state_bits: int
    rows: tuple[Row, ...]
    caution: str = ""

    @property
    def numel(self) -> int:
        """Trainable entries."""
        return sum(row.numel for row in self.rows if row.trainable)

    @property
    def nbytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_param(self) -> float:
        return self.nbytes / max(self.numel, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "algorithm": self.algorithm,
            "state_bits": self.state_bits,
            "parameters": self.numel,
            "bytes": self.nbytes,
            "bytes_per_param": self.bytes_per_param,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [
            (r.name, "x".join(map(str, r.shape)), r.role, r.compressed, _states(r), f"{r.nbytes:,}", r.why)
            for r in self.rows
        ]
        head = ("parameter", "shape", "role", "compressed", "state", "bytes", "why")
        return "\n".join([*_table(head, lines, right=(5,)), "", self._total()])

    def by_role(self) -> str:
        """One line per role and treatment: how many parameters, what is compressed, bytes, and why."""
        groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in self.rows:
            groups[row.role, row.compressed, row.why if row.trainable else "frozen"].append(row)
        lines = [
            (
                role,
                str(len(rows)),
                f"{sum(row.numel for row in rows):,}",
                compressed,
                f"{sum(row.nbytes for row in rows):,}",
                f"{sum(row.nbytes for row in rows) / max(sum(row.numel for row in rows), 1):.3f}",
                why,
            )
            for (role, compressed, why), rows in groups.items()
        ]
        head = ("role", "tensors", "parameters", "compressed", "bytes", "B/param", "why")
        return "\n".join([*_table(head, lines, right=(1, 2, 4, 5)), "", self._total()])

    def _total(self) -> str:
        return (
            f"{self.algorithm}, state_bits={self.state_bits}: {self.nbytes:,} bytes of state for "
            f"{self.numel:,} trainable parameters, "
            f"{self.bytes_per_param:.3f} bytes each (AdamW in float32: 8)"
            + (f"\n{self.caution}" if self.caution else "")
        )


def explain_plan(plan: RolePlan, recipe: Recipe) -> Explanation:
    """The table of a plan that `plan_roles(model, recipe)` made."""
    rows = tuple(_row(assignment, recipe) for assignment in plan)
    bits = recipe.state_bits
    bytes_per_param = Explanation(recipe.algorithm, bits, rows).bytes_per_param
    caution = recipe.caution.format(bytes=bytes_per_param, adamw=ADAMW_BYTES[bits])
    return Explanation(recipe.algorithm, bits, rows, caution)


def _row(assignment: Assignment, recipe: Recipe) -> Row:
    role = assignment.role
    state: dict[str, tuple[tuple[int, ...], str]] = {}
    nbytes, compressed, why, rounded = 0, "-", "frozen", False
    if assignment.param.requires_grad:
        plan = recipe.state_plan(assignment)
        specs = plan.specs(role.shape)
        state = {name: (spec.shape, str(spec.dtype).removeprefix("torch.")) for name, spec in specs.items()}
        nbytes = plan.nbytes(role.shape)
        compressed, why = _compressed(plan, role.shape, assignment.options["state_bits"]), assignment.why
        rounded = plan.rounding.kind != "nearest"
    return Row(
        role.name, role.shape, role.role, assignment.param.requires_grad, compressed, state, nbytes, why, rounded
    )


def _compressed(plan: StatePlan, shape: tuple[int, ...], state_bits: int) -> str:
    """What the plan makes smaller than AdamW's state; what was asked for and could not be done is said too."""
    said = [described] if (described := plan.projection.describe(shape)) else []
    second = plan.moments.get("exp_avg_sq")
    if second is None:
        said.append("no exp_avg_sq")
    if isinstance(second, GroupMean):
        means = []
        for segment in second.segments:
            run = f" and {segment.rows_per_block} rows" if segment.rows_per_block > 1 else ""
            axes = ",".join(map(str, segment.axes))
            means.append(f"{segment.name + ': ' if segment.name else ''}axis {axes}{run}")
        said.append(f"exp_avg_sq mean over {'; '.join(means)}")
    if isinstance(second, RowColMean):
        said.append("exp_avg_sq by rows and columns")
    codec = type(plan.codec).__name__
    if codec == "Int8Blockwise":
        said.append(f"{'exp_avg' if not isinstance(second, Full) else 'both'} 8-bit/{plan.codec.block_size}")  # type: ignore[attr-defined]
    elif codec == "BFloat16":
        said.append("exp_avg bf16")
    elif state_bits == 8:
        said.append("fp32 (too small or odd for 8-bit blocks)")
    if plan.rounding.kind != "nearest":
        said.append({"kahan": "Kahan's buffer added", "stochastic": "stochastic rounding"}[plan.rounding.kind])
    return ", ".join(said) or "full"


def _states(row: Row) -> str:
    return " ".join(f"{name}{list(shape)}:{dtype}" for name, (shape, dtype) in row.state.items() if name != "step")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    ]
