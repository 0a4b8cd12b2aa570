"""A loop under DistributedDataParallel with released gradients, and without: the weights and norms are the same.

    torchrun --nproc_per_node 2 released_replicas.py NAME

One part of the model is used by the first process only, every other step, and another part is never used.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import hf_lowmem


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.sometimes, self.never = (nn.Linear(64, 64) for _ in range(3))
        self.last = nn.Linear(64, 8)

    def forward(self, inputs: Tensor, all_parts: bool) -> Tensor:
        hidden = self.first(inputs)
        return self.last(hidden + self.sometimes(hidden) if all_parts else hidden)


def train(name: str, released: bool, clip: str, batches: int, unused: bool, view: bool) -> tuple[Parts, list[Tensor]]:
    """Train for 4 steps, and for 2 more that keep their gradients."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = Parts()
    if not unused:
        del model.never
    replicas = DistributedDataParallel(
        model, find_unused_parameters=unused, gradient_as_bucket_view=view, bucket_cap_mb=0.01
    )
    options = "min_8bit_size=0,block_size=64" if name.endswith("8bit") else None
    optimizer = hf_lowmem.build_optimizer(model, name, lr=1e-2, optim_args=options)
    release = optimizer.release_gradients(clip=clip, replicas=replicas) if released else None  # type: ignore[arg-type]
    norms = []
    for step in range(6):
        for batch in range(batches):
            generator = torch.Generator().manual_seed(100 * step + 10 * batch + rank)
            with replicas.no_sync() if batch < batches - 1 else nullcontext():
                everything = not unused or (rank == 0 and step % 2 == 0)
                replicas(torch.randn(4, 64, generator=generator), everything).square().mean().backward()
        if clip == "host" and release is not None:
            norms.append(release.clip(model.parameters(), 0.1))
        elif clip == "host":
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        optimizer.step()
        assert release is None or all(param.grad is None for param in model.parameters())
        optimizer.zero_grad()
        if step == 3:
            optimizer.keep_gradients()
            release = None
    return model, norms


def main(name: str) -> None:
    torch.distributed.init_process_group("gloo")
    ways = (("none", 1), ("host", 1), ("host", 2), ("none", 2))
    for (clip, batches), unused, view in itertools.product(ways, (False, True), (False, True)):
        plain, norms = train(name, False, clip, batches, unused, view)
        released, found = train(name, True, clip, batches, unused, view)
        for key, weight in plain.named_parameters():
            torch.testing.assert_close(released.get_parameter(key), weight, rtol=0, atol=0)
        torch.testing.assert_close(found, norms, rtol=0, atol=0)
    hooked = DistributedDataParallel(nn.Linear(64, 64))
    hooked.register_comm_hook(None, fp16_compress_hook)
    optimizer = hf_lowmem.build_optimizer(hooked.module, name, lr=1e-2)
    with pytest.raises(ValueError, match="has the communication hook fp16_compress_hook, but released gradients need"):
        optimizer.release_gradients(replicas=hooked)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
