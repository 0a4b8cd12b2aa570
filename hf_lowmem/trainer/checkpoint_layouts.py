"""The layouts of the Trainer's checkpoints, and the way from any of them to any other.

- `single`: `optimizer.pt` beside the weights of `save_pretrained`, as one process and DDP write it;
- `full_state_dict` and `sharded_state_dict`: what accelerate writes under FSDP2, one file or one folder each for the
  weights and the optimizer, in which the state is by the names of the weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save

from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.trainer.build import build_optimizer
from hf_lowmem.trainer.meta_model import meta_model

SINGLE, FULL, SHARDED = "single", "full_state_dict", "sharded_state_dict"
LAYOUTS = (SINGLE, FULL, SHARDED)
OPTIMIZER = {SINGLE: "optimizer.pt", FULL: "optimizer.bin", SHARDED: "optimizer_0"}
MODEL = {FULL: "pytorch_model_fsdp.bin", SHARDED: "pytorch_model_fsdp_0"}
State = dict[str, Any]


def layout_of(folder: str | os.PathLike[str]) -> str | None:
    """Return the layout of a checkpoint, or None if it holds no optimizer state of a layout known here."""
    return next((layout for layout, name in OPTIMIZER.items() if (Path(folder) / name).exists()), None)


def refuse_other_layout(folder: str | os.PathLike[str], wanted: str) -> None:
    """Raise ValueError if a run cannot read the layout of the checkpoint that it is to resume from.

    Args:
        folder: the checkpoint.
        wanted: the layout that the run writes itself.
    """
    found = layout_of(folder)
    if found not in (None, wanted):
        raise ValueError(
            f"The checkpoint {os.fspath(folder)!r} has the layout {found}, and this run reads {wanted}: "
            f"`hf-lowmem convert {os.fspath(folder)} --to {wanted} --output FOLDER` writes one that it resumes from."
        )


def optim_of(saved: Mapping[str, Any], source: Path) -> str:
    """Return the optim name of the run that wrote an optimizer's state dict.

    Raises:
        ValueError: it was not an optim of this package.
    """
    algorithms = {group.get("algorithm") for group in saved["param_groups"]}
    if len(algorithms) != 1 or None in algorithms:
        raise ValueError(f"The optimizer state in {source} was not written by an optim of this package.")
    coded = any(key.endswith("_absmax") for state in saved["state"].values() for key in state)
    return f"{algorithms.pop()}_8bit" if coded else str(algorithms.pop())


def saved_optimizer(folder: Path) -> State:
    """Return the optimizer's state dict of a checkpoint in any layout; `single` has numbers in place of names.

    Raises:
        ValueError: the checkpoint holds none.
    """
    layout = layout_of(folder)
    if layout is None:
        raise ValueError(f"{folder} holds no {', '.join(OPTIMIZER.values())}: there is nothing to convert.")
    return _read(folder / OPTIMIZER[layout], "optimizer")


def saved_model(folder: Path, config: str | None = None) -> nn.Module:
    """Return the model of a checkpoint in any layout, in the dtype of its weights.

    Args:
        folder: the checkpoint.
        config: a folder or hub id that has the model's configuration, if the checkpoint has none.

    Raises:
        ValueError: there is no configuration, or its model has other weights.
    """
    described = config or str(folder)
    if config is None and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json: name the model's folder or hub id with --model (an adapter's checkpoint "
            "cannot be converted)."
        )
    model = meta_model(described, torch.float32)
    layout = layout_of(folder)
    if layout in (None, SINGLE):
        whole: nn.Module = type(model).from_pretrained(folder, config=model.config, dtype="auto")  # type: ignore[attr-defined]
        return whole
    weights = _read(folder / MODEL[str(layout)], "model")
    missing = sorted(model.state_dict().keys() ^ weights.keys())
    if missing:
        raise ValueError(f"The weights in {folder} are not those of {described}: {missing[0]!r} is in one of the two.")
    model.load_state_dict(weights, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model


def convert_layout(
    source: Path, output: Path, layout: str, config: str | None, optim: str | None, optim_args: str | None
) -> None:
    """Write a copy of a checkpoint in another layout, with the same bits.

    Args:
        source: a checkpoint of a run with an optimizer of this package whose weights were trained as a whole.
        output: a new folder.
        layout: one of `LAYOUTS`.
        config: a folder or hub id that has the model's configuration, if the checkpoint has none.
        optim: the optim name of the run; None reads it from the checkpoint.
        optim_args: the `optim_args` of the run.

    Raises:
        ValueError: the checkpoint has this layout already, or is not one of a model and optimizer known here.
    """
    found, saved = layout_of(source), saved_optimizer(source)
    if found == layout:
        raise ValueError(f"{source} has the layout {layout} already.")
    model = saved_model(source, config)
    optimizer = _optimizer_of(model, saved, found != SINGLE, optim or optim_of(saved, source), optim_args)
    replaced = {*OPTIMIZER.values(), *MODEL.values(), *(path.name for path in source.glob("*.safetensors*"))}
    shutil.copytree(source, output, ignore=lambda folder, names: replaced & set(names))
    if layout == SHARDED:
        model.config.save_pretrained(output)  # type: ignore[union-attr, operator]
    else:
        model.save_pretrained(output)  # type: ignore[operator]
    _write(output, layout, model, optimizer)


def _optimizer_of(
    model: nn.Module, saved: State, by_name: bool, optim: str, optim_args: str | None
) -> LowMemOptimizer:
    """Return an optimizer of the model with the saved state; weights that it does not list were frozen."""
    if by_name:
        trained = {name for group in saved["param_groups"] for name in group["params"]}
        for name, param in model.named_parameters():
            param.requires_grad_(name in trained)
    optimizer = build_optimizer(model, optim, lr=0.0, optim_args=optim_args)
    if by_name:
        set_optimizer_state_dict(model, optimizer, saved)
    else:
        optimizer.load_state_dict(saved)
    return optimizer


def _write(folder: Path, layout: str, model: nn.Module, optimizer: LowMemOptimizer) -> None:
    if layout == SINGLE:
        torch.save(optimizer.state_dict(), folder / OPTIMIZER[layout])
        return
    contents = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    for kind, names in (("model", MODEL), ("optimizer", OPTIMIZER)):
        path = folder / names[layout]
        if layout == FULL:
            torch.save(contents[kind], path)
        else:
            save({kind: contents[kind]}, checkpoint_id=path, no_dist=True)


def _read(path: Path, kind: str) -> State:
    """Return what torch or torch.distributed.checkpoint has written, whole and on the CPU."""
    if path.is_file():
        found: State = torch.load(path, map_location="cpu", weights_only=True)
        return found
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(path, whole)
        read: State = torch.load(whole, weights_only=True)
    return read[kind]  # type: ignore[no-any-return]
