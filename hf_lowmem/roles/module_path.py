"""The modules from a model down to the one that holds a parameter, without the wrappers of PEFT, FSDP and others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from hf_lowmem.roles.module_names import block_kind

# The attributes under which a wrapper holds what it wraps. The child takes the name of the wrapper.
INNER = {
    *("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"),
    *("base_layer", "original_module", "modules_to_save", "token_adapter"),
}
_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")

NamedModule = tuple[str, nn.Module]


@dataclass(frozen=True)
class ModulePath:
    """The named modules from the model, whose name is "", down to the module that holds a parameter.

    The path is empty where the parameter's name leads to no module, as when a module gives its parameters names of its
    own.
    """

    modules: tuple[NamedModule, ...]

    @classmethod
    def follow(cls, model: nn.Module, names: Sequence[str]) -> ModulePath:
        """Follow the attribute names from the model, replacing wrappers by what they wrap."""
        module: Any = model
        found, previous = [("", model)], ""
        for name in names:
            module = getattr(module, name, None)
            if not isinstance(module, nn.Module):
                return cls(())
            if name in INNER or previous == "modules_to_save":
                found[-1] = (found[-1][0], module)
            else:
                found.append((name, module))
            previous = name
        return cls(tuple(_without_inner_linear(found)))

    def child(self, name: str, module: nn.Module) -> ModulePath:
        """Return the path that goes on to a child of the last module."""
        return ModulePath((*self.modules, (name, module)))

    @property
    def name(self) -> str:
        """Return the attribute name of the last module."""
        return self.modules[-1][0] if self.modules else ""

    @property
    def module(self) -> nn.Module | None:
        """Return the last module, which holds the parameter."""
        return self.modules[-1][1] if self.modules else None

    @property
    def parent(self) -> nn.Module:
        """Return the module around the last one, or the model itself if there is none."""
        return self.modules[max(len(self.modules) - 2, 0)][1]

    @property
    def block(self) -> str:
        """Return the kind of the nearest block around the last module in its layer, "" if there is none."""
        return next((kind for name, module in self._in_layer() if (kind := block_kind(name, module))), "")

    @property
    def model_type(self) -> str:
        """Return the `model_type` of the nearest config, "" if there is none."""
        return getattr(self._config(), "model_type", "")

    def head_dim(self, role: str, rows: int) -> int | None:
        """Return the number of rows per attention head of a weight with this role, None if it is not known."""
        names = ("qk_nope_head_dim", *_HEAD_DIMS) if role == "attention_key_value" else _HEAD_DIMS
        for _, module in self._in_layer():
            for name in names:
                value = getattr(module, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        config = self._config()
        hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        given: int | None = getattr(config, "head_dim", None) or getattr(config, "d_head", None)
        if given or not (hidden and heads):
            return given
        fits = rows == hidden if role == "attention_query" else role != "attention_key" or rows <= hidden
        return hidden // heads if fits else None

    def _in_layer(self) -> Iterator[NamedModule]:
        """Yield the modules around the last one, nearest first, up to the numbered layer that holds it."""
        for name, module in reversed(self.modules[:-1]):
            yield name, module
            if name.isdigit():
                return

    def _config(self) -> Any:
        configs = (getattr(module, "config", None) for _, module in reversed(self.modules))
        return next((config for config in configs if isinstance(getattr(config, "model_type", None), str)), None)


def _without_inner_linear(modules: list[NamedModule]) -> list[NamedModule]:
    """Drop a module around the last one if it only wraps it, and give the last one its name.

    A wrapper is a module, but not a block, whose only linear layer is called `linear`, or a list: `q_proj.linear` is a
    q_proj, and `altup_projections.0` is an altup_projections.
    """
    if len(modules) < 3:
        return modules
    (outer_name, outer), (name, module) = modules[-2:]
    linears = [child for child in outer.children() if isinstance(child, nn.Linear)]
    wraps = name == "linear" and (not linears or linears == [module]) and not block_kind(outer_name, outer)
    if wraps or (name.isdigit() and isinstance(outer, nn.ModuleList)):
        return [*modules[:-2], (outer_name, module)]
    return modules


def unwrap(module: Any) -> Iterator[nn.Module]:
    """Yield a module and all modules that it only wraps, such as every copy in PEFT's modules_to_save."""
    if isinstance(module, nn.Module):
        yield module
        for name, child in module.named_children():
            if name in INNER or isinstance(module, nn.ModuleDict):
                yield from unwrap(child)
