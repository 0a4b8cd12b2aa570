"""From a model and a recipe to the options of every parameter, which decide how its state is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_lowmem.codecs import CODECS
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.options import Option, Options, recipe_only
from hf_lowmem.roles import ParamRole, assign_roles, canonical_name
from hf_lowmem.rules import load_rules, read_axes
from hf_lowmem.state import StatePlan

ADAMW_BYTES = {32: 8, 16: 6, 8: 2}  # bytes of AdamW's moments per parameter, by `state_bits`
EMBEDDINGS = ("token_embedding", "position_embedding", "embedding")

RoleOptions = tuple[dict[str, Any], str]  # the layout options that a role decides (axes, rank, ...), and why
Roles = Sequence[tuple[nn.Parameter, ParamRole]]


@dataclass(frozen=True)
class Recipe(Options):
    """The options of an algorithm as `optim_args` take them, and the layout options that follow from a role.

    The recipe of an algorithm inherits the options of its optimizer class, and adds those that the recipe alone reads.
    """

    embedding_bits: int | None = recipe_only(
        None, "`state_bits` of embeddings; by default that of all weights.", choices=CODECS
    )

    optimizer_cls: ClassVar[type[LowMemOptimizer]]
    fallback_options: ClassVar[dict[str, Any]] = {}  # for a frozen parameter that the recipe does not fit
    without_roles: ClassVar[str] = "every parameter keeps its full second moment"
    splits_parts: ClassVar[bool] = False  # whether the parts of a fused weight may have rules of their own
    projects: ClassVar[bool] = False  # whether weights get a projection, so that none at all is worth a warning
    caution: ClassVar[str] = ""  # a warning that goes with the summary; may name {bytes} per parameter, and {adamw}'s

    def __post_init__(self) -> None:
        self.check_values(vars(self))

    @property
    def algorithm(self) -> str:
        """The name of the algorithm, which is that of its optimizer class."""
        return self.optimizer_cls.algorithm

    @property
    def rules_file(self) -> str | None:
        """Return the path of the rules file that overrides by name what the recipe does, or None without one."""
        return getattr(self, "rules", None)

    @classmethod
    def arguments(cls) -> dict[str, Option]:
        """Return the options that `optim_args` take, by name."""
        return {name: option for name, option in cls.declared().items() if option.kind != "role"}

    def options_of(self, role: ParamRole) -> RoleOptions:
        """Return the layout options of a parameter of this role, and the reason in a few words.

        Without an option, the state is laid out as the recipe's own options say.

        Raises:
            ValueError: the recipe's options do not fit the parameter.
        """
        raise NotImplementedError

    def read_value(self, value: Any) -> Any:
        """Return a value of a rules file as `options_from_file` takes it; ValueError says what was expected."""
        return read_axes(value)

    def options_from_file(self, role: ParamRole, value: Any) -> dict[str, Any]:
        """Return the layout options of a parameter that a rules file gives `value`.

        Raises:
            ValueError: the value does not fit the parameter.
        """
        check_axes(role, value)
        return {"axes": value} if value else {}

    def options_of_parts(self, role: ParamRole, values: dict[str, Any]) -> dict[str, Any]:
        """Return the layout options of a fused weight whose parts with these names get `values`; see `splits_parts`.

        Raises:
            ValueError: a value does not fit its part.
        """
        raise NotImplementedError

    def check_use(self, assignments: Sequence[Assignment]) -> None:
        """Raise ValueError if an option names parameters, but none that is trained."""

    def caution_for(self, assignments: Sequence[Assignment], numel: int, nbytes: int) -> str:
        """Return the warning that goes with the summary of all parameters, "" if there is none.

        Args:
            assignments: what the parameters get.
            numel: the number of their trained entries.
            nbytes: the bytes of their state.
        """
        return self.caution.format(bytes=nbytes / max(numel, 1), adamw=ADAMW_BYTES[self.state_bits])

    def with_storage(self, role: ParamRole, options: dict[str, Any]) -> dict[str, Any]:
        """Return the layout options of a parameter with the bits that its state is stored in."""
        bits = self.embedding_bits if role.role in EMBEDDINGS else None
        return {**options, "state_bits": bits or self.state_bits}

    def shared_options(self) -> dict[str, Any]:
        """Return the keywords of the optimizer class, which hold for every parameter that no role says more about."""
        declared = self.optimizer_cls.options_cls.declared()
        return {name: getattr(self, name) for name, option in declared.items() if option.kind != "role"}

    def plan_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return all options that the plan of a parameter depends on, where its role decides `options`."""
        return {**self.optimizer_cls.plan_options(), **self.shared_options(), **options}

    def state_plan(self, assignment: Assignment) -> StatePlan:
        """Return the plan of a parameter's state."""
        shape, dtype = assignment.role.shape, assignment.param.dtype
        return self.optimizer_cls.state_plan(shape, dtype, self.plan_options(assignment.options))


def check_axes(role: ParamRole, axes: Sequence[int]) -> None:
    """Raise ValueError if a parameter lacks one of these axes."""
    if any(not -len(role.shape) <= axis < len(role.shape) for axis in axes):
        raise ValueError(f"axes={tuple(axes)} does not fit {role.name} of shape {role.shape}.")


@dataclass(frozen=True)
class Assignment:
    """The role of one parameter of a model, its layout options, and why it has them."""

    param: Tensor
    role: ParamRole
    options: dict[str, Any]
    why: str


class RolePlan(Sequence[Assignment]):
    """The assignments of all of a model's parameters; an optimizer keeps their options beside its groups."""

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
        """Return (name, options) of a parameter, or None if it is not the model's."""
        assignment = self._by_id.get(id(param))
        return (assignment.role.name, assignment.options) if assignment else None


def plan_roles(model: nn.Module, recipe: Recipe, roles: Roles | None = None) -> RolePlan:
    """Assign every parameter of `model` its role and its options under `recipe`.

    Args:
        roles: what `assign_roles(model)` returned, where several recipes are compared.

    Raises:
        ValueError: the recipe's rules file cannot be read, or names a parameter that the model does not have.
    """
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    if roles is None:
        roles = assign_roles(model)
    path = recipe.rules_file
    rules = load_rules(path, recipe.read_value) if path else None
    if rules:
        parts = {part.role for _, role in roles for part in role.parts} if recipe.splits_parts else set()
        known = {role.role for _, role in roles} | parts
        rules.check_used([name for aliases in names.values() for name in aliases], known)

    assignments = []
    for param, role in roles:
        entry = rules.find(names[id(param)], role.role) if rules else None
        source = entry[1] if entry else ""
        by_part = {}
        if rules and not entry and recipe.splits_parts:
            by_part = {part.name: rules.role[part.role] for part in role.parts if part.role in rules.role}
            source = "rules file, by role of its parts" if by_part else ""
        try:
            if entry:
                options, why = recipe.options_from_file(role, entry[0]), source
            elif by_part:
                options, why = recipe.options_of_parts(role, by_part), source
            else:
                options, why = recipe.options_of(role)
        except ValueError as error:
            if param.requires_grad:
                raise ValueError(f"{source}: {error}" if source else str(error)) from None
            options, why = recipe.fallback_options, str(error)
        assignments.append(Assignment(param, role, recipe.with_storage(role, options), why))
    recipe.check_use(assignments)
    return RolePlan(assignments)
