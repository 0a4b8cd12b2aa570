"""Runs of the same training on whole weights and on shards, in processes of their own, to be compared."""

from __future__ import annotations

import copy
import json
import os
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import hf_lowmem
from hf_lowmem.sharding import as_dtensor
from hf_lowmem.state_place import as_bytes, from_bytes

STEPS = 3
LR = 1e-2


@dataclass(frozen=True)
class Case:
    """A training of a tiny model, which is sharded in one way.

    Args:
        family: of `model_families.tiny_model`.
        cut: "rows" as FSDP2 cuts, "columns", "replicated"; "both", rows and columns on a mesh of two axes, or
            "copies", rows on a mesh whose other axis holds copies, as HSDP has them; "offloaded", rows on the CPU
            beside a mesh of GPUs, as FSDP2 keeps the weights that it offloads.
        swaps: whether the optimizer is built from whole weights, which are replaced by shards, as accelerate does.
        clips: whether each step clips.
        grads: the dtype of the gradients, "" for that of the weights.
    """

    optim: str
    args: str = ""
    family: str = "llama"
    cut: str = "rows"
    dtype: str = "float32"
    swaps: bool = False
    clips: bool = False
    grads: str = ""

    def __str__(self) -> str:
        extras = [self.args, self.family, self.cut, self.dtype, "swaps" * self.swaps, "clips" * self.clips, self.grads]
        return " ".join([self.optim, *filter(None, extras)])


def run_cases(cases: list[Case], world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run cases on `world` processes; return what each has found, by the case as text."""
    mp.spawn(work, (cases, world, str(folder)), nprocs=world)
    found: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def work(rank: int, cases: list[Case], world: int, folder: str) -> None:
    start(rank, world, folder)
    found: dict[str, Any] = {}
    for case in cases:
        try:
            found[str(case)] = compared(case)
        except Exception:  # the other processes may wait for this one, and would forever
            found[str(case)] = {"error": traceback.format_exc(limit=-6)}
            if rank:
                raise
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)


def compared(case: Case) -> dict[str, Any]:
    """Train whole and sharded, and return the largest differences of weights, state and norms, and the bytes here."""
    from tests.support.model_families import tiny_model

    torch.manual_seed(0)
    whole = tiny_model(case.family).to(getattr(torch, case.dtype))
    model = copy.deepcopy(whole)
    reference = built(whole, case)
    if case.swaps:
        optimizer = built(model, case)
        before = {id(param): name for name, param in model.named_parameters()}
        shard(model, case.cut)
        after = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [after[before[id(param)]] for param in group["params"]]
    else:
        shard(model, case.cut)
        optimizer = built(model, case)
    norms = [train(each, opt, case.clips, grads=case.grads) for each, opt in ((whole, reference), (model, optimizer))]
    weights, states = 0.0, 0.0
    for (_, param), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        weights = max(weights, difference(param, expected))
        mine, theirs = optimizer.state[param], reference.state[expected]
        assert mine.keys() == theirs.keys()
        states = max([states, *(difference(mine[name], theirs[name]) for name in mine)])
    loads = 0.0
    unsharded = built(copy.deepcopy(whole), case)
    unsharded.load_state_dict(optimizer.state_dict())
    for (_, param), mine in zip(model.named_parameters(), in_order(unsharded, whole, reference), strict=True):
        theirs = optimizer.state[param]
        loads = max([loads, *(difference(theirs[name], mine[name]) for name in mine)])
    optimizer.load_state_dict(reference.state_dict())
    for (_, param), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        mine, theirs = optimizer.state[param], reference.state[expected]
        loads = max([loads, *(difference(mine[name], theirs[name]) for name in mine)])
    here = sum(piece(t).nbytes for state in optimizer.state.values() for t in state.values())
    all_of_it = sum(t.nbytes for state in reference.state.values() for t in state.values())
    return {
        "weights": weights,
        "state": states,
        "norms": max((abs(a / b - 1) for a, b in zip(*norms, strict=True)), default=0.0),
        "share": here / all_of_it,
        "bytes": here,
        "planned": hf_lowmem.explain(whole, case.optim, case.args or None, ranks=dist.get_world_size()).nbytes,
        "loads": loads,
        "case": asdict(case),
    }


def in_order(optimizer: Any, model: nn.Module, like: Any) -> list[dict[str, Tensor]]:
    """Return the state of each parameter in the order of `model`, whose parameters the optimizer `like` has."""
    places = {
        id(param): (number, place)
        for number, group in enumerate(like.param_groups)
        for place, param in enumerate(group["params"])
    }
    found = [places[id(param)] for param in model.parameters()]
    return [optimizer.state[optimizer.param_groups[number]["params"][place]] for number, place in found]


def built(model: nn.Module, case: Case) -> hf_lowmem.LowMemOptimizer:
    return hf_lowmem.build_optimizer(model, case.optim, lr=LR, weight_decay=0.1, optim_args=case.args or None)


def shard(model: nn.Module, cut: str) -> None:
    """Replace all parameters by DTensors; one that two modules share stays one."""
    world, known = dist.get_world_size(), dict[int, nn.Parameter]()
    two_axes = cut in ("both", "copies")
    mesh = init_device_mesh("cpu", (2, world // 2) if two_axes else (world,))
    on_gpus = init_device_mesh("cuda", (world,)) if cut == "offloaded" else None
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            last = Shard(max(param.ndim - 1, 0))
            placements = {
                "rows": [Shard(0)],
                "offloaded": [Shard(0)],
                "columns": [last],
                "replicated": [Replicate()],
                "both": [Shard(0), last if param.ndim > 1 else Replicate()],
                "copies": [Replicate(), Shard(0)],
            }[cut]
            if id(param) not in known:
                placed = moved_to(on_gpus, distribute_tensor(param.detach(), mesh, placements))
                made = nn.Parameter(placed, param.requires_grad)
                known |= {id(param): made, id(made): made}
            setattr(module, name, known[id(param)])


def moved_to(mesh: Any, tensor: DTensor) -> DTensor:
    """Return a DTensor beside another mesh, its pieces where they are."""
    if mesh is None or mesh.device_type == "cpu":
        return tensor
    return as_dtensor(tensor.to_local(), mesh, tensor.placements, tensor.shape, tensor.stride())  # type: ignore


def train(
    model: nn.Module, optimizer: Any, clips: bool, first: int = 0, steps: int = STEPS, grads: str = ""
) -> list[float]:
    """Take steps with gradients that do not depend on how the weights are sharded; return the norms."""
    norms = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            spread = 1 + torch.arange(param.shape[-1] if param.ndim else 1) % 5
            grad = (torch.randn(param.shape, generator=generator) * (spread if param.ndim else 1)).to(param.dtype)
            placed = isinstance(param, DTensor)
            if grads:
                param.grad_dtype, grad = None, grad.to(getattr(torch, grads))
            if placed:
                mesh: Any = param.device_mesh
                on_cpus = mesh if mesh.device_type == "cpu" else init_device_mesh("cpu", tuple(mesh.shape))
                grad = moved_to(mesh, distribute_tensor(grad, on_cpus, param.placements))
            param.grad = grad
        if clips:
            norms.append(float(optimizer.clip_grad_norm_(1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def piece(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def difference(found: Any, expected: Tensor) -> float:
    """Return the largest difference between a whole tensor and a sharded one; gloo gathers no int16."""
    found, expected = found.detach(), expected.detach()
    if isinstance(found, DTensor) and found.dtype == torch.int16:
        in_bytes: Any = as_bytes(found)
        found = from_bytes(in_bytes.full_tensor())
    elif isinstance(found, DTensor):
        found = found.full_tensor()
    if not found.numel():
        return 0.0
    gap = (found.double() - expected.double()).abs()
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())
