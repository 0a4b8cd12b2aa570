"""torch's ZeroRedundancyOptimizer, which gives each process some of the parameters, steps by all of our classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from tests.support.declarations import CLASSES
from tests.support.sharded_runs import start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 80), nn.Linear(80, 64))


def train(made: nn.Module, optimizer: Any) -> None:
    for step in range(3):
        torch.manual_seed(step)
        for param in made.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def work(rank: int, folder: str) -> None:
    start(rank, 2, folder)
    for cls in CLASSES:
        whole, shared = model(), model()
        train(whole, cls(whole.parameters(), lr=1e-2))
        optimizer = ZeroRedundancyOptimizer(shared.parameters(), cls, lr=1e-2)
        train(shared, optimizer)
        for mine, theirs in zip(shared.parameters(), whole.parameters(), strict=True):
            assert torch.equal(mine, theirs), cls
        optimizer.consolidate_state_dict()
        if rank == 0:
            loaded = ZeroRedundancyOptimizer(shared.parameters(), cls, lr=1e-2)
            assert len(optimizer.state_dict()["state"]) == len(list(shared.parameters())), cls
            loaded.load_state_dict(optimizer.state_dict())
    dist.barrier()
    dist.destroy_process_group()


def test_every_class_steps_its_share(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)


def again(rank: int, folder: str) -> None:
    """Run twice, with other process groups the second time."""
    from tests.support.sharded_runs import Case, compared

    for number in range(2):
        Path(folder, str(number)).mkdir(exist_ok=True)
        start(rank, 2, f"{folder}/{number}")
        for optim in ("slim_adamw", "smmf"):
            assert compared(Case(optim))["weights"] < 3e-7
        dist.barrier()
        dist.destroy_process_group()


def test_process_groups_may_be_made_anew(tmp_path: Path) -> None:
    mp.spawn(again, (str(tmp_path),), nprocs=2)
