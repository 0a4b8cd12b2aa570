"""Bad input, told in one sentence: hyperparameters, parameters, and checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lowmem.codecs import BLOCK_SIZES, STATE_BITS
from hf_lowmem.state import KAHAN_COMP, TensorSpec

Group = Mapping[str, Any]
LEAST = {
    **dict.fromkeys(("min_8bit_size", "rounding_seed"), 0),
    **dict.fromkeys(("rows_per_block", "rank", "update_interval", "reproject_factor"), 1),
    **dict.fromkeys(("precondition_frequency", "max_precond_dim"), 1),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "state_bits": STATE_BITS,
    "block_size": BLOCK_SIZES,
    "restore_state": (False, True, "reference"),
    "eq5_scale": ("none", "rms"),
    "align": ("sign", "none", "procrustes"),
    "proj_bits": (None, 32, 16),
    "sides": ("one", "both"),
    "rounding": ("nearest", "stochastic", "kahan"),
    "offload_state": (False, True),
    "compile": (False, True),
    "fused_clip": (False, True),
    "capturable": (False, True),
}


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Check the hyperparameters and options present in `values`, each by itself."""
    for name in ("lr", "eps", "weight_decay"):
        if name in values and not 0.0 <= values[name] < float("inf"):
            raise ValueError(f"{name}={values[name]} is not a finite number of at least 0.")
    betas = values.get("betas", ())
    if "betas" in values and (len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas)):
        raise ValueError(f"betas={betas} must be two numbers, each at least 0 and below 1.")
    if not 0 <= (values.get("shampoo_beta") or 0) < 1:
        raise ValueError(f"shampoo_beta={values['shampoo_beta']} must be at least 0 and below 1.")
    for name in ("scale", "clip_threshold"):
        if name in values and not 0 < values[name] < float("inf"):
            raise ValueError(f"{name}={values[name]} must be a finite number above 0.")
    if "decay_rate" in values and not float("-inf") < values["decay_rate"] < 0:
        raise ValueError(f"decay_rate={values['decay_rate']} must be a finite number below 0.")
    for name in ("rank_ratio", "conv_rank_ratio"):
        if values.get(name) is not None and not 1 <= values[name] < float("inf"):
            raise ValueError(f"{name}={values[name]} must be at least 1: it is the smaller side over the rank.")
    for name, least in LEAST.items():
        value = values.get(name)
        unset = name not in values or (name == "rank" and value is None)
        if not unset and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
    for name, legal in CHOICES.items():
        if name in values and values[name] not in legal:
            raise ValueError(f"{name}={values[name]!r} is not supported: use one of {', '.join(map(str, legal))}.")


def check_one_rank(values: Mapping[str, Any]) -> None:
    if values.get("rank") is not None and values.get("rank_ratio") is not None:
        raise ValueError(
            f"rank={values['rank']} and rank_ratio={values['rank_ratio']} both set the rank: give one of them."
        )


def check_param(param: Tensor) -> None:
    if param.is_complex():
        raise ValueError(
            f"Complex parameters are not supported (shape {tuple(param.shape)}, {param.dtype}): "
            "train torch.view_as_real of it, or give it to another optimizer."
        )


def check_capturable(group: Group, projects: bool) -> None:
    """Refuse `capturable` where a step needs the host: to change a basis, compile, or bring state back."""
    others = [option for option in ("compile", "offload_state") if group[option]]
    if group["capturable"] and (projects or others):
        reason = f"{others[0]}=true" if others else "an optimizer that projects, whose bases change on a schedule"
        raise ValueError(f"capturable=true does not go with {reason}: leave one of them out.")


def check_unsharded(param: Tensor) -> None:
    if hasattr(param, "placements"):
        raise ValueError(
            f"Sharded parameters (DTensor, shape {tuple(param.shape)}) are not supported yet: "
            "train with DDP or in one process."
        )


def check_groups(current: Sequence[Group], saved: Sequence[Group], layout_options: Iterable[str]) -> None:
    """Refuse a checkpoint whose groups were made by another algorithm, other rules or another model."""
    algorithm = current[0]["algorithm"]
    written_by = {group.get("algorithm", "another optimizer") for group in saved} or {"another optimizer"}
    if written_by != {algorithm}:
        raise ValueError(
            f"The checkpoint's optimizer state was written by {', '.join(sorted(written_by))}, not by {algorithm}: "
            "resume with the same optim name, or without the checkpoint's optimizer state."
        )
    hint = "resume with the same model, optim name, optim_args, rules and target modules as the checkpoint"
    for number, (mine, theirs) in enumerate(zip(current, saved, strict=False)):
        for option in layout_options:
            if theirs.get(option) != mine[option]:
                found, expected = theirs.get(option), mine[option]
                raise ValueError(f"Checkpoint group {number} has {option}={found!r}, expected {expected!r}: {hint}.")
        names, saved_names = mine.get("param_names"), theirs.get("param_names")
        if names and saved_names and names != saved_names:
            differing = sorted(set(names) ^ set(saved_names)) or list(names)
            raise ValueError(
                f"Checkpoint group {number} holds other parameters, {differing[0]!r} among the differing ones: {hint}."
            )
        if len(mine["params"]) != len(theirs["params"]):
            raise ValueError(
                f"Checkpoint group {number} holds {len(theirs['params'])} parameters, expected {len(mine['params'])}: "
                f"{hint}."
            )
    if len(current) != len(saved):
        raise ValueError(f"The checkpoint has {len(saved)} parameter groups, expected {len(current)}: {hint}.")


def check_state(saved: Mapping[str, Any], specs: Mapping[str, TensorSpec], shape: tuple[int, ...]) -> None:
    """Refuse saved state that is not laid out as declared for a parameter of `shape`."""
    hint = "Resume with the same optim name, rules and state_bits."
    if set(saved) - {KAHAN_COMP} != set(specs) - {KAHAN_COMP}:
        raise ValueError(
            f"Checkpoint state of a parameter of shape {shape} has {sorted(saved)}, expected {sorted(specs)}. {hint}"
        )
    for name, spec in specs.items():
        if name not in saved:
            continue
        found = (tuple(saved[name].shape), saved[name].dtype)
        if found != (spec.shape, spec.dtype):
            raise ValueError(
                f"Checkpoint state {name!r} has shape {found[0]} and {found[1]}, expected {spec.shape} and "
                f"{spec.dtype}. {hint}"
            )
