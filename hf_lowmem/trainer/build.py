"""How a model and an optim name become an optimizer with the Trainer's parameter groups."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.state import is_initialized
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer

from hf_lowmem.log import PACKAGE, announce, get_logger, is_first_process
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.param_groups import Recipe, plan_roles
from hf_lowmem.planner import Explanation, explain_plan
from hf_lowmem.sharding import is_sharded
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
    """Build the optimizer that a `Trainer` with `optim=name` would build for `model`.

    Weight decay applies to the parameters that `Trainer.get_decay_parameter_names` lists (no biases, no norms).

    Args:
        model: the model. Parameters that require no gradient are left out.
        name: an optim name of this package, such as "slim_adamw_8bit".
        lr: learning rate.
        betas: decay rates of the first and the second moment.
        eps: the constant that is added to the root of the second moment.
        weight_decay: decoupled weight decay.
        optim_args: options of the algorithm, as "key=value,key=value", a JSON object, or a mapping.

    Raises:
        ValueError: the name is unknown, or an option is illegal.

    >>> model = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4)
    >>> optimizer = hf_lowmem.build_optimizer(model, "adam_mini", lr=1e-3, optim_args="state_bits=16")
    >>> model(torch.ones(5, 1, 64)).sum().backward()
    >>> optimizer.step()
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
    """Return the ids of the parameters that a Trainer decays, even if a module overrides `named_parameters`."""
    try:
        names = set(Trainer.get_decay_parameter_names(None, model))
    except TypeError:  # transformers cannot find the norms in a scripted module
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
    """Return the argument of `Trainer(optimizer_cls_and_kwargs=...)`, which needs no change to transformers.

    The Trainer's groups have a weight decay of their own, from `TrainingArguments.weight_decay`. The one that is given
    here applies to groups without.

    Args:
        model: the model that the Trainer gets. If it is None, no role is known, and each parameter gets the defaults
            of the optimizer's class.
        name, lr, betas, eps, weight_decay, optim_args: as in `build_optimizer`.
        target_modules: as `optim_target_modules` in `TrainingArguments`, for optimizers that project.

    Raises:
        ValueError: the name is unknown, or an option is illegal.

    >>> from transformers import Trainer, TrainingArguments
    >>> model = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4)
    >>> chosen = hf_lowmem.optimizer_cls_and_kwargs(model, "adam_mini_8bit", lr=1e-3)
    >>> trainer = Trainer(model, TrainingArguments(report_to="none"), optimizer_cls_and_kwargs=chosen)
    """
    name = getattr(name, "value", name)  # `TrainingArguments.optim` is a member of an enum
    recipe = recipe_for(name, optim_args, target_modules)
    if model is None:
        logger.warning(
            "No model was given for optim %r, so no weight's role is known: %s.", name, recipe.without_roles
        )
    kwargs = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **recipe.shared_options()}
    roles = None
    if model is not None:
        check_weights(model, takes_flat_pieces(recipe))
        roles = plan_roles(model, recipe)
        if is_first_process():
            explanation = explain_plan(roles, recipe)
            announce_state(name, explanation, _explaining_call(name, optim_args, target_modules))
            log_summary(explanation, recipe)
    return recipe.optimizer_cls, {**kwargs, "roles": roles}


def refuse_sharding(args: Any, what: str | None = None) -> None:
    """Raise ValueError if a run with these arguments cuts the weights into flat pieces, which have no rows and heads.

    FSDP2 does not, and is supported. DeepSpeed ZeRO does, and is supported where every entry is stepped by itself.

    Args:
        args: `TrainingArguments`, or the plain values of a command line that has not been launched yet.
        what: what needs whole weights, for the sentence; by default the `optim` of the arguments.
    """
    name = getattr(args.optim, "value", args.optim)
    for scheme, chosen in (("DeepSpeed", args.deepspeed), ("FSDP", args.fsdp), ("MEGATRON_LM", None)):
        variable = f"ACCELERATE_USE_{scheme.upper()}"
        asked = bool(chosen) or os.environ.get(variable, "").lower() in ("true", "1")
        if scheme == "FSDP" and _fsdp_version(chosen, getattr(args, "fsdp_config", None)) == 2:
            continue
        if not _shards(scheme, asked, bool(chosen), getattr(args, "distributed_state", None)):
            continue
        if scheme == "DeepSpeed" and what is None and takes_flat_pieces(recipe_for(name, args.optim_args)):
            refuse_other_optimizer(name, deepspeed_config(args))
            continue
        remedy = f"leave {scheme.lower()} out" if chosen else f"unset {variable}, which a launcher or a run has set"
        kind = "FSDP1" if scheme == "FSDP" else scheme
        others = "" if scheme != "DeepSpeed" or what else " ('lowmem_adamw' and 'signum' go with DeepSpeed)"
        raise ValueError(
            f"{what or f'optim={name!r}'} does not support {kind}, which cuts weights into pieces that have no rows "
            f"and heads: {remedy}, and train with FSDP2 (fsdp_version: 2), with DDP or in one process{others}."
        )


def takes_flat_pieces(recipe: Recipe) -> bool:
    """Return whether a recipe steps each entry alike in whatever piece of the weights it is.

    8-bit blocks follow rows, and a piece may mix embeddings with other weights.
    """
    bits = {recipe.state_bits, recipe.embedding_bits or recipe.state_bits}
    return recipe.optimizer_cls.takes_flat_pieces and len(bits) == 1 and 8 not in bits


def deepspeed_config(args: Any) -> Mapping[str, Any]:
    """Return the DeepSpeed configuration of a run, empty where it is not known yet."""
    plugin = getattr(args, "deepspeed_plugin", None)
    given = args.deepspeed if plugin is None else plugin.deepspeed_config
    if isinstance(given, str) and Path(given).is_file():
        given = json.loads(Path(given).read_text())
    return given if isinstance(given, Mapping) else {}


def refuse_other_optimizer(name: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError if DeepSpeed or accelerate would train with another optimizer than `name`, and say nothing."""
    if "optimizer" in config:
        raise ValueError(
            f"optim={name!r} would not be used, as the DeepSpeed configuration has an optimizer of its own: leave "
            "`optimizer` out of it."
        )
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"optim={name!r} would not be used, as accelerate replaces optimizers that DeepSpeed offloads by its CPU "
            "Adam: set zero_force_ds_cpu_optimizer to false in the DeepSpeed configuration."
        )


def _fsdp_version(chosen: Any, config: Any) -> int:
    """Return the version of FSDP that a run asks for: transformers' default is 2, and that of accelerate's launcher 1.

    Args:
        chosen: the argument `fsdp`.
        config: the argument `fsdp_config`: a dict, JSON, the path of a JSON file, or None.
    """
    if not chosen:
        return int(os.environ.get("FSDP_VERSION", "1"))
    if isinstance(config, str):
        with suppress(ValueError):  # transformers refuses what is no JSON
            config = json.loads(Path(config).read_text() if Path(config).is_file() else config)
    given = config if isinstance(config, Mapping) else {}
    return int(given.get("version", given.get("fsdp_version", 2)))


def refuse_to_save(model: nn.Module, args: Any) -> None:
    """Raise ValueError if the Trainer would save the optimizer state of one process alone.

    It does so where transformers has sharded the weights as it loaded them, without an FSDP plugin.
    """
    sharded = next((name for name, param in model.named_parameters() if is_sharded(param)), None)
    saves = getattr(args.save_strategy, "value", args.save_strategy) != "no" and not args.save_only_model
    if sharded and saves:
        raise ValueError(
            f"The weights of the model, such as {sharded!r}, were sharded as they were loaded, and of such a run the "
            "Trainer saves the optimizer state of one process alone: load the model without a DistributedConfig and "
            'train with fsdp=True, or set save_only_model=True or save_strategy="no".'
        )


def _shards(scheme: str, asked: bool, by_arguments: bool, state: Any) -> bool:
    """Return whether accelerate will shard the weights by this scheme.

    The environment variable alone does not decide: it stays set after an earlier run with FSDP, and a single process
    is not sharded except by DeepSpeed.

    Args:
        scheme: "DeepSpeed", "FSDP" or "MEGATRON_LM".
        asked: whether the arguments or the environment ask for the scheme.
        by_arguments: whether the arguments do.
        state: accelerate's state of this process, None if there is none yet.
    """
    if state is None:
        return by_arguments or (asked and "LOCAL_RANK" in os.environ)  # set in a launched process
    kind = state.distributed_type
    if kind == scheme.upper():
        return True
    if is_initialized() and kind != DistributedType.XLA:  # the Trainer's Accelerator has already decided
        return False
    return asked and (scheme == "DeepSpeed" or kind not in (DistributedType.NO, DistributedType.MULTI_CPU))


def check_weights(model: nn.Module, may_be_flat: bool) -> None:
    """Raise ValueError if a trained parameter of `model` is a flat piece of weights, such as FSDP1 makes.

    Args:
        may_be_flat: whether pieces of DeepSpeed ZeRO-3 are stepped as their weights are.
    """
    for name, param in model.named_parameters():
        if param.requires_grad:
            check_param(param)
            check_whole(param, name, may_be_flat)


def show_summary() -> None:
    """Show the summary by role, which has level INFO, in the log."""
    PACKAGE.setLevel(logging.INFO)


def announce_state(name: str, explanation: Explanation, details: str) -> None:
    """Log in one line the bytes of the optimizer's state, and those of torch's AdamW for the same weights."""
    if explanation.adamw_nbytes and explanation.numel:  # weights that ZeRO-3 has taken apart have no entries here
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
    """Return a line of Python that prints what each parameter gets."""
    if target_modules is not None:
        optim_args = {**read_optim_args(optim_args), "target_modules": target_modules}
    options = f", {optim_args!r}" if optim_args else ""
    return f'print(hf_lowmem.explain(model, "{name}"{options}))'


def log_summary(explanation: Explanation, recipe: Recipe) -> None:
    """Log what each role gets, and warn of options that have no effect and of matrices with an unknown role."""
    logger.info("Optimizer state by role:\n%s", explanation.by_role())
    if explanation.caution and not logger.isEnabledFor(logging.INFO):  # the summary contains it
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
