"""The layouts of the Trainer's checkpoints, and the way from any of them to any other.

- `single`: `optimizer.pt` beside the weights of `save_pretrained`, as one process and DDP write it;
- `full_state_dict` and `sharded_state_dict`: what accelerate writes under FSDP2, one file or one folder each for the
  weights and the optimizer, in which the state is by the names of the weights.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from hf_lowmem.adamw_state import ANEW
from hf_lowmem.algorithms import RECIPES
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.trainer.build import build_optimizer
from hf_lowmem.trainer.meta_model import meta_model
from hf_lowmem.trainer.names import ADAMW_NAMES

SINGLE, FULL, SHARDED = "single", "full_state_dict", "sharded_state_dict"
DEEPSPEED = "deepspeed"  # which is known, but not converted
LAYOUTS = (SINGLE, FULL, SHARDED)
OPTIMIZER = {SINGLE: "optimizer.pt", FULL: "optimizer.bin", SHARDED: "optimizer_0"}
MODEL = {FULL: "pytorch_model_fsdp.bin", SHARDED: "pytorch_model_fsdp_0"}
PRETRAINED = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
State = dict[str, Any]


def layout_of(folder: str | os.PathLike[str]) -> str | None:
    """Return the layout of a checkpoint, or None if it holds no optimizer state of a layout known here."""
    found = next((layout for layout, name in OPTIMIZER.items() if (Path(folder) / name).exists()), None)
    return DEEPSPEED if found is None and any(Path(folder).glob("global_step*")) else found


def refuse_other_layout(
    folder: str | os.PathLike[str], wanted: str, model: str | None = None, optim_args: Any = None
) -> None:
    """Raise ValueError if a run cannot read the layout of the checkpoint that it is to resume from.

    Args:
        folder: the checkpoint.
        wanted: the layout that the run writes itself.
        model: the folder or hub id of the run's model, for the command that converts the checkpoint.
        optim_args: the `optim_args` of the run.
    """
    found, path = layout_of(folder), os.fspath(folder)
    if found is None:
        refuse_other_weights(Path(folder), wanted)
    if found in (None, wanted):
        return
    differs = f"The checkpoint {path!r} has the layout {found}, and this run reads {wanted}"
    if DEEPSPEED in (found, wanted) or is_adapter(Path(folder)):
        which = "Checkpoints of adapters" if is_adapter(Path(folder)) else "Checkpoints of DeepSpeed"
        raise ValueError(f"{differs}. {which} are not converted: resume as the run that wrote it was launched.")
    command = ["hf-lowmem", "convert", path, "--to", wanted, "--output", "FOLDER"]
    if not (Path(folder) / "config.json").is_file():
        command += ["--model", model or "MODEL"]
    if optim_args:
        command += ["--optim-args", optim_args if isinstance(optim_args, str) else json.dumps(dict(optim_args))]
    raise ValueError(f"{differs}: `{shlex.join(command)}` writes one that it resumes from.")


def refuse_other_weights(folder: Path, wanted: str) -> None:
    """Raise ValueError if a checkpoint without an optimizer holds weights that a run of this layout cannot read."""
    name = MODEL.get(wanted)
    others = [other for other in MODEL.values() if other != name and (folder / other).exists()]
    pretrained = any(PRETRAINED.fullmatch(path.name) for path in folder.iterdir())
    if (name and pretrained and not (folder / name).exists()) or (others and not pretrained):
        raise ValueError(
            f"The checkpoint {os.fspath(folder)!r} holds a model alone, and not as {wanted}, which this run reads: "
            "load it as the model of a new run, or resume as the run that wrote it was launched."
        )


def refuse_ours(folder: str | os.PathLike[str], optim: str) -> None:
    """Raise ValueError if an optimizer of this package wrote the checkpoint that another one is to resume from.

    The message says how to convert the checkpoint, if that is possible.

    Args:
        folder: the folder of the checkpoint, in any layout.
        optim: the optim name of the run that is to resume, which is not one of ours.
    """
    layout = layout_of(folder)
    if layout not in OPTIMIZER:
        return
    path = Path(folder) / OPTIMIZER[layout]
    groups = _read(path, "optimizer", only="param_groups").get("param_groups", ())
    written_by = {group.get("algorithm") for group in groups} & set(RECIPES)
    if not written_by:
        return
    algorithm = written_by.pop()
    remedy = ANEW
    if RECIPES[algorithm].optimizer_cls.rule == "adamw" and optim in ADAMW_NAMES:
        command = f"hf-lowmem convert {folder} --to {optim} --output FOLDER"
        first = "" if layout == SINGLE else f"`hf-lowmem convert --to {SINGLE}` and then "
        remedy = f"{first}`{command}` writes one that it resumes from"
    raise ValueError(f"{path} was written by {algorithm}, whose state optim={optim!r} cannot read: {remedy}.")


def is_adapter(folder: Path) -> bool:
    """Return whether a checkpoint holds adapters without the model that they belong to."""
    return (folder / "adapter_config.json").is_file()


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
    if layout == DEEPSPEED:
        raise ValueError(f"{folder} was written under DeepSpeed, whose checkpoints are not converted.")
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
    if is_adapter(folder):
        raise ValueError(f"{folder} holds adapters, whose checkpoints are not converted.")
    if config is None and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: name the model's folder or hub id with --model.")
    model: Any = meta_model(described, torch.float32)
    layout = layout_of(folder)
    weights = _read(folder / MODEL[layout], "model") if layout in MODEL else _read_pretrained(folder)
    if layout not in MODEL and weights.keys() - model.state_dict().keys():  # experts, which the files do not stack
        return _converted_by_transformers(model, folder, weights)
    try:
        model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # shapes differ
        raise ValueError(f"The weights in {folder} are not those of {described}: {error}") from error
    model.tie_weights()
    empty = (name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing := sorted({*empty, *(weights.keys() - model.state_dict().keys())}):
        raise ValueError(f"The weights in {folder} are not those of {described}: {missing[0]!r} is in one of the two.")
    return model  # type: ignore[no-any-return]


def _read_pretrained(folder: Path) -> State:
    """Return the weights that `save_pretrained` has written."""
    files = [path for path in sorted(folder.iterdir()) if PRETRAINED.fullmatch(path.name) and path.suffix != ".json"]
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors.")
    found: State = {}
    for path in files:
        whole = path.suffix == ".bin"
        found |= torch.load(path, map_location="cpu", weights_only=True) if whole else load_file(path)
    return found


def _converted_by_transformers(model: Any, folder: Path, weights: State) -> nn.Module:
    """Return the model with weights that transformers renames, stacks or cuts as it loads them.

    Raises:
        ValueError: it has cast some of them.
    """
    loaded: Any = type(model).from_pretrained(folder, config=model.config, dtype="auto")
    saved, found = defaultdict[torch.dtype, int](int), defaultdict[torch.dtype, int](int)
    for tensor in weights.values():
        saved[tensor.dtype] += tensor.numel()
    for tensor in {id(each): each for each in loaded.state_dict(keep_vars=True).values()}.values():
        found[tensor.dtype] += tensor.numel()
    if saved != found:
        raise ValueError(
            f"transformers does not load the weights in {folder} in the dtypes in which they were saved "
            f"({', '.join(sorted(map(str, saved)))}), so that they would be rounded: they cannot be converted."
        )
    return loaded  # type: ignore[no-any-return]


def convert_layout(
    source: Path, output: Path, layout: str, config: str | None, optim: str | None, optim_args: str | None
) -> str:
    """Write a copy of a checkpoint in another layout, with the same bits, and return the optim name of its run.

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
    written_by = optim_of(saved, source)
    optim = optim or written_by
    optimizer = _optimizer_of(model, saved, found != SINGLE, optim, optim_args)
    shutil.copytree(source, output, ignore=lambda folder, names: _replaced(names) if Path(folder) == source else ())
    kept = {path.name: path.read_bytes() for path in output.glob("*config.json")}
    if layout == SHARDED:
        model.config.save_pretrained(output)  # type: ignore[union-attr, operator]
    else:
        model.save_pretrained(output)  # type: ignore[operator]
    for name, content in kept.items():
        (output / name).write_bytes(content)
    _write(output, layout, model, optimizer)
    return optim


def _replaced(names: Iterable[str]) -> set[str]:
    """Return the files and folders of a checkpoint that hold the model and the optimizer, in any layout."""
    return {name for name in names if name in (*OPTIMIZER.values(), *MODEL.values()) or PRETRAINED.fullmatch(name)}


def _optimizer_of(
    model: nn.Module, saved: State, by_name: bool, optim: str, optim_args: str | None
) -> LowMemOptimizer:
    """Return an optimizer of the model with the saved state; weights that it does not list were frozen."""
    if by_name:
        trained = {name for group in saved["param_groups"] for name in group["params"]}
    else:
        trained = {layout.get("name") for group in saved.get("layouts", ()) for layout in group}
    for name, param in model.named_parameters():
        param.requires_grad_(name in trained or not trained or None in trained)
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


class _Reader(_EmptyStateDictLoadPlanner):  # type: ignore[misc]
    """Reads what torch.distributed.checkpoint has written into a state dict that is not known before."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        """Read numbers and text, where torch's own planner would run any pickle."""
        found = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def _read(path: Path, kind: str, only: str | None = None) -> State:
    """Return what torch or torch.distributed.checkpoint has written, whole and on the CPU.

    Args:
        kind: "model" or "optimizer".
        only: the key of the part that is needed, so that less is read.
    """
    if path.is_file():
        whole: State = torch.load(path, map_location="cpu", mmap=only is not None, weights_only=True)
        return whole
    found: State = {}
    reader = _Reader(keys=None if only is None else {f"{kind}.{only}"})
    _load_state_dict(found, storage_reader=FileSystemReader(path), planner=reader, no_dist=True)
    return found.get(kind, {})  # type: ignore[no-any-return]
