"""What every parameter of a model is: its role, which axes are fan_in and fan_out, and the parts of fused weights.

The evidence, strongest first: adapter leaves, norms and biases, identity with the model's input and output embeddings,
the owner module's type (which gives the axes), then the owner's exact name inside its attention or MLP block. A
substring of the full path is never evidence, and what is not recognised is `unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from hf_lowmem.fused_layouts import Part, gate_up_parts, key_value_parts, qkv_parts
from hf_lowmem.names import canonical_name

__all__ = ["ROLES", "ParamRole", "Part", "assign_roles", "canonical_name"]

ROLES = {
    "attention_query": "query projection; head_dim rows per head",
    "attention_key": "key projection; head_dim rows per head",
    "attention_value": "value projection",
    "attention_output": "projection of the concatenated heads back to the residual stream",
    "attention_qkv": "query, key and value fused; parts say which rows are which",
    "attention_key_value": "key and value fused (MLA kv_b_proj, cross-attention of GPT-2)",
    "attention_down": "MLA projection down to the latent (q_a_proj, kv_a_proj_with_mqa)",
    "mlp_up": "MLP input projection, or the linear half of a gated MLP",
    "mlp_gate": "the half of a gated MLP that goes through the activation",
    "mlp_gate_up": "gate and up fused; parts say which rows are which",
    "mlp_down": "MLP output projection",
    "router": "scores of the experts",
    "token_embedding": "one row per token, also where it is tied to the head",
    "position_embedding": "one row per position",
    "embedding": "any other nn.Embedding (token types)",
    "lm_head": "one row per token, not tied",
    "classifier": "classification, regression, pooling and value heads",
    "ssm": "matrices of a state-space, gated linear-attention or gated short-convolution mixer, and A_log",
    "projection": "other linear maps of the body: between towers or widths, gates of an attention's output",
    "conv": "general convolution; no axes where it is grouped or depthwise",
    "patch_conv": "convolution whose stride is its kernel: a Linear over patches",
    "norm": "scale of a normalisation layer",
    "bias": "bias of any rank",
    "vector": "any other tensor of at most one axis (sinks, D, dt_bias)",
    "relative_bias": "table of relative position biases, one column per head",
    "lora_A": "LoRA factor (rank, fan_in)",
    "lora_B": "LoRA factor (fan_out, rank)",
    "lora_embedding_A": "LoRA factor (rank, vocab) of an embedding",
    "lora_embedding_B": "LoRA factor (dim, rank) of an embedding",
    "lora_magnitude": "DoRA magnitudes",
    "adapter": "any other trained part of a PEFT method (AdaLoRA's lora_E, IA3, LoHa, LoKr, OFT, soft prompts)",
    "unknown": "not recognised; keeps its axes where the module type gives them",
}


@dataclass(frozen=True)
class ParamRole:
    """The role of one parameter.

    `fan_out` is the output-feature axis, `fan_in` the input-feature axes; both are None / empty where the parameter
    has no such axes (vectors, unknown tensors). An embedding (vocab, dim) has its token axis as fan_out.
    `expert_axis` is the axis of stacked experts (of their biases too), never averaged over. `head_dim` is the number
    of consecutive fan_out entries of one attention head (queries and keys only; in a fused weight, within the query
    and key parts).
    `tied` marks an input embedding that is the output embedding too.
    `why` says in a few words what the role was read from.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    fan_out: int | None = None
    fan_in: tuple[int, ...] = ()
    expert_axis: int | None = None
    head_dim: int | None = None
    parts: tuple[Part, ...] = ()
    tied: bool = False
    why: str = ""


def assign_roles(model: nn.Module) -> list[tuple[nn.Parameter, ParamRole]]:
    """The role of every parameter, trainable or not, in `named_parameters` order; a tied one once, by its first name.

    Shapes are read and values are not, so a model on the meta device will do.
    """
    identity = _embeddings_by_identity(model)
    tied = _weights_answering(model, "get_input_embeddings", (nn.Embedding,))
    tied &= _weights_answering(model, "get_output_embeddings", (nn.Embedding, nn.Linear))
    roles = ((param, _assign(model, name, param, identity)) for name, param in model.named_parameters())
    return [(p, replace(role, tied=id(p) in tied and role.role == "token_embedding")) for p, role in roles]


_ADAPTER_LEAVES = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude",
    "trainable_tokens_delta": "token_embedding",
}
_ATTENTION_NAMES = {
    **dict.fromkeys(
        ("q_proj", "q", "query", "q_lin", "query_proj", "wq", "Wq", "q_attn", "q_b_proj"), "attention_query"
    ),
    **dict.fromkeys(("k_proj", "k", "key", "k_lin", "key_proj", "wk", "Wk"), "attention_key"),
    **dict.fromkeys(("v_proj", "v", "value", "v_lin", "value_proj", "wv", "Wv"), "attention_value"),
    **dict.fromkeys(("o_proj", "out_lin"), "attention_output"),
    **dict.fromkeys(("qkv_proj", "Wqkv", "qkv", "query_key_value", "c_attn", "att_proj"), "attention_qkv"),
    **dict.fromkeys(("kv_b_proj", "kv_proj", "kv"), "attention_key_value"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj", "kv_a_proj_with_mqa"), "attention_down"),
}
_MLP_NAMES = {
    **dict.fromkeys(("up_proj", "fc1", "c_fc", "fc_in", "wi", "wi_1", "lin1", "linear1", "w3"), "mlp_up"),
    **dict.fromkeys(("dense_h_to_4h", "ffn", "pwconv1", "pointwise_conv1", "linear_fc1", "ffw_layer_1"), "mlp_up"),
    **{"linear_up": "mlp_up", "proj_up": "mlp_up", "proj_up_gate": "mlp_gate", "proj_down": "mlp_down"},
    **dict.fromkeys(("gate_proj", "wi_0", "w1"), "mlp_gate"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "lin2", "linear2", "w2"), "mlp_down"),
    **dict.fromkeys(("dense_4h_to_h", "ffn_output", "pwconv2", "pointwise_conv2"), "mlp_down"),
    **dict.fromkeys(("linear_fc2", "ffw_layer_2", "linear_down"), "mlp_down"),
    **dict.fromkeys(("gate_up_proj", "Wi"), "mlp_gate_up"),
}
_PROJECTIONS = {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection", "embedding_projection"}
_PROJECTIONS |= {"altup_projections", "altup_unembed_projections", "correction_coefs", "prediction_coefs"}  # Gemma 3n
_PROJECTIONS |= {"linear_left", "linear_right", "input_proj_linear", "input_projections"}
_PROJECTIONS |= {"linear_start", "linear_end", "pointwise_lin1", "pointwise_lin2"}  # of a Conformer's convolution
# Names that mean something only inside a block of that kind.
_BLOCK_NAMES = {
    "attention": {
        **dict.fromkeys(("q_head", "linear_q", "project_q", "to_q", "query_global", "wq_b"), "attention_query"),
        **dict.fromkeys(("layout_query", "w2e_query", "e2w_query", "e2e_query"), "attention_query"),
        **dict.fromkeys(("k_head", "linear_k", "project_k", "to_k", "key_global", "layout_key"), "attention_key"),
        **dict.fromkeys(("linear_pos", "pos_proj", "relative_k_proj"), "attention_key"),  # keys of positions
        **dict.fromkeys(
            ("v_head", "linear_v", "project_v", "to_v", "value_global", "layout_value"), "attention_value"
        ),
        **{f"projection_{part}": f"attention_{part}" for part in ("query", "key", "value")},
        **dict.fromkeys(("out_proj", "dense", "proj", "c_proj", "o", "wo", "Wo", "output_proj"), "attention_output"),
        **dict.fromkeys(
            ("linear_out", "post_proj", "post", "attention_out", "o_b_proj", "to_out"), "attention_output"
        ),
        **dict.fromkeys(("projection", "projection_layer", "output", "output_linear"), "attention_output"),
        **dict.fromkeys(("in_proj", "queries_keys_values"), "attention_qkv"),
        **dict.fromkeys(("to_kv", "keys_values"), "attention_key_value"),
        **dict.fromkeys(("gate_proj", "g_proj", "q_gate_proj", "o_a_proj", "weights_proj"), "projection"),
        "input_linear": "attention_query",
    },
    "mlp": {
        **dict.fromkeys(("intermediate_dense", "dense1", "linear_1", "layer_1", "intermediate"), "mlp_up"),
        **dict.fromkeys(("proj_in", "in_proj", "input_linear", "w_1"), "mlp_up"),
        **dict.fromkeys(("c_proj", "wo", "Wo", "down", "output_dense", "dense2", "linear_2", "layer_2"), "mlp_down"),
        **dict.fromkeys(("output", "proj_out", "out_proj", "output_linear", "w_out"), "mlp_down"),
        **{"up": "mlp_up", "gate": "mlp_gate", "w_0": "mlp_gate"},
    },
    "mlp_input": {"dense": "mlp_up"},
    "mlp_output": {"dense": "mlp_down"},
}
# How a block's own attribute name, or its class name, ends.
_BLOCKS = {
    "attention": re.compile(r"((attn|attention)|(?-i:MoA))$", re.I),
    "mlp": re.compile(r"(mlp|^ff|ffn|feed_?forward|actdense|densereludense|moe|experts?)$", re.I),
    "mlp_input": re.compile(r"intermediate$", re.I),
    "mlp_output": re.compile(r"(?<!Self)(?<!Attention)Output$"),
    "router": re.compile(r"^router$|(Router|Gating)$"),
    "projection": re.compile(r"(projector|merger|merging|connector|aligner|feature_?projection)$", re.I),
    "patch": re.compile(r"patch_?embed(ding|der)?s?$", re.I),
    "head": re.compile(r"^(pooler|classifier|classification_head|v_head|head)$|(Pooler|Head|HeadTransform)$"),
}
_HEAD_NAMES = {"score", "classifier", "qa_outputs", "pre_classifier", "seq_relationship", "summary"}
_HEAD_NAMES |= {"pooler", "v_head", "head"}
_TOKEN_NAMES = {"wte", "embed_tokens", "word_embeddings", "tok_embeddings", "token_embedding"}
_POSITION_NAMES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed"}
_RELATIVE_NAMES = {"relative_attention_bias", "relative_position_bias_table"}
_ROUTER_NAMES = {"gate", "router", "shared_expert_gate", "modality_router"}
_MAX_ROUTER_OUTPUTS = 512
_NORM_CLASS = re.compile(r"Norm(?![a-z])")
_HYPER_CONNECTION = re.compile(r"Hyper(Connection|Head)$")
_STACKED_LINEAR = re.compile(r"(ParallelExperts|FlexibleLinear)$")  # weights (stack, fan_out, fan_in)
_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
# Children that stand for their parent: they take its name, and the parent is forgotten.
_INNER = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_INNER |= {"base_layer", "original_module", "modules_to_save", "token_adapter"}

_Owners = list[tuple[str, nn.Module]]
_Found = Callable[..., ParamRole]  # ParamRole with the name, the shape and perhaps the axes filled in


def _assign(model: nn.Module, name: str, param: nn.Parameter, identity: dict[int, str]) -> ParamRole:
    *path, leaf = name.split(".")
    owners = _owners(model, path)
    owner_name, owner = owners[-1] if owners else ("", None)
    found = partial(ParamRole, canonical_name(name), tuple(param.shape))
    by_row = partial(found, fan_out=0, fan_in=tuple(range(1, param.ndim)))

    if leaf == "bias" or (leaf.endswith("_bias") and leaf != "dt_bias"):
        return found("bias", expert_axis=0 if _has_axes(param) else None, why="leaf name")
    for segment in (*path, leaf):
        if segment in _ADAPTER_LEAVES:
            return _assign_adapter(_ADAPTER_LEAVES[segment], owners, found, by_row)
    if _in_peft_adapter(model, (*path, leaf)):
        return found("adapter", why="PEFT says so")
    if _NORM_CLASS.search(type(owner).__name__):
        return found("norm", why=f"in {type(owner).__name__}")
    if param.ndim <= 1:
        return found("vector", why="at most one axis")
    if id(param) in identity:
        return by_row(identity[id(param)], why="the model's own input or output embedding")
    if owner is None:
        return found("unknown", why="its name leads to no module")
    if {owner_name, leaf} & _RELATIVE_NAMES:
        return found("relative_bias", why="exact name")
    if isinstance(owner, nn.Embedding):
        return by_row(_embedding_role(owner_name, owner), why=f"nn.Embedding named {owner_name}")
    if isinstance(owner, _ConvNd) and leaf == "weight":
        return _assign_conv(owner, param.ndim, found, by_row)
    if param.ndim == 3 and leaf in _MLP_NAMES:
        return _assign_stacked_experts(owners, leaf, param, found)
    if leaf == "A_log":
        return found("ssm", why="leaf name")
    if leaf == "mm_input_projection_weight":
        return found("projection", fan_out=1, fan_in=(0,), why="leaf name")
    if param.ndim == 3 and leaf == "weight" and _STACKED_LINEAR.search(type(owner).__name__):
        return _assign_matrix(owners, param, partial(found, expert_axis=0), fan_out=1)
    if isinstance(owner, nn.MultiheadAttention):
        owners = [*owners, (leaf.removesuffix("_weight"), owner)]
        return _assign_matrix(owners, param, found, fan_out=0)
    if leaf == "weight" and (isinstance(owner, nn.Linear) or _names_its_features(owner, tuple(param.shape))):
        return _assign_matrix(owners, param, found, fan_out=0)
    if leaf == "weight" and _is_transformers_conv1d(owner):
        return _assign_matrix(owners, param, found, fan_out=1)
    if leaf == "weight" and param.ndim == 2 and _is_router(owners, param.shape[0]):
        return by_row("router", why=f"named {owner_name}")
    if leaf in ("fn", "hc_fn") and param.ndim == 2 and _HYPER_CONNECTION.search(type(owner).__name__):
        return by_row("projection", why=f"in {type(owner).__name__}")
    if not _has_axes(param):
        return found("vector", why="one axis longer than 1")
    return found("unknown", why=f"raw parameter of {type(owner).__name__}")


def _has_axes(param: Tensor) -> bool:
    """Whether more than one axis is longer than 1."""
    return sum(size != 1 for size in param.shape) > 1


def _assign_adapter(role: str, owners: _Owners, found: _Found, by_row: _Found) -> ParamRole:
    if role == "lora_magnitude":
        return found(role, why="adapter leaf")
    if any(type(module).__name__ == "ParamWrapper" for _, module in owners):
        return found(role, why="adapter of stacked experts, which are flattened into its rank")
    if role == "lora_embedding_A":
        return found(role, fan_out=1, fan_in=(0,), why="adapter leaf")
    return by_row(role, why="adapter leaf")


def _in_peft_adapter(model: nn.Module, path: Sequence[str]) -> bool:
    """Whether a tuner layer of PEFT on the path names what follows as its adapter's, or the path is a soft prompt."""
    module: Any = model
    for segment in path:
        if segment in getattr(module, "adapter_layer_names", ()) and segment not in _INNER:
            return True
        if segment == "prompt_encoder" and hasattr(module, "peft_config"):
            return True
        module = getattr(module, segment, None)
    return False


def _assign_conv(conv: _ConvNd, ndim: int, found: _Found, by_row: _Found) -> ParamRole:
    if conv.groups != 1:
        return found("conv", why="grouped convolution")
    if conv.transposed:
        return found("conv", fan_out=1, fan_in=(0, *range(2, ndim)), why="transposed convolution")
    if conv.stride == conv.kernel_size and max(conv.kernel_size) > 1:
        return by_row("patch_conv", why="stride equals kernel")
    return by_row("conv", why="convolution")


def _assign_stacked_experts(owners: _Owners, leaf: str, param: nn.Parameter, found: _Found) -> ParamRole:
    """Experts (expert, fan_out, fan_in), or (expert, fan_in, fan_out) where the module stores them transposed."""
    experts, role = owners[-1][1], _MLP_NAMES[leaf]
    transposed = _experts_transposed(experts)
    if transposed is None:
        return found("unknown", expert_axis=0, why="stacked experts of unknown orientation")
    fan_out, fan_in = (2, 1) if transposed else (1, 2)
    parts: tuple[Part, ...] = ()
    why = "stacked experts"
    if role == "mlp_gate_up":
        parts = gate_up_parts(experts, _model_type(owners), param.shape[fan_out])
        why += "" if parts else ", layout unknown"
    return found(role, fan_out=fan_out, fan_in=(fan_in,), expert_axis=0, parts=parts, why=why)


def _assign_matrix(owners: _Owners, param: nn.Parameter, found: _Found, fan_out: int) -> ParamRole:
    rows, fan_in = param.shape[fan_out], 2 if param.ndim == 3 else 1 - fan_out
    role, why = _matrix_role(owners, rows)
    parent = owners[-2][1] if len(owners) > 1 else owners[-1][1]
    head_dim: int | None = None
    parts: tuple[Part, ...] = ()
    if role == "mlp_up" and rows == 2 * _inputs_of_down(parent, fan_in - param.ndim):
        role = "mlp_gate_up"
    if role in ("attention_query", "attention_key", "attention_qkv", "attention_key_value") and param.ndim == 2:
        head_dim = _head_dim(owners, role, rows)
    if role == "attention_qkv":
        parts = qkv_parts(parent, _model_type(owners), rows, head_dim)
    elif role == "attention_key_value":
        parts = key_value_parts(parent, _model_type(owners), rows)
    elif role == "mlp_gate_up":
        parts = gate_up_parts(parent, _model_type(owners), rows)
    if role in ("attention_qkv", "attention_key_value", "mlp_gate_up") and not parts:
        why += ", layout unknown"
    heads = [part.stop - part.start for part in parts if part.role != "attention_value"] or [rows]
    if head_dim and any(size % head_dim for size in heads):
        head_dim = None
    return found(role, fan_out=fan_out, fan_in=(fan_in,), head_dim=head_dim, parts=parts, why=why)


def _matrix_role(owners: _Owners, rows: int) -> tuple[str, str]:
    """The role of a Linear by its exact name and the nearest block around it, and what it was read from."""
    name = owners[-1][0]
    block = _block(owners)
    why = f"{name} in {block}" if block else f"named {name}"
    if any("A_log" in module._parameters for _, module in owners[-2:-1]):
        return "ssm", f"{name} beside A_log"
    if name == "c_attn" and getattr(owners[-2][1], "is_cross_attention", False):
        return "attention_key_value", "c_attn of a cross-attention"
    if _is_router(owners, rows):
        return "router", why
    names = dict(_BLOCK_NAMES.get(block, {}))
    if block != "mlp":  # RWKV's feed_forward has a key and a value too
        names |= _ATTENTION_NAMES
    if block != "attention":
        names |= _MLP_NAMES
    role = names.get(name) or _role_in_sequential(owners)
    if role is None and name in ("lm_head", "lm_heads"):
        role = "lm_head"
    if role is None and (name in _HEAD_NAMES or block == "head"):
        role = "classifier"
    if role is None and (name in _PROJECTIONS or block == "projection"):
        role = "projection"
    if role is None and (block == "patch" or _BLOCKS["patch"].search(name)):
        role = "patch_conv"
    if role is None and name in ("in_proj", "out_proj") and _has_depthwise_conv(owners[-2][1]):
        return "ssm", f"{name} beside a depthwise convolution"
    return (role, why) if role else ("unknown", f"{why}: not a known name")


def _role_in_sequential(owners: _Owners) -> str | None:
    """The role of one of the two Linear of an `nn.Sequential` that is called an MLP and applies them in turn."""
    (name, module), (_, linear) = (("", None), *owners)[-2:]
    if not isinstance(module, nn.Sequential) or not _BLOCKS["mlp"].search(name):
        return None
    linears = [child for child in module if isinstance(child, nn.Linear)]
    if len(linears) != 2 or any(list(child.children()) for child in module):
        return None
    return "mlp_up" if linear is linears[0] else "mlp_down"


def _inputs_of_down(mlp: nn.Module, fan_in: int) -> int:
    """The inputs of the MLP output projection among a module's children, 0 if there is none."""
    for name, child in mlp.named_children():
        if (_BLOCK_NAMES["mlp"] | _MLP_NAMES).get(name) == "mlp_down":
            return next((p.shape[fan_in] for p in child.parameters() if p.ndim > 1), 0)
    return 0


def _has_depthwise_conv(module: nn.Module) -> bool:
    return any(isinstance(conv, _ConvNd) and 1 < conv.groups == conv.in_channels for conv in module.children())


def _names_its_features(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a linear layer that is no nn.Linear says itself that its weight is (out_features, in_features)."""
    features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return type(module).__name__.endswith("Linear") and shape == features


def _embedding_role(name: str, embedding: nn.Embedding) -> str:
    if name in _POSITION_NAMES or "Position" in type(embedding).__name__:
        return "position_embedding"
    return "token_embedding" if name in _TOKEN_NAMES else "embedding"


def _is_router(owners: _Owners, outputs: int) -> bool:
    beside = owners[-2][1]._modules if len(owners) > 1 else {}
    named = owners[-1][0] in _ROUTER_NAMES or _block(owners) == "router"
    return named and outputs <= _MAX_ROUTER_OUTPUTS and "up" not in beside  # a gate beside an up is a SwiGLU


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return hasattr(module, "nf") and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def _experts_transposed(experts: nn.Module) -> bool | None:
    """Whether stacked experts are stored (expert, fan_in, fan_out): their own flag, else where hidden_size lies."""
    flag = getattr(experts, "is_transposed", None)
    if flag is not None:
        return bool(flag)
    hidden = getattr(experts, "hidden_size", None) or getattr(experts, "hidden_dim", None)
    for leaf, param in experts.named_parameters(recurse=False):
        if leaf in _MLP_NAMES and param.ndim == 3 and (param.shape[1] == hidden) != (param.shape[2] == hidden):
            return (param.shape[1] == hidden) != (_MLP_NAMES[leaf] == "mlp_down")
    return None


def _head_dim(owners: _Owners, role: str, rows: int) -> int | None:
    names = ("qk_nope_head_dim", *_HEAD_DIMS) if role == "attention_key_value" else _HEAD_DIMS
    for _, module in _layer(owners):
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int) and value > 0:
                return value
    config = _config(owners)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    given: int | None = getattr(config, "head_dim", None) or getattr(config, "d_head", None)
    if given or not (hidden and heads):
        return given
    fits = rows == hidden if role == "attention_query" else role != "attention_key" or rows <= hidden
    return hidden // heads if fits else None


def _block(owners: _Owners) -> str:
    """The kind of the nearest block around a module, "" if there is none in its layer."""
    return next((kind for name, module in _layer(owners) if (kind := _block_of(name, module))), "")


def _block_of(name: str, module: nn.Module) -> str:
    """The kind of block that a module is by its own attribute name or class name, "" if it is none."""
    cls = type(module).__name__
    return next((kind for kind, ending in _BLOCKS.items() if ending.search(name) or ending.search(cls)), "")


def _layer(owners: _Owners) -> Iterator[tuple[str, nn.Module]]:
    """The modules around the last one, nearest first, out to the numbered layer that holds it."""
    for name, module in reversed(owners[:-1]):
        yield name, module
        if name.isdigit():
            return


def _config(owners: _Owners) -> Any:
    configs = (getattr(module, "config", None) for _, module in reversed(owners))
    return next((config for config in configs if isinstance(getattr(config, "model_type", None), str)), None)


def _model_type(owners: _Owners) -> str:
    return getattr(_config(owners), "model_type", "")


def _owners(model: nn.Module, path: list[str]) -> _Owners:
    """The named modules from the model down to a parameter's owner, wrappers replaced by what they wrap.

    None at all where the path leads nowhere, as where a module gives its parameters names of its own.
    """
    module: Any = model
    owners, previous = [("", model)], ""
    for segment in path:
        module = getattr(module, segment, None)
        if not isinstance(module, nn.Module):
            return []
        if segment in _INNER or previous == "modules_to_save":
            owners[-1] = (owners[-1][0], module)
        else:
            owners.append((segment, module))
        previous = segment
    return _without_inner_linear(owners)


def _without_inner_linear(owners: _Owners) -> _Owners:
    """A module takes the name of what holds it: of a wrapper whose one linear layer is called `linear`, or of a list.

    So `q_proj.linear` is a q_proj, and `altup_projections.0` an altup_projections. What is a block is no wrapper.
    """
    if len(owners) < 3:
        return owners
    (outer_name, outer), (name, module) = owners[-2:]
    linears = [child for child in outer.children() if isinstance(child, nn.Linear)]
    wraps = name == "linear" and (not linears or linears == [module]) and not _block_of(outer_name, outer)
    if wraps or (name.isdigit() and isinstance(outer, nn.ModuleList)):
        return [*owners[:-2], (outer_name, module)]
    return owners


def _embeddings_by_identity(model: nn.Module) -> dict[int, str]:
    """The id of every weight that the model or one of its submodules calls its input or output embedding."""
    outputs = _weights_answering(model, "get_output_embeddings", (nn.Embedding, nn.Linear))
    # Inputs last: a tied weight is an embedding. Vision towers return convolutions or patch projections: no tokens.
    inputs = _weights_answering(model, "get_input_embeddings", (nn.Embedding,))
    return dict.fromkeys(outputs, "lm_head") | dict.fromkeys(inputs, "token_embedding")


def _weights_answering(model: nn.Module, getter: str, types: tuple[type[nn.Module], ...]) -> set[int]:
    """The ids of the weights of all modules of `types` that some submodule's `getter` returns."""
    found = set()
    for module in model.modules():
        try:
            answer = getattr(module, getter)()
        except Exception:  # no such method, or one that does not apply to this model
            continue
        found |= {id(candidate.weight) for candidate in _unwrap(answer) if isinstance(candidate, types)}
    return found


def _unwrap(module: Any) -> Iterator[nn.Module]:
    """A module and everything that it only wraps (every copy of PEFT's modules_to_save)."""
    if isinstance(module, nn.Module):
        yield module
        for name, child in module.named_children():
            if name in _INNER or isinstance(module, nn.ModuleDict):
                yield from _unwrap(child)
