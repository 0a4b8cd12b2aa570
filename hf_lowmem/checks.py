"""The checks of hyperparameters, options and parameter groups, each of which names what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from hf_lowmem.codecs import BLOCK_SIZES, STATE_BITS

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
    lr = values.get("lr")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")  # torch's own words
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


# Flags of torch's optimizers that this package's do not have; True would change the steps, or how they are taken.
TORCH_FLAGS = ("maximize", "amsgrad", "differentiable", "foreach", "fused", "nesterov")
SYNONYMS = {
    **{"learning_rate": "lr", "epsilon": "eps", "wd": "weight_decay", "beta": "betas"},
    **{"beta1": "betas", "beta2": "betas", "b1": "betas", "b2": "betas"},
}


def check_flags(group: Group, owner: str) -> None:
    """Refuse flags of torch's optimizers that are on, as `owner` has none of them."""
    for flag in TORCH_FLAGS:
        if group.get(flag):
            raise ValueError(
                f"A parameter group has {flag}={group[flag]}, which {owner} does not support: leave it out."
            )
    if group.get("decoupled_weight_decay") is False:
        raise ValueError(
            f"A parameter group has decoupled_weight_decay=False, but {owner} decouples weight decay as AdamW does: "
            "leave it out of the group."
        )


def check_group_keys(group: Group, options: Iterable[str], owner: str) -> None:
    """Refuse flags of torch's optimizers that are on, and keys that look like a misspelt option.

    All other keys are the user's own tags.

    Args:
        group: a parameter group as it comes in.
        options: the options that a group may have.
        owner: the optimizer's name for the message.
    """
    check_flags(group, owner)
    known = set(options)
    for key in group:
        own = key in known or key in ("params", "param_names")
        meant = None if own else nearest_option(str(key), known)
        if meant:
            raise ValueError(
                f"A parameter group has {key}={group[key]!r}, which is no option of {owner}, though {meant!r} is: "
                f"write {meant}=..., or give a tag of your own another name."
            )


def nearest_option(key: str, options: Iterable[str]) -> str | None:
    """The option that `key` is a misspelling of, or None."""
    bare = {option.replace("_", ""): option for option in options}
    word = "".join(letter for letter in key.lower() if letter.isalnum())
    if word in bare:
        return bare[word]
    if SYNONYMS.get(key.lower()) in bare.values():
        return SYNONYMS[key.lower()]
    for option in bare.values():
        if len(option) >= 4 and len(key) >= 4 and one_edit_apart(key.lower(), option):
            return option
    close = get_close_matches(key.lower(), [option for option in bare.values() if len(option) >= 8], n=1, cutoff=0.9)
    return close[0] if close else None


def one_edit_apart(a: str, b: str) -> bool:
    """Return whether adding, dropping or changing one letter, or swapping two, turns `a` into `b`."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    end = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[: len(a) - end], b[: len(b) - end]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])
