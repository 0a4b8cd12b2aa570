"""Which parameter has which role.

The evidence, strongest first, is: the name of an adapter, a norm or a bias; identity with the model's input or output
embedding; the type of the parameter's module, which gives the axes; and the module's exact name inside its attention
or MLP block. A substring of the full path is never evidence, and a weight that is not recognised is `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from hf_lowmem.names import canonical_name
from hf_lowmem.roles.matrices import assign_matrix, assign_stacked_experts, is_router
from hf_lowmem.roles.module_names import MLP_NAMES, POSITION_NAMES, RELATIVE_BIAS_NAMES, TOKEN_NAMES
from hf_lowmem.roles.module_path import INNER, ModulePath, unwrap
from hf_lowmem.roles.param_role import MakeRole, ParamRole

_ADAPTER_LEAVES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude",
    "trainable_tokens_delta": "token_embedding",
}
_NORM_CLASS = re.compile(r"Norm(?![a-z])")
_HYPER_CONNECTION = re.compile(r"Hyper(Connection|Head)$")
_STACKED_LINEAR = re.compile(r"(ParallelExperts|FlexibleLinear)$")  # weights (stack, fan_out, fan_in)


def assign_roles(model: nn.Module) -> list[tuple[nn.Parameter, ParamRole]]:
    """Return the role of every parameter, trainable or not, in the order of `named_parameters`.

    A tied parameter appears once, under its first name. Only shapes are read, so the model may be on the meta device.
    """
    # Vision towers return convolutions or patch projections as their inputs, which are not embeddings of tokens.
    inputs = _weights_from(model, "get_input_embeddings", (nn.Embedding,))
    outputs = _weights_from(model, "get_output_embeddings", (nn.Embedding, nn.Linear))
    # A weight that is both is an embedding, so the inputs come last.
    identity = dict.fromkeys(outputs, "lm_head") | dict.fromkeys(inputs, "token_embedding")
    tied = inputs & outputs
    roles = ((param, _assign(model, name, param, identity)) for name, param in model.named_parameters())
    return [(p, replace(role, tied=id(p) in tied and role.role == "token_embedding")) for p, role in roles]


def _weights_from(model: nn.Module, getter: str, types: tuple[type[nn.Module], ...]) -> set[int]:
    """Return the ids of the weights of all modules of `types` that a `getter` of the model or a submodule returns."""
    found = set()
    for module in model.modules():
        try:
            returned = getattr(module, getter)()
        except Exception:  # the method is missing, or does not apply to this model
            continue
        found |= {id(candidate.weight) for candidate in unwrap(returned) if isinstance(candidate, types)}
    return found


def _assign(model: nn.Module, name: str, param: nn.Parameter, identity: dict[int, str]) -> ParamRole:
    """Return the role of one parameter from the first evidence that is found."""
    *names, leaf = name.split(".")
    path = ModulePath.follow(model, names)
    module, module_name = path.module, path.name
    make_role = partial(ParamRole, canonical_name(name), tuple(param.shape))
    by_row = partial(make_role, fan_out=0, fan_in=tuple(range(1, param.ndim)))

    if leaf == "bias" or (leaf.endswith("_bias") and leaf != "dt_bias"):
        return make_role("bias", expert_axis=0 if _has_axes(param) else None, why="leaf name")
    for part in (*names, leaf):
        if part in _ADAPTER_LEAVES:
            return _assign_adapter(_ADAPTER_LEAVES[part], path, make_role, by_row)
    if _in_peft_adapter(model, (*names, leaf)):
        return make_role("adapter", why="declared by PEFT")
    if _NORM_CLASS.search(type(module).__name__):
        return make_role("norm", why=f"in {type(module).__name__}")
    if param.ndim <= 1:
        return make_role("vector", why="at most one axis")
    if id(param) in identity:
        return by_row(identity[id(param)], why="the model's own input or output embedding")
    if module is None:
        return make_role("unknown", why="its name leads to no module")
    if {module_name, leaf} & RELATIVE_BIAS_NAMES:
        return make_role("relative_bias", why="exact name")
    if isinstance(module, nn.Embedding):
        return by_row(_embedding_role(module_name, module), why=f"nn.Embedding named {module_name}")
    if isinstance(module, _ConvNd) and leaf == "weight":
        return _assign_conv(module, param.ndim, make_role, by_row)
    if param.ndim == 3 and leaf in MLP_NAMES:
        return assign_stacked_experts(path, leaf, param, make_role)
    if leaf == "A_log":
        return make_role("ssm", why="leaf name")
    if leaf == "mm_input_projection_weight":
        return make_role("projection", fan_out=1, fan_in=(0,), why="leaf name")
    if param.ndim == 3 and leaf == "weight" and _STACKED_LINEAR.search(type(module).__name__):
        return assign_matrix(path, param, partial(make_role, expert_axis=0), fan_out=1)
    if isinstance(module, nn.MultiheadAttention):
        return assign_matrix(path.child(leaf.removesuffix("_weight"), module), param, make_role, fan_out=0)
    if leaf == "weight" and (isinstance(module, nn.Linear) or _declares_its_features(module, tuple(param.shape))):
        return assign_matrix(path, param, make_role, fan_out=0)
    if leaf == "weight" and _is_transformers_conv1d(module):
        return assign_matrix(path, param, make_role, fan_out=1)
    if leaf == "weight" and param.ndim == 2 and is_router(path, param.shape[0]):
        return by_row("router", why=f"named {module_name}")
    if leaf in ("fn", "hc_fn") and param.ndim == 2 and _HYPER_CONNECTION.search(type(module).__name__):
        return by_row("projection", why=f"in {type(module).__name__}")
    if not _has_axes(param):
        return make_role("vector", why="one axis longer than 1")
    return make_role("unknown", why=f"raw parameter of {type(module).__name__}")


def _has_axes(param: Tensor) -> bool:
    """Return whether more than one axis is longer than 1."""
    return sum(size != 1 for size in param.shape) > 1


def _assign_adapter(role: str, path: ModulePath, make_role: MakeRole, by_row: MakeRole) -> ParamRole:
    if role == "lora_magnitude":
        return make_role(role, why="adapter leaf")
    if any(type(module).__name__ == "ParamWrapper" for _, module in path.modules):
        return make_role(role, why="adapter of stacked experts, which are flattened into its rank")
    if role == "lora_embedding_A":
        return make_role(role, fan_out=1, fan_in=(0,), why="adapter leaf")
    return by_row(role, why="adapter leaf")


def _in_peft_adapter(model: nn.Module, names: Sequence[str]) -> bool:
    """Return whether a tuner layer of PEFT on the path declares the next name as an adapter, or a soft prompt."""
    module: Any = model
    for name in names:
        if name in getattr(module, "adapter_layer_names", ()) and name not in INNER:
            return True
        if name == "prompt_encoder" and hasattr(module, "peft_config"):
            return True
        module = getattr(module, name, None)
    return False


def _embedding_role(name: str, embedding: nn.Embedding) -> str:
    if name in POSITION_NAMES or "Position" in type(embedding).__name__:
        return "position_embedding"
    return "token_embedding" if name in TOKEN_NAMES else "embedding"


def _assign_conv(conv: _ConvNd, ndim: int, make_role: MakeRole, by_row: MakeRole) -> ParamRole:
    if conv.groups != 1:
        return make_role("conv", why="grouped convolution")
    if conv.transposed:
        return make_role("conv", fan_out=1, fan_in=(0, *range(2, ndim)), why="transposed convolution")
    if conv.stride == conv.kernel_size and max(conv.kernel_size) > 1:
        return by_row("patch_conv", why="stride equals kernel")
    return by_row("conv", why="convolution")


def _declares_its_features(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a linear layer that is not an nn.Linear has attributes that say (out_features, in_features)."""
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return type(module).__name__.endswith("Linear") and shape == features


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf") and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
