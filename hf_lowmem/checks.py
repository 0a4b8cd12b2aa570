"""The checks of parameter groups, each of which names what is wrong in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

Group = Mapping[str, Any]


# The optimizers of this package do not have these flags of torch's, which change the steps or how they are taken.
TORCH_FLAGS = ("maximize", "amsgrad", "differentiable", "foreach", "fused", "nesterov")
SYNONYMS = {
    **{"learning_rate": "lr", "epsilon": "eps", "wd": "weight_decay", "beta": "betas"},
    **{"beta1": "betas", "beta2": "betas", "b1": "betas", "b2": "betas"},
}


def check_flags(group: Group, owner: str) -> None:
    """Raise ValueError for a flag of torch's optimizers that is on, as `owner` has none of them."""
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
    """Raise ValueError for a flag of torch's optimizers that is on, and for a key that looks like a misspelt option.

    All other keys are tags of the user's own.

    Args:
        group: a parameter group as it comes in.
        options: the options that a group may have.
        owner: the name of the optimizer class, for the sentence.
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
    """Return the option that `key` is a misspelling of, or None."""
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
