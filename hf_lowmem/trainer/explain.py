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


def explain(
    model: nn.Module, name: str, optim_args: str | Mapping[str, Any] | None = None, *, ranks: int = 1
) -> Explanation:
    """Explain what `build_optimizer(model, name, optim_args=...)` would do with every parameter, without doing it.

    Args:
        model: any module, which may be on the meta device.
        name: as in `build_optimizer`; "adamw_torch" and "adamw_torch_fused" explain torch's AdamW.
        optim_args: as in `build_optimizer`.
        ranks: the number of processes among which FSDP2 divides the rows of each weight. All bytes are then those of
            the first process, which holds the most.

    Returns:
        An explanation that prints as a table and has `.rows`, `.by_role()` and `.to_dict()`.

    Raises:
        ValueError: the name is unknown, an option is illegal, or `ranks` is no positive number.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig())  # Llama 2 7B
    >>> explanation = hf_lowmem.explain(model, "slim_adamw_8bit")
    >>> round(explanation.bytes_per_param, 3)
    1.017
    >>> round(hf_lowmem.explain(model, "slim_adamw_8bit", ranks=4).bytes_per_param, 3)  # on each of 4 cards
    0.255
    """
    check_ranks(ranks)
    if name in ADAMW_NAMES:
        if optim_args:
            raise ValueError(f"optim_args {optim_args!r} mean nothing to {name!r}, which keeps AdamW's full state.")
        return explain_adamw(name, assign_roles(model), ranks)
    recipe = recipe_for(name, optim_args)
    return explain_plan(plan_roles(model, recipe), recipe, ranks)


def compare(model: nn.Module, *, ranks: int = 1) -> Comparison:
    """Compare what every name of this package takes for `model` at its default options, and torch's AdamW.

    Args:
        model, ranks: as in `explain`.
    """
    check_ranks(ranks)
    roles = assign_roles(model)
    adamw = ADAMW_NAMES[0]
    explanations = {adamw: explain_adamw(adamw, roles, ranks)}
    for name in OPTIM_NAMES:
        recipe = recipe_for(name)
        explanations[name] = explain_plan(plan_roles(model, recipe, roles), recipe, ranks)
    return Comparison(explanations)


def check_ranks(ranks: int) -> None:
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"ranks={ranks!r} must be the number of processes, a whole number of at least 1.")
