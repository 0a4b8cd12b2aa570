"""Bad input, told in one sentence: hyperparameters, groups, parameters, and what a step finds of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hf_lowmem.codecs import BLOCK_SIZES, STATE_BITS
from hf_lowmem.dense import densified, is_dense, is_plain, is_stored
from hf_lowmem.state import TensorSpec

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


def check_param(param: Tensor) -> None:
    """Refuse a parameter whose entries no optimizer of this package can step."""
    if is_lazy(param):
        raise ValueError("A lazy parameter has no shape yet: take one forward pass before the optimizer is built.")
    if param.is_complex():
        raise ValueError(
            f"Complex parameters are not supported (shape {tuple(param.shape)}, {param.dtype}): "
            "train torch.view_as_real of it, or give it to another optimizer."
        )
    if param.is_floating_point() and param.itemsize < 2:
        raise ValueError(
            f"Parameters of {param.dtype} are not supported (shape {tuple(param.shape)}): train them in bfloat16 or "
            "float16, or give them to another optimizer."
        )
    if param.layout is not torch.strided:
        raise ValueError(
            f"Parameters of layout {param.layout} are not supported (shape {tuple(param.shape)}): "
            "train a dense copy of it, or give it to another optimizer."
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


def check_grad(param: Tensor, grad: Tensor, device: torch.device, owner: str) -> Tensor:
    """The gradient of a weight on `device`, as a dense copy where its storage does not hold its entries as they are.

    Raises:
        RuntimeError: the gradient is sparse, has another shape or device than the weight, or has lost its storage.
    """
    if is_dense(grad) and grad.shape == param.shape and grad.device == device:
        return grad
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{owner} does not support sparse gradients (parameter of shape {tuple(param.shape)}): "
            "use sparse=False in the embedding."
        )
    if grad.shape != param.shape or grad.device != device:
        raise RuntimeError(
            f"A gradient of shape {tuple(grad.shape)} on {grad.device} does not fit its weight of shape "
            f"{tuple(param.shape)} on {device}, which has been replaced since the backward pass: call "
            "optimizer.zero_grad() and take a new backward pass."
        )
    if is_plain(grad) and not is_stored(grad):
        raise RuntimeError(
            f"The storage of a gradient of shape {tuple(grad.shape)} has been freed or cut: call "
            "optimizer.zero_grad() and take a new backward pass."
        )
    return densified(grad)


def check_stored(param: Tensor, state: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], name: str) -> None:
    """Refuse state that is not laid out as declared for the weight as it is now.

    Raises:
        RuntimeError: the weight or its state has changed its shape, dtype, strides or device since it was made.
    """
    for key, spec in specs.items():
        tensor = state.get(key)
        if not isinstance(tensor, Tensor) or tensor.shape != spec.shape:
            found = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"is {tensor!r}"
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)}, but its optimizer state {key!r} {found} where {spec.shape} "
                "is expected: if the weight was resized, call optimizer.resize_state() before the next step."
            )
        place = spec.place(param.device)
        if tensor.dtype != spec.dtype or tensor.device != place or not tensor.is_contiguous() or not is_dense(tensor):
            raise RuntimeError(
                f"The optimizer state {key!r} of {name} is {tensor.dtype} on {tensor.device} with strides "
                f"{tensor.stride()}, expected contiguous {spec.dtype} on {place}: load it with load_state_dict, and "
                "do not replace it."
            )


def check_capturable(group: Group, projects: bool) -> None:
    """Refuse `capturable` where a step needs the host: to change a basis, compile, or bring state back."""
    others = [option for option in ("compile", "offload_state") if group[option]]
    if group["capturable"] and (projects or others):
        reason = f"{others[0]}=true" if others else "an optimizer that projects, whose bases change on a schedule"
        raise ValueError(f"capturable=true does not go with {reason}: leave one of them out.")


# These attributes and class names mark a parameter as a piece of weights, so that no scheme need be imported.
PIECES = {
    "placements": "a DTensor",
    "_fsdp_flattened": "of FSDP1",
    "_is_flat_param": "of FSDP1",
    "ds_id": "of DeepSpeed ZeRO-3",
    "FlatParameter": "a flat parameter",
    "ShardedTensor": "a ShardedTensor",
}


def check_whole(param: Tensor, name: str = "") -> None:
    """Refuse a piece of a weight, or several weights in one vector: the rows and heads that state follows are gone.

    Args:
        name: the parameter's, for the sentence.
    """
    classes = {cls.__name__ for cls in type(param).__mro__}
    for mark, scheme in PIECES.items():
        if mark in classes or hasattr(param, mark):
            which = f"parameter {name!r}" if name else "parameter"
            raise ValueError(
                f"Sharded weights are not supported yet: the {which} of shape {tuple(param.shape)} is {scheme}; "
                "train with DDP or in one process."
            )
