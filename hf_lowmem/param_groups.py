"""From a model and a recipe to the options of every parameter: what the optimizer's groups are split by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_lowmem.checks import check_hyperparameters
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.roles import ParamRole, assign_roles, canonical_name
from hf_lowmem.rules import load_rules
from hf_lowmem.state import StatePlan

EMBEDDINGS = ("token_embedding", "position_embedding", "embedding")

SecondMoment = tuple[dict[str, Any], str]  # group options (axes, rows_per_block, segments), and why in a few words
FULL: dict[str, Any] = {}


@dataclass(frozen=True)
class Recipe:
    """The options of an algorithm as `optim_args` takes them: the fields' types and defaults are the parser's schema.

    Args:
        state_bits: bits per number of the full moments: 32, 16 (bfloat16 first moment, float32 second) or 8.
        embedding_bits: the same for embeddings; by default 32 where their second moment is full, else `state_bits`.
        block_size: largest number of entries of a row that share one 8-bit scale: 256, 128 or 64.
        min_8bit_size: parameters with fewer entries keep float32 state.
        compile: step through torch.compile.
    """

    state_bits: Literal[32, 16, 8] = 32
    embedding_bits: Literal[32, 16, 8] | None = None
    block_size: Literal[256, 128, 64] = 256
    min_8bit_size: int = 4096
    compile: bool = False

    algorithm: ClassVar[str]
    optimizer_cls: ClassVar[type[LowMemOptimizer]]
    has_second_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameters({"min_8bit_size": self.min_8bit_size})

    def second_moment(self, role: ParamRole) -> SecondMoment:
        """Over which entries of a parameter of this role the second moment is averaged."""
        raise NotImplementedError

    def group_options(self, role: ParamRole, second_moment: dict[str, Any]) -> dict[str, Any]:
        """The group values of a parameter: plain values only."""
        bits: int = self.state_bits
        if role.role in EMBEDDINGS:
            full = self.has_second_moment and not second_moment
            bits = self.embedding_bits or (32 if full else bits)
        return {**second_moment, "state_bits": bits}

    def shared_options(self) -> dict[str, Any]:
        """Keywords of the optimizer class: what holds for every group, and for parameters that no plan knows."""
        return {
            "state_bits": self.state_bits,
            "block_size": self.block_size,
            "min_8bit_size": self.min_8bit_size,
            "compile": self.compile,
        }

    def state_plan(self, role: ParamRole, options: dict[str, Any]) -> StatePlan:
        """The state of a parameter with these group options."""
        cls = self.optimizer_cls
        values = {**cls.layout_options, **self.shared_options(), **options}
        return cls.make_plan(role.shape, **{option: values[option] for option in cls.layout_options})


@dataclass(frozen=True)
class Assignment:
    """What one parameter of a model gets, and why."""

    param: Tensor
    role: ParamRole
    options: dict[str, Any]
    why: str


class RolePlan(Sequence[Assignment]):
    """The assignments of all of a model's parameters; an optimizer splits its groups by their options."""

    def __init__(self, assignments: Sequence[Assignment]) -> None:
        self._assignments = tuple(assignments)
        self._by_id = {id(a.param): a for a in self._assignments}

    def __len__(self) -> int:
        return len(self._assignments)

    def __getitem__(self, index: Any) -> Any:
        return self._assignments[index]

    def __iter__(self) -> Iterator[Assignment]:
        return iter(self._assignments)

    def of(self, param: Tensor) -> tuple[str, dict[str, Any]] | None:
        """(name, options) of a parameter, or None if it is not the model's."""
        assignment = self._by_id.get(id(param))
        return (assignment.role.name, assignment.options) if assignment else None


def plan_roles(model: nn.Module, recipe: Recipe) -> RolePlan:
    """Assign every parameter of `model` its role and its options under `recipe`.

    Raises:
        ValueError: the recipe's rules file cannot be read, or names a parameter that the model does not have.
    """
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    path = getattr(recipe, "rules", None)
    rules = load_rules(path) if path else None
    if rules:
        rules.check_used([name for aliases in names.values() for name in aliases])

    assignments = []
    for param, role in assign_roles(model):
        second_moment, why = recipe.second_moment(role)
        override = rules.axes_of(names[id(param)], role.role) if rules else None
        if override:
            axes, why = override
            if any(not -len(role.shape) <= axis < len(role.shape) for axis in axes):
                raise ValueError(f"{why}: axes={axes} does not fit {role.name} of shape {role.shape}.")
            second_moment = {"axes": axes} if axes else FULL
        assignments.append(Assignment(param, role, recipe.group_options(role, second_moment), why))
    return RolePlan(assignments)
