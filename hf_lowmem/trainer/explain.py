"""What an optim name does with a model. This module does not import transformers' Trainer, which takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_lowmem.param_groups import plan_roles
from hf_lowmem.planner import Comparison, Explanation, explain_adamw, explain_plan
from hf_lowmem.roles import assign_roles
from hf_lowmem.trainer.names import ADAMW_NAMES, OPTIM_NAMES
from hf_lowmem.trainer.optim_args import recipe_for


def explain(model: nn.Module, name: str, optim_args: str | Mapping[str, Any] | None = None) -> Explanation:
    """Explain what `build_optimizer(model, name, optim_args=...)` would do with every parameter, without doing it.

    Args:
        model: any module, which may be on the meta device.
        name: as in `build_optimizer`; "adamw_torch" and "adamw_torch_fused" explain torch's AdamW.
        optim_args: as in `build_optimizer`.

    Returns:
        An explanation that prints as a table and has `.rows`, `.by_role()` and `.to_dict()`.

    Raises:
        ValueError: the name is unknown, or an option is illegal.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig())  # Llama 2 7B
    >>> explanation = hf_lowmem.explain(model, "slim_adamw_8bit")
    >>> round(explanation.bytes_per_param, 3)
    1.017
    """
    if name in ADAMW_NAMES:
        if optim_args:
            raise ValueError(f"optim_args {optim_args!r} mean nothing to {name!r}, which keeps AdamW's full state.")
        return explain_adamw(name, assign_roles(model))
    recipe = recipe_for(name, optim_args)
    return explain_plan(plan_roles(model, recipe), recipe)


def compare(model: nn.Module) -> Comparison:
    """Compare what every name of this package takes for `model` at its default options, and torch's AdamW."""
    roles = assign_roles(model)
    adamw = ADAMW_NAMES[0]
    explanations = {adamw: explain_adamw(adamw, roles)}
    for name in OPTIM_NAMES:
        recipe = recipe_for(name)
        explanations[name] = explain_plan(plan_roles(model, recipe, roles), recipe)
    return Comparison(explanations)
