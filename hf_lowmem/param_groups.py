"""From a model and a recipe to the options of every parameter, which decide what its state looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hf_lowmem.checks import check_hyperparameters
from hf_lowmem.optimizer import RUN_OPTIONS, LowMemOptimizer
from hf_lowmem.roles import ParamRole, assign_roles, canonical_name
from hf_lowmem.rules import load_rules, read_axes
from hf_lowmem.state import StatePlan

STORAGE_OPTIONS = ("state_bits", "block_size", "min_8bit_size")
EMBEDDINGS = ("token_embedding", "position_embedding", "embedding")

Treatment = tuple[dict[str, Any], str]  # layout options (axes, segments, rank, ...), and why in a few words
Roles = Sequence[tuple[nn.Parameter, ParamRole]]
FULL: dict[str, Any] = {}


@dataclass(frozen=True)
class Recipe:
    """The options of an algorithm as `optim_args` takes them: the fields' types and defaults are the parser's schema.

    Args:
        state_bits: bits per number of the full moments: 32, 16 (bfloat16 first moment, float32 second) or 8.
        embedding_bits: the same for embeddings; by default `state_bits`.
        block_size: largest number of entries of a row that share one 8-bit scale: 256, 128 or 64.
        min_8bit_size: parameters with fewer entries keep float32 state.
        compile: step through torch.compile.
        rounding: "nearest", "stochastic" or "kahan", how weights narrower than float32 take an update.
        rounding_seed: of the noise of "stochastic".
        fused_clip: leave a Trainer's clipping (`max_grad_norm`) to the step, which scales gradients as it reads them.
        capturable: a CUDA graph can capture the step; not for algorithms that project.
        offload_state: keep the state on the host while a trainer generates, or between the steps of one that does not.
    """

    state_bits: Literal[32, 16, 8] = 32
    embedding_bits: Literal[32, 16, 8] | None = None
    block_size: Literal[256, 128, 64] = 256
    min_8bit_size: int = 4096
    compile: bool = False
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest"
    rounding_seed: int = 0
    offload_state: bool = False
    fused_clip: bool = False
    capturable: bool = False

    algorithm: ClassVar[str]
    optimizer_cls: ClassVar[type[LowMemOptimizer]]
    untreated: ClassVar[dict[str, Any]] = FULL
    without_roles: ClassVar[str] = "every parameter keeps its full second moment"
    projects: ClassVar[bool] = False  # whether weights get a projection, so that none at all is worth a warning
    caution: ClassVar[str] = ""  # a warning that goes with the summary; may name {bytes} per parameter, and {adamw}'s

    def __post_init__(self) -> None:
        check_hyperparameters(vars(self))

    def treat(self, role: ParamRole) -> Treatment:
        """How the state of a parameter of this role is made smaller than AdamW's; no options where it is not.

        Raises:
            ValueError: the recipe's options do not fit the parameter.
        """
        raise NotImplementedError

    def read_rule(self, value: Any) -> Any:
        """Check a value of a rules file; ValueError says what was expected."""
        return read_axes(value)

    def apply_rule(self, role: ParamRole, value: Any) -> dict[str, Any]:
        """The options that a rule's value means for a parameter.

        Raises:
            ValueError: the value does not fit the parameter.
        """
        if any(not -len(role.shape) <= axis < len(role.shape) for axis in value):
            raise ValueError(f"axes={value} does not fit {role.name} of shape {role.shape}.")
        return {"axes": value} if value else FULL

    def check_use(self, assignments: Sequence[Assignment]) -> None:
        """Raise ValueError if an option names parameters and none that is trained was found."""

    def group_options(self, role: ParamRole, treatment: dict[str, Any]) -> dict[str, Any]:
        """The layout options of a parameter: plain values only."""
        bits = self.embedding_bits if role.role in EMBEDDINGS else None
        return {**treatment, "state_bits": bits or self.state_bits}

    def shared_options(self) -> dict[str, Any]:
        """Keywords of the optimizer class: what holds for every group, and for parameters that no plan knows."""
        return {name: getattr(self, name) for name in (*STORAGE_OPTIONS, *RUN_OPTIONS)}

    def state_plan(self, assignment: Assignment) -> StatePlan:
        """The state of a parameter with its options."""
        cls, shape, dtype = self.optimizer_cls, assignment.role.shape, assignment.param.dtype
        return cls.state_plan(shape, dtype, {**cls.plan_options(), **self.shared_options(), **assignment.options})


@dataclass(frozen=True)
class Assignment:
    """What one parameter of a model gets, and why."""

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
        """(name, options) of a parameter, or None if it is not the model's."""
        assignment = self._by_id.get(id(param))
        return (assignment.role.name, assignment.options) if assignment else None


def plan_roles(model: nn.Module, recipe: Recipe, roles: Roles | None = None) -> RolePlan:
    """Assign every parameter of `model` its role and its options under `recipe`.

    `roles` is what `assign_roles(model)` returned, where several recipes are compared.

    Raises:
        ValueError: the recipe's rules file cannot be read, or names a parameter that the model does not have.
    """
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    path = getattr(recipe, "rules", None)
    rules = load_rules(path, recipe.read_rule) if path else None
    if rules:
        rules.check_used([name for aliases in names.values() for name in aliases])

    assignments = []
    for param, role in assign_roles(model) if roles is None else roles:
        rule = rules.find(names[id(param)], role.role) if rules else None
        try:
            options, why = (recipe.apply_rule(role, rule[0]), rule[1]) if rule else recipe.treat(role)
        except ValueError as error:
            if param.requires_grad:
                raise ValueError(f"{rule[1]}: {error}" if rule else str(error)) from None
            options, why = recipe.untreated, str(error)
        assignments.append(Assignment(param, role, recipe.group_options(role, options), why))
    recipe.check_use(assignments)
    return RolePlan(assignments)
