"""Which weights an optimizer with a projection projects, and how a user says otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from hf_lowmem.options import Options, decided_by_role, layout, recipe_only
from hf_lowmem.param_groups import Assignment, Recipe, RoleOptions
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE

# These roles are linear-like weights of the body. Embeddings, heads, routers and LoRA factors are not.
BODY = {
    *("attention_query", "attention_key", "attention_value", "attention_output"),
    *("attention_qkv", "attention_key_value", "attention_down"),
    *("mlp_up", "mlp_gate", "mlp_gate_up", "mlp_down", "ssm", "conv", "projection"),
}
# `target_modules` may name other nn.Linear too, as in transformers. All other weights take a rules file.
NAMEABLE = BODY | {"lm_head", "classifier", "router", "unknown"}
UNPROJECTED: dict[str, Any] = {"project": False}


@dataclass(frozen=True)
class ProjectedOptions(Options):
    """The options of every algorithm that projects weights."""

    proj_bits: Literal[32, 16] | None = layout(
        None, "32 or 16, bits of the basis; by default 32, and 16 where `state_bits` is below 32."
    )
    project: bool = decided_by_role(True, "project the weights of the group; false steps them without a basis.")
    stacked: bool = decided_by_role(False, "take 3-D weights as stacks of matrices, each with a basis of its own.")


@dataclass(frozen=True)
class ProjectedRecipe(Recipe):
    """Which weights are projected."""

    target_modules: str | list[str] | None = recipe_only(  # noqa: RUF009
        None,
        'modules to project instead of the weights of the body: "all-linear", which is the body; a regular expression '
        "that matches the whole name; or a list of parts of names. `TrainingArguments.optim_target_modules` sets it "
        "too.",
    )
    rules: str | None = recipe_only(
        None,
        'path of a JSON file that goes before all else: `{"exact": {name: value}, "regex": [[pattern, value]], '
        '"unknown": value}` with true, false or a rank as values.',
    )

    projects: ClassVar[bool] = True
    fallback_options: ClassVar[dict[str, Any]] = UNPROJECTED
    without_roles: ClassVar[str] = "every matrix is projected, embeddings and heads too"

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules or ():
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"target_modules: {target!r} is not a regular expression: {error}.") from None

    def projected(self, role: ParamRole, asked: Any) -> RoleOptions:
        """Return the options that project a matrix, a stack of them or a convolution, or UNPROJECTED; and why.

        Args:
            role: a parameter with output and input axes.
            asked: the value that a rules file has for the parameter, or True.

        Raises:
            ValueError: the rank does not fit.
        """
        raise NotImplementedError

    def options_of(self, role: ParamRole) -> RoleOptions:
        if not is_projectable(role):
            conv = role.role == "conv" and role.fan_out is not None
            return UNPROJECTED, "a convolution without four axes" if conv else role.why
        if not self._selects(role):
            return UNPROJECTED, "not of the body" if self._takes_the_body else "not in target_modules"
        return self.projected(role, True)

    @property
    def _takes_the_body(self) -> bool:
        return self.target_modules in (None, "all-linear", "all_linear")

    def _selects(self, role: ParamRole) -> bool:
        if self.target_modules is None or self._takes_the_body:
            return role.role in BODY
        return role.role in NAMEABLE and names_module(self.target_modules, role.name)

    def read_value(self, value: Any) -> Any:
        if value is None or value == "full":
            return False
        if isinstance(value, bool) or (type(value) is int and value >= 1):
            return value
        raise ValueError('true, false, "full", null, or a rank of at least 1')

    def options_from_file(self, role: ParamRole, value: Any) -> dict[str, Any]:
        if value is False:
            return UNPROJECTED
        if not is_projectable(role):
            raise ValueError(f"{role.name} of shape {role.shape} has no output and input axes to project.")
        options, why = self.projected(role, value)
        if options == UNPROJECTED:
            raise ValueError(f"{role.name} of shape {role.shape} cannot be projected: {why}.")
        return options

    def check_use(self, assignments: Sequence[Assignment]) -> None:
        targets = self.target_modules
        if targets is None or self._takes_the_body:
            return
        named = [a for a in assignments if a.param.requires_grad and names_module(targets, a.role.name)]
        if any(self.state_plan(a).projection is not FULL_SPACE for a in named):
            return
        refused = [f"{a.role.name}, {a.why}" for a in named if is_projectable(a.role) and self._selects(a.role)]
        nameable = [a.role.name for a in assignments if a.role.role in NAMEABLE and a.param.requires_grad]
        if refused:
            hint = refused[0]
        elif nameable:
            names = " or ".join(nameable[:3])
            hint = f"names look like {names}, and a string is a regular expression for the whole module name"
        else:
            hint = "there is none (LoRA factors and frozen weights are not projected)"
        raise ValueError(f"target_modules={targets!r} names no trained weight that can be projected: {hint}.")


def basis_dtype(options: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a basis is stored in: that of `proj_bits`, which is narrower where the moments are."""
    bits = options["proj_bits"] or (32 if options["state_bits"] == 32 else 16)
    return torch.bfloat16 if bits == 16 else torch.float32


def is_projectable(role: ParamRole) -> bool:
    """Return whether a parameter is a matrix, a stack of experts' matrices or a 4-D convolution, of known axes."""
    if role.fan_out is None:
        return False
    return len(role.shape) == 2 or (len(role.shape) == 3 and role.expert_axis == 0) or len(role.shape) == 4


def names_module(targets: str | Sequence[str], name: str) -> bool:
    """Return whether transformers' `optim_target_modules` would select the module of a parameter called `name`.

    A parameter that is not its module's `weight` is also selected by its own name.
    """
    module, _, leaf = name.rpartition(".")
    keys = (module,) if leaf == "weight" else (module, name)
    if isinstance(targets, str):
        return any(re.fullmatch(targets, key) for key in keys)
    return any(target in key or re.fullmatch(target, key) for target in targets for key in keys)
