"""What is compared before a step writes anything: parameters, weights, gradients and stored state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hf_lowmem.dense import densified, is_dense, is_plain, is_stored
from hf_lowmem.sharding import is_sharded, local
from hf_lowmem.state import TensorSpec
from hf_lowmem.state_place import StatePlace

# These attributes and class names mark a parameter as a piece of weights, so that no scheme need be imported.
PIECES = {
    "_fsdp_flattened": "of FSDP1",
    "_is_flat_param": "of FSDP1",
    "ds_id": "of DeepSpeed ZeRO-3",
    "FlatParameter": "a flat parameter",
    "ShardedTensor": "a ShardedTensor",
}


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


def check_whole(param: Tensor, name: str = "", may_be_flat: bool = False) -> None:
    """Refuse a flat piece of weights: the rows and heads that state follows are gone. A DTensor has them.

    Args:
        name: the parameter's, for the sentence.
        may_be_flat: whether pieces of DeepSpeed ZeRO-3 are stepped as their weights are.
    """
    classes = {cls.__name__ for cls in type(param).__mro__}
    for mark, scheme in PIECES.items():
        if may_be_flat and mark == "ds_id":
            continue
        if mark in classes or hasattr(param, mark):
            which = f"parameter {name!r}" if name else "parameter"
            raise ValueError(
                f"Flat pieces of weights have no rows and heads: the {which} of shape {tuple(param.shape)} is "
                f"{scheme}; train with FSDP2 (fully_shard), with DDP or in one process."
            )


def check_capturable(group: Mapping[str, Any], projects: bool) -> None:
    """Refuse `capturable` where a step needs the host: to change a basis, compile, or bring state back."""
    others = [option for option in ("compile", "offload_state") if group[option]]
    if group["capturable"] and (projects or others):
        reason = f"{others[0]}=true" if others else "an optimizer that projects, whose bases change on a schedule"
        raise ValueError(f"capturable=true does not go with {reason}: leave one of them out.")


def check_weight(param: Tensor, name: str, known_shape: torch.Size | None, may_be_flat: bool = False) -> None:
    """Refuse a weight that cannot be stepped as it is now.

    Args:
        name: the parameter's, "" if it is not known.
        known_shape: the shape that its state was made for, if it was compared before.
        may_be_flat: as in `check_whole`.

    Raises:
        ValueError: it is a flat piece of weights.
        RuntimeError: it has another shape, is not of floats, cannot be written, or does not store each of its entries.
    """
    check_whole(param, name, may_be_flat)
    which = f"{name or 'A parameter'} of shape {tuple(param.shape)}"
    if known_shape is not None and known_shape != param.shape:
        raise RuntimeError(
            f"{name or 'A parameter'} has shape {tuple(param.shape)}, but its optimizer state was made for "
            f"{tuple(known_shape)}: if the weight was resized, call optimizer.resize_state() before the next step."
        )
    if not param.is_floating_point():
        raise RuntimeError(f"{which} is {param.dtype}: only floats can be stepped.")
    param = local(param)
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{which} is an inference tensor, which cannot be updated outside of torch.inference_mode(): train a "
            "clone of it."
        )
    if is_plain(param) and not is_dense(param):
        raise RuntimeError(f"{which} has no storage that holds all of its entries as they are: train a plain tensor.")
    if is_plain(param) and torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            f"{which} has entries that share memory, as those of an expanded tensor do: train a clone of it."
        )


def check_grad(param: Tensor, grad: Tensor, device: torch.device, owner: str) -> Tensor:
    """Return the gradient of a weight, as a dense copy where its storage does not hold its entries as they are.

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


def check_stored(
    param: Tensor, state: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], place: StatePlace, name: str
) -> None:
    """Refuse state that is not laid out as declared for the weight as it is now, or not cut as the weight is.

    Raises:
        RuntimeError: the weight or its state has changed its shape, dtype, strides or device since it was made.
    """
    for key, spec in specs.items():
        tensor = state.get(key)
        stored, shape = local(tensor), place.shape(spec)
        if not isinstance(tensor, Tensor) or tensor.shape != spec.shape or stored.shape != shape:
            found = f"has shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"is {tensor!r}"
            cut = "" if shape == spec.shape else f", of which this process holds {shape},"
            remedy = "if the weight was resized, call optimizer.resize_state() before the next step"
            if is_sharded(param):
                remedy = "shard the model before its first step, or load the state of earlier steps by load_state_dict"
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)}, but its optimizer state {key!r} {found} where {spec.shape}"
                f"{cut} is expected: {remedy}."
            )
        device = spec.place(param.device)
        if stored.dtype != spec.dtype or stored.device != device or not (stored.is_contiguous() and is_dense(stored)):
            raise RuntimeError(
                f"The optimizer state {key!r} of {name} is {tensor.dtype} on {tensor.device} with strides "
                f"{tensor.stride()}, expected contiguous {spec.dtype} on {device}: load it with load_state_dict, and "
                "do not replace it."
            )


def check_sharded(group: Mapping[str, Any], name: str) -> None:
    """Refuse the options of a run that sharded weights do not have.

    Raises:
        ValueError: `compile`, `capturable` or `offload_state` is set.
    """
    remedies = {"offload_state": "let FSDP2 offload it (fsdp_offload_params, or CPUOffloadPolicy)"}
    for option in ("compile", "capturable", "offload_state"):
        if group[option]:
            raise ValueError(
                f"{option}=true does not go with sharded weights, such as {name}: "
                f"{remedies.get(option, 'leave it out')}."
            )


def check_released(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what does not go with steps in the backward pass.

    Raises:
        ValueError: `compile`, `capturable` or `offload_state` is set.
    """
    for option in ("compile", "capturable", "offload_state"):
        if any(group[option] for group in groups):
            raise ValueError(f"{option}=true does not go with release=true: leave one of them out.")
