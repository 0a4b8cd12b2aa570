"""Models on the meta device, built from a config alone. A mistake in the config is reported in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_lowmem.trainer.names import nearest


def meta_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Build the model that a config describes, without allocating memory.

    Args:
        name: a local folder, a config.json, or a hub id.
        dtype: the dtype of the weights.

    Raises:
        ValueError: there is no such model, or transformers cannot build it from its config.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = _config_in(path)
    if path.is_file():
        _check_config(path)
        name = str(path)
    elif _is_path(name):
        raise ValueError(f"there is no folder or file {name!r}.")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # a config of another version, or the hub, may fail in any way
        if path.is_file():
            raise _unusable(name, error) from error
        raise ValueError(f"{name!r} is neither a folder here nor a model in the cache or on the hub.") from error
    model_cls = _architecture(config, name)
    try:
        with torch.device("meta"):
            model: nn.Module = model_cls(config)
    except Exception as error:
        raise _unusable(name, error) from error
    return model.to(dtype)


def _is_path(name: str) -> bool:
    """Return whether this can only be a path, because hub ids have the form `model` or `owner/model`."""
    return name.startswith((".", "/", "~")) or name.endswith((".json", "/")) or name.count("/") > 1


def _config_in(folder: Path) -> Path:
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    if config.is_file():
        return config
    if not adapter.is_file():
        raise ValueError(f"the folder {str(folder)!r} holds no config.json, so it is not a model's.")
    base = _read(adapter).get("base_model_name_or_path")
    raise ValueError(
        f"the folder {str(folder)!r} holds adapters only: inspect the model that they belong to"
        f"{f', {base!r}' if base else ''}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # the file is not JSON, or not even text
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, not {type(content).__name__}.")
    return content


def _check_config(path: Path) -> None:
    """Raise ValueError for a mistake that transformers would report at length, or ignore."""
    content = _read(path)
    kind, known = content.get("model_type"), list(transformers.CONFIG_MAPPING)
    if kind is None:
        raise ValueError(f"{str(path)!r} has no model_type, so it is not the config of a transformers model.")
    if kind not in known:
        own = "the model has its own code, which is not run here" if "auto_map" in content else ""
        raise ValueError(
            f"{str(path)!r} has the model_type {kind!r}, which transformers {transformers.__version__} does not know "
            f"({own or 'the nearest: ' + ', '.join(nearest(str(kind), known))})."
        )


def _architecture(config: Any, name: str) -> Any:
    """Return what builds the model: the class that the config names, or else the language model or the base model."""
    for architecture in config.architectures or ():
        if isinstance(found := getattr(transformers, architecture, None), type):
            return found
    if config.architectures:
        raise ValueError(
            f"{name!r} has the architecture {config.architectures[0]!r}, which transformers "
            f"{transformers.__version__} does not know."
        )
    language = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return (transformers.AutoModelForCausalLM if language else transformers.AutoModel).from_config


def _unusable(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ValueError(f"transformers cannot build a model from {name!r}: {reason[:300]}.")
