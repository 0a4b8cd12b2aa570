"""The roles of matrices: linear layers, fused weights, routers and stacked experts."""

from __future__ import annotations

import torch.nn as nn
from torch.nn.modules.conv import _ConvNd

from hf_lowmem.roles.fused_layouts import FusedPart, gate_up_parts, key_value_parts, qkv_parts
from hf_lowmem.roles.module_names import (
    ATTENTION_NAMES,
    BLOCK_NAMES,
    HEAD_NAMES,
    MLP_NAMES,
    PROJECTION_NAMES,
    ROUTER_NAMES,
    block_kind,
)
from hf_lowmem.roles.module_path import ModulePath
from hf_lowmem.roles.param_role import MakeRole, ParamRole

_MAX_ROUTER_OUTPUTS = 512
_FUSED = ("attention_qkv", "attention_key_value", "mlp_gate_up")


def assign_matrix(path: ModulePath, param: nn.Parameter, make_role: MakeRole, fan_out: int) -> ParamRole:
    """Return the role of the weight of a linear layer whose output features lie along the axis `fan_out`."""
    rows, fan_in = param.shape[fan_out], 2 if param.ndim == 3 else 1 - fan_out
    role, why = _linear_role(path, rows)
    head_dim: int | None = None
    if role == "mlp_up" and rows == 2 * _inputs_of_down(path.parent, fan_in - param.ndim):
        role = "mlp_gate_up"
    if role in ("attention_query", "attention_key", "attention_qkv", "attention_key_value") and param.ndim == 2:
        head_dim = path.head_dim(role, rows)
    parts = _fused_parts(path, role, rows, head_dim)
    if role in _FUSED and not parts:
        why += ", layout unknown"
    sizes = [part.stop - part.start for part in parts if part.role != "attention_value"] or [rows]
    if head_dim and any(size % head_dim for size in sizes):
        head_dim = None
    return make_role(role, fan_out=fan_out, fan_in=(fan_in,), head_dim=head_dim, parts=parts, why=why)


def assign_stacked_experts(path: ModulePath, leaf: str, param: nn.Parameter, make_role: MakeRole) -> ParamRole:
    """Return the role of experts (expert, fan_out, fan_in), or (expert, fan_in, fan_out) where they are transposed."""
    experts, role = path.module, MLP_NAMES[leaf]
    assert experts is not None
    transposed = _experts_transposed(experts)
    if transposed is None:
        return make_role("unknown", expert_axis=0, why="stacked experts of unknown orientation")
    fan_out, fan_in = (2, 1) if transposed else (1, 2)
    parts: tuple[FusedPart, ...] = ()
    why = "stacked experts"
    if role == "mlp_gate_up":
        parts = gate_up_parts(experts, path.model_type, param.shape[fan_out])
        why += "" if parts else ", layout unknown"
    return make_role(role, fan_out=fan_out, fan_in=(fan_in,), expert_axis=0, parts=parts, why=why)


def is_router(path: ModulePath, outputs: int) -> bool:
    """Return whether a linear layer scores experts; a gate beside an up projection is half of a SwiGLU instead."""
    named = path.name in ROUTER_NAMES or path.block == "router"
    return named and outputs <= _MAX_ROUTER_OUTPUTS and "up" not in path.parent._modules


def _linear_role(path: ModulePath, rows: int) -> tuple[str, str]:
    """Return the role of a linear layer, read from its exact name and the block around it, and the evidence."""
    name, block, parent = path.name, path.block, path.parent
    why = f"{name} in {block}" if block else f"named {name}"
    if "A_log" in parent._parameters:
        return "ssm", f"{name} beside A_log"
    if name == "c_attn" and getattr(parent, "is_cross_attention", False):
        return "attention_key_value", "c_attn of a cross-attention"
    if is_router(path, rows):
        return "router", why
    names = dict(BLOCK_NAMES.get(block, {}))
    if block != "mlp":  # the feed_forward of RWKV has a key and a value, too
        names |= ATTENTION_NAMES
    if block != "attention":
        names |= MLP_NAMES
    role = names.get(name) or _role_in_sequential(path)
    if role is None and name in ("lm_head", "lm_heads"):
        role = "lm_head"
    if role is None and (name in HEAD_NAMES or block == "head"):
        role = "classifier"
    if role is None and (name in PROJECTION_NAMES or block == "projection"):
        role = "projection"
    if role is None and "patch" in (block, block_kind(name)):
        role = "patch_conv"
    if role is None and name in ("in_proj", "out_proj") and _has_depthwise_conv(parent):
        return "ssm", f"{name} beside a depthwise convolution"
    return (role, why) if role else ("unknown", f"{why}: not a known name")


def _role_in_sequential(path: ModulePath) -> str | None:
    """Return the role of one of the two linear layers of an nn.Sequential whose name is that of an MLP."""
    if len(path.modules) < 2:
        return None
    name, module = path.modules[-2]
    if not isinstance(module, nn.Sequential) or block_kind(name) != "mlp":
        return None
    linears = [child for child in module if isinstance(child, nn.Linear)]
    if len(linears) != 2 or any(list(child.children()) for child in module):
        return None
    return "mlp_up" if path.module is linears[0] else "mlp_down"


def _fused_parts(path: ModulePath, role: str, rows: int, head_dim: int | None) -> tuple[FusedPart, ...]:
    if role == "attention_qkv":
        return qkv_parts(path.parent, path.model_type, rows, head_dim)
    if role == "attention_key_value":
        return key_value_parts(path.parent, path.model_type, rows)
    if role == "mlp_gate_up":
        return gate_up_parts(path.parent, path.model_type, rows)
    return ()


def _inputs_of_down(mlp: nn.Module, fan_in: int) -> int:
    """Return the number of inputs of the down projection among a module's children, or 0 if there is none."""
    for name, child in mlp.named_children():
        if (BLOCK_NAMES["mlp"] | MLP_NAMES).get(name) == "mlp_down":
            return next((p.shape[fan_in] for p in child.parameters() if p.ndim > 1), 0)
    return 0


def _has_depthwise_conv(module: nn.Module) -> bool:
    return any(isinstance(conv, _ConvNd) and 1 < conv.groups == conv.in_channels for conv in module.children())


def _experts_transposed(experts: nn.Module) -> bool | None:
    """Return whether experts are stored as (expert, fan_in, fan_out), None if neither a flag nor hidden_size tells."""
    flag = getattr(experts, "is_transposed", None)
    if flag is not None:
        return bool(flag)
    hidden = getattr(experts, "hidden_size", None) or getattr(experts, "hidden_dim", None)
    for leaf, param in experts.named_parameters(recurse=False):
        if leaf in MLP_NAMES and param.ndim == 3 and (param.shape[1] == hidden) != (param.shape[2] == hidden):
            return (param.shape[1] == hidden) != (MLP_NAMES[leaf] == "mlp_down")
    return None
