"""Conversion of a checkpoint to one of torch's AdamW, or to another layout."""

from __future__ import annotations

import os
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from hf_lowmem.adamw_state import to_adamw as to_adamw_state
from hf_lowmem.trainer.build import build_optimizer
from hf_lowmem.trainer.checkpoint_layouts import (
    FULL,
    LAYOUTS,
    OPTIMIZER,
    SHARDED,
    SINGLE,
    convert_layout,
    layout_of,
    optim_of,
    saved_model,
    saved_optimizer,
)
from hf_lowmem.trainer.checkpoints import refuse_incomplete
from hf_lowmem.trainer.names import ADAMW_NAMES


def to_adamw(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module,
    optim: str,
    optim_args: str | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the optimizer state of a checkpoint as that of `torch.optim.AdamW` with the same parameter groups.

    Args:
        checkpoint: the Trainer's checkpoint folder, or the optimizer's state dict.
        model: the model that was trained, in the same dtype and with the same parameters frozen. Its values do not
            matter.
        optim: the optim name of the run that wrote the checkpoint.
        optim_args: the `optim_args` of that run.

    Returns:
        A state dict for `torch.optim.AdamW(...).load_state_dict` and for the Trainer's `optimizer.pt`. The moments
        have the dtype of the weights, as AdamW keeps them.

    Raises:
        ValueError: the optimizer does not keep AdamW's moments, or the checkpoint is from another optimizer or model.

    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = hf_lowmem.build_optimizer(model, "lowmem_adamw_8bit", lr=1e-3)
    >>> model(torch.ones(1, 64)).sum().backward()
    >>> optimizer.step()
    >>> adamw = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}])
    >>> adamw.load_state_dict(hf_lowmem.to_adamw(optimizer.state_dict(), model, "lowmem_adamw_8bit"))
    """
    ours = build_optimizer(model, optim, lr=0.0, optim_args=optim_args)
    if ours.rule != "adamw":
        raise ValueError(f"optim={optim!r} keeps moments that are not AdamW's: there is nothing to convert.")
    ours.load_state_dict(dict(checkpoint if isinstance(checkpoint, Mapping) else saved_optimizer(Path(checkpoint))))
    kept = ("params", "lr", "initial_lr", "betas", "eps", "weight_decay")
    groups = [{name: group[name] for name in kept if name in group} for group in ours.param_groups]
    adamw = torch.optim.AdamW(groups)
    for group in ours.param_groups:
        for param in group["params"]:
            if param in ours.state:
                shape = tuple(param.shape)
                adamw.state[param] = to_adamw_state(ours.state[param], ours.plan_of(param), shape, param.dtype)
    return adamw.state_dict()


def convert(argv: list[str]) -> None:
    """Convert a checkpoint for adamw_torch, or between the layouts of one process and of FSDP2."""
    parser = ArgumentParser(prog="hf-lowmem convert", description=convert.__doc__)
    parser.add_argument("checkpoint", help="the Trainer's checkpoint folder of a model that was trained as a whole")
    parser.add_argument(
        "--to",
        required=True,
        choices=(*ADAMW_NAMES, *LAYOUTS),
        help="the new optim, or the new layout with the same optim",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a new folder, such as out/adamw-300")
    parser.add_argument("--optim", metavar="NAME", help="the optim of the run (default: read from the checkpoint)")
    parser.add_argument("--optim-args", "--optim_args", metavar="TEXT", help="the optim_args of the run, if any")
    parser.add_argument("--model", metavar="NAME", help="a folder or hub id, if the checkpoint holds no config.json")
    args = parser.parse_args(argv)
    source, output = Path(args.checkpoint), Path(args.output)
    try:
        if output.exists():
            raise ValueError(f"--output {output} exists already: name a new folder.")
        refuse_incomplete(source)
        with whole_or_nothing(output) as unfinished:
            if args.to in LAYOUTS:
                optim = convert_layout(source, unfinished, args.to, args.model, args.optim, args.optim_args)
            else:
                optim = for_adamw(source, unfinished, args.model, args.optim, args.optim_args)
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(2, f"hf-lowmem convert: {' '.join(str(error).split())}\n")
    how = "by a run of that layout" if args.to in LAYOUTS else f"with optim={args.to}"
    options = f"optim_args={args.optim_args!r}" if args.optim_args else "no optim_args"
    sys.stdout.write(f"Wrote {output}, as of a run with optim={optim} and {options}: resume from it {how}.\n")


def for_adamw(source: Path, output: Path, config: str | None, optim: str | None, optim_args: str | None) -> str:
    """Write a copy of a checkpoint whose optimizer is torch's AdamW, and return the optim name that it had.

    Raises:
        ValueError: it is no checkpoint of one process, or its optimizer does not keep AdamW's moments.
    """
    if layout_of(source) in (FULL, SHARDED):
        raise ValueError(f"{source} was written under FSDP2: convert it `--to {SINGLE}` first.")
    saved = saved_optimizer(source)
    written_by = optim_of(saved, source)
    optim = optim or written_by
    converted = to_adamw(saved, saved_model(source, config), optim, optim_args)
    shutil.copytree(source, output, ignore=lambda folder, names: {OPTIMIZER[SINGLE]} & set(names))
    torch.save(converted, output / OPTIMIZER[SINGLE])
    return optim


@contextmanager
def whole_or_nothing(output: Path) -> Iterator[Path]:
    """Yield a path beside `output` that becomes `output` in the end, or is removed where something fails."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as folder:
        unfinished = Path(folder, output.name)
        yield unfinished
        unfinished.rename(output)
