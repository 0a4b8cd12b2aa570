"""From a model and an optim name to an optimizer, with the Trainer's grouping."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.state import is_initialized
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from hf_lowmem.log import PACKAGE, announce, get_logger, is_first_process
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.param_groups import Recipe, plan_roles
from hf_lowmem.planner import Explanation, explain_plan
from hf_lowmem.sizes import in_unit, unit_of
from hf_lowmem.step_checks import check_param, check_whole
from hf_lowmem.trainer.optim_args import read_optim_args, recipe_for

logger = get_logger(__name__)


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    optim_args: str | Mapping[str, Any] | None = None,
) -> LowMemOptimizer:
    """The optimizer that a `Trainer` with `optim=name` would build for `model`.

    Weight decay applies to the parameters that `Trainer.get_decay_parameter_names` lists (no biases, no norms).

    Args:
        model: the model; parameters that need no gradient are left out.
        name: an optim name of this package, such as "slim_adamw_8bit".
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        optim_args: the algorithm's options: "key=value,key=value", a JSON object, or a mapping.

    Raises:
        ValueError: for an unknown name or an illegal option.
    """
    optimizer_cls, kwargs = optimizer_cls_and_kwargs(
        model, name, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, optim_args=optim_args
    )
    decayed = _decayed(model)
    trainable = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [param for param in trainable if id(param) in decayed], "weight_decay": weight_decay},
        {"params": [param for param in trainable if id(param) not in decayed], "weight_decay": 0.0},
    ]
    return optimizer_cls(groups, **kwargs)


def _decayed(model: nn.Module) -> set[int]:
    """The ids of the parameters that a Trainer decays, whatever names a module of the user's gives them."""
    try:
        names = set(Trainer.get_decay_parameter_names(None, model))
    except TypeError:  # a scripted module, in which transformers cannot look for norms
        return {id(param) for param in model.parameters() if param.ndim > 1}
    return {id(param) for name, param in nn.Module.named_parameters(model) if name in names}


def optimizer_cls_and_kwargs(
    model: nn.Module | None,
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    optim_args: str | Mapping[str, Any] | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> tuple[type[LowMemOptimizer], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes; nothing of transformers is changed.

    The Trainer's groups bring their own weight decay, from `TrainingArguments.weight_decay`; the one given here holds
    for groups that bring none.

    Args:
        model: the model that the Trainer gets; with None no role is known, and what the optimizer does with each
            shape is its class's default.
        name, lr, betas, eps, weight_decay, optim_args: as in `build_optimizer`.
        target_modules: what `optim_target_modules` is in `TrainingArguments`, for names that project.

    Raises:
        ValueError: for an unknown name or an illegal option.
    """
    recipe = recipe_for(name, optim_args, target_modules)
    if model is None:
        logger.warning(
            "No model was given for optim %r, so no weight's role is known: %s.", name, recipe.without_roles
        )
    kwargs = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **recipe.shared_options()}
    roles = None
    if model is not None:
        check_weights(model)
        roles = plan_roles(model, recipe)
        if is_first_process():
            explanation = explain_plan(roles, recipe)
            announce_state(name, explanation, _explaining_call(name, optim_args, target_modules))
            log_summary(explanation, recipe)
    return recipe.optimizer_cls, {**kwargs, "roles": roles}


def refuse_sharding(args: Any) -> None:
    """Raise ValueError if the run of these arguments shards the weights: rows would be gone.

    Args:
        args: `TrainingArguments`, or the plain values of a command line whose run is yet to be launched.
    """
    for scheme, chosen in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp), ("MEGATRON_LM", None)):
        variable = f"ACCELERATE_USE_{scheme.upper()}"
        asked = bool(chosen) or os.environ.get(variable, "").lower() in ("true", "1")
        if _shards(scheme, asked, bool(chosen), getattr(args, "distributed_state", None)):
            remedy = (
                f"leave {scheme.lower()} out" if chosen else f"unset {variable}, which a launcher or a run has set"
            )
            raise ValueError(
                f"optim={getattr(args.optim, 'value', args.optim)!r} does not support {scheme} yet, which hands it "
                f"pieces of weights: {remedy}, and train with DDP or in one process."
            )


def _shards(scheme: str, asked: bool, by_arguments: bool, state: Any) -> bool:
    """What accelerate will do; `state` is its own of this process, None before there is one.

    The variable stays set after a run that asked for FSDP, and one process is not sharded whatever is asked, except by
    DeepSpeed.
    """
    if state is None:
        return by_arguments or (asked and "LOCAL_RANK" in os.environ)  # this process has been launched
    kind = state.distributed_type
    if kind == scheme.upper():
        return True
    if is_initialized() and kind != DistributedType.XLA:  # the Trainer has its Accelerator, which has decided
        return False
    return asked and (scheme == "DeepSpeed" or kind not in (DistributedType.NO, DistributedType.MULTI_CPU))


def check_weights(model: nn.Module) -> None:
    """Raise ValueError if a trained parameter of `model` is a piece of a weight, such as FSDP leaves to a process."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            check_param(param)
            check_whole(param, name)


def show_summary() -> None:
    """Let the role summary, which is logged as information, reach the terminal."""
    PACKAGE.setLevel(logging.INFO)


def announce_state(name: str, explanation: Explanation, details: str) -> None:
    """Say in one line what the optimizer's state takes, and the moments of torch's AdamW for the same weights."""
    if explanation.adamw_nbytes:
        unit = unit_of(explanation.nbytes)
        announce(
            "%s: %s %s of optimizer state, AdamW %s (%+d %%); details: %s",
            name,
            in_unit(explanation.nbytes, unit),
            unit,
            in_unit(explanation.adamw_nbytes, unit),
            round(100 * (explanation.nbytes / explanation.adamw_nbytes - 1)),
            details,
        )


def _explaining_call(
    name: str, optim_args: str | Mapping[str, Any] | None, target_modules: str | Sequence[str] | None
) -> str:
    """A line of Python that prints what each parameter gets."""
    if target_modules is not None:
        optim_args = {**read_optim_args(optim_args), "target_modules": target_modules}
    options = f", {optim_args!r}" if optim_args else ""
    return f'print(hf_lowmem.explain(model, "{name}"{options}))'


def log_summary(explanation: Explanation, recipe: Recipe) -> None:
    """Log what each role gets; matrices of unknown role are a warning."""
    logger.info("Optimizer state by role:\n%s", explanation.by_role())
    if explanation.caution and not logger.isEnabledFor(logging.INFO):  # else the summary has said it
        logger.warning("%s", explanation.caution)
    too_large = [row for row in explanation.rows if row.trainable and "would keep all of it" in row.why]
    if recipe.projects and not any("proj_count" in row.state for row in explanation.rows):
        if too_large:
            logger.warning(
                "%s projects no weight of this model: take a smaller rank, as of %s %s.",
                explanation.algorithm,
                too_large[0].name,
                too_large[0].why,
            )
        else:
            logger.warning(
                "%s projects no weight of this model: weights of unknown role take target_modules or a rules file, "
                "LoRA factors a rules file, convolutions a rank_ratio.",
                explanation.algorithm,
            )
    if recipe.rounding != "nearest" and not any(row.rounded for row in explanation.rows if row.trainable):
        logger.warning("rounding=%s does nothing here: no trained weight is narrower than float32.", recipe.rounding)
    takes_rules = hasattr(recipe, "rules")
    unknown = [row.name for row in explanation.rows if row.role == "unknown" and row.trainable and len(row.shape) > 1]
    hint = "; a rules file overrides it" if takes_rules else ""
    if unknown:
        logger.warning(
            "%d matrices have an unknown role (%s%s), and `explain` says what they get%s.",
            len(unknown),
            ", ".join(unknown[:5]),
            ", ..." if len(unknown) > 5 else "",
            hint,
        )
