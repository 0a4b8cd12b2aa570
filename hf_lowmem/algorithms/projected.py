"""Which weights an optimizer with a projection takes, and how a user says otherwise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_lowmem.param_groups import Assignment, Recipe, Treatment
from hf_lowmem.roles import ParamRole
from hf_lowmem.state import FULL_SPACE

# Linear-like weights of the body. Embeddings, heads, routers and LoRA factors are not.
BODY = {
    *("attention_query", "attention_key", "attention_value", "attention_output"),
    *("attention_qkv", "attention_key_value", "attention_down"),
    *("mlp_up", "mlp_gate", "mlp_gate_up", "mlp_down", "ssm", "conv", "projection"),
}
# What `target_modules` may name besides: other nn.Linear, as in transformers. The rest takes a rules file.
NAMEABLE = BODY | {"lm_head", "classifier", "router", "unknown"}
LEFT_OUT: dict[str, Any] = {"project": False}


@dataclass(frozen=True)
class ProjectedRecipe(Recipe):
    """Which weights are projected.

    Args:
        target_modules: project only these modules: "all-linear", a regular expression that matches the whole name, or
            a list of parts of names. `TrainingArguments.optim_target_modules` sets it too. Default: all weights of
            the body.
        rules: path of a JSON file with rules by name, which go before all else: true, false, or the rank.
    """

    target_modules: str | list[str] | None = None
    rules: str | None = None

    projects: ClassVar[bool] = True
    untreated: ClassVar[dict[str, Any]] = LEFT_OUT
    without_roles: ClassVar[str] = "every matrix is projected, embeddings and heads too"

    def __post_init__(self) -> None:
        super().__post_init__()
        for target in [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules or ():
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"target_modules: {target!r} is not a regular expression: {error}.") from None

    def options_of(self, role: ParamRole, asked: Any) -> Treatment:
        """The options that project a matrix, a stack of them or a convolution, or LEFT_OUT; and why.

        Args:
            role: a parameter with output and input axes.
            asked: what a rule says, or True.

        Raises:
            ValueError: the rank does not fit.
        """
        raise NotImplementedError

    def treat(self, role: ParamRole) -> Treatment:
        if not is_projectable(role):
            conv = role.role == "conv" and role.fan_out is not None
            return LEFT_OUT, "a convolution without four axes" if conv else role.why
        if not self._selects(role):
            return LEFT_OUT, "not of the body" if self._takes_the_body else "not in target_modules"
        return self.options_of(role, True)

    @property
    def _takes_the_body(self) -> bool:
        return self.target_modules in (None, "all-linear", "all_linear")

    def _selects(self, role: ParamRole) -> bool:
        if self.target_modules is None or self._takes_the_body:
            return role.role in BODY
        return role.role in NAMEABLE and names_module(self.target_modules, role.name)

    def read_rule(self, value: Any) -> Any:
        if value is None or value == "full":
            return False
        if isinstance(value, bool) or (type(value) is int and value >= 1):
            return value
        raise ValueError('true, false, "full", null, or a rank of at least 1')

    def apply_rule(self, role: ParamRole, value: Any) -> dict[str, Any]:
        if value is False:
            return LEFT_OUT
        if not is_projectable(role):
            raise ValueError(f"{role.name} of shape {role.shape} has no output and input axes to project.")
        options, why = self.options_of(role, value)
        if options == LEFT_OUT:
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


def basis_dtype(options: dict[str, Any]) -> torch.dtype:
    """The storage of a basis under `proj_bits`, by default narrower where the moments are."""
    bits = options["proj_bits"] or (32 if options["state_bits"] == 32 else 16)
    return torch.bfloat16 if bits == 16 else torch.float32


def is_projectable(role: ParamRole) -> bool:
    """Whether a parameter is a matrix, a stack of experts' matrices, or a 4-D convolution, with known axes."""
    if role.fan_out is None:
        return False
    return len(role.shape) == 2 or (len(role.shape) == 3 and role.expert_axis == 0) or len(role.shape) == 4


def names_module(targets: str | Sequence[str], name: str) -> bool:
    """transformers' rule for `optim_target_modules`; a parameter that is no module's `weight` has its own name too."""
    module, _, leaf = name.rpartition(".")
    keys = (module,) if leaf == "weight" else (module, name)
    if isinstance(targets, str):
        return any(re.fullmatch(targets, key) for key in keys)
    return any(target in key or re.fullmatch(target, key) for target in targets for key in keys)
