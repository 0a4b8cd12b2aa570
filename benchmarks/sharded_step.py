"""The step of sharded weights against that of whole ones: `python benchmarks/sharded_step.py`.

Two CPU processes with one thread each hold the shards of a preset, cut by rows as FSDP2 cuts them. Steps on shards, by
both processes at once, alternate with steps on whole weights, by the first process alone. A ratio is the median over
the pairs, with its quartiles; the time of a sharded step is that of the slower process. The time of collectives is a
part of it, and includes that in which processes wait for each other. Bytes are those that a process gives to the
collectives of one step. Whole weights are also stepped on two threads, which share the memory as two processes do. All
of it goes to results/sharded_step_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import describe_machine
from presets import PRESETS, build_model
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import hf_lowmem

PROCESSES = 2
RESULT = Path(__file__).parent / "results" / "sharded_step_cpu.json"
OPTIMS = (
    *("lowmem_adamw_8bit", "factored_adamw", "factored_adamw_8bit", "slim_adamw", "slim_adamw_8bit"),
    *("adam_mini_8bit", "signum_8bit", "smmf", "coap_adamw_8bit"),
)


class Collectives:
    """Counts the bytes that this process gives to collectives, and the seconds that it spends in them."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        dist.all_reduce = self._counted(dist.all_reduce, 0)
        dist.all_to_all_single = self._counted(dist.all_to_all_single, 1)

    def _counted(self, collective: Callable[..., Any], sent: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = collective(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.bytes += args[sent].nbytes
            return found

        return counted

    def take(self) -> tuple[int, float]:
        found = self.bytes, self.seconds
        self.bytes, self.seconds = 0, 0.0
        return found


def shard(model: nn.Module) -> None:
    """Replace all parameters and gradients by their shards."""
    mesh, known = init_device_mesh("cpu", (PROCESSES,)), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if id(param) not in known:
                made = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
                made.grad = distribute_tensor(param.grad, mesh, [Shard(0)])
                known |= {id(param): made, id(made): made}
            setattr(module, name, known[id(param)])


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def slowest(seconds: float) -> float:
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def measured(optim: str, preset: str, dtype: torch.dtype, pairs: int) -> dict[str, Any]:
    """Return the times of one optimizer's steps."""
    sharded = build_model(PRESETS[preset], dtype, "cpu")
    gradients = sum(param.grad.nbytes for param in sharded.parameters())
    shard(sharded)
    optimizer, rank = hf_lowmem.build_optimizer(sharded, optim, lr=1e-4), dist.get_rank()
    alone: Callable[[], object] = lambda: None  # noqa: E731
    if rank == 0:
        alone = hf_lowmem.build_optimizer(build_model(PRESETS[preset], dtype, "cpu"), optim, lr=1e-4).step
    for _ in range(2):  # which allocate the state, and change the bases that are due
        alone()
        optimizer.step()
    counted, nbytes = Collectives(), 0
    together, whole, threaded, waiting = list[float](), list[float](), list[float](), list[float]()
    for _ in range(pairs):
        dist.barrier()
        counted.take()
        seconds = timed(optimizer.step)
        nbytes, inside = counted.take()
        together.append(slowest(seconds))
        waiting.append(slowest(inside))
        dist.barrier()
        whole.append(timed(alone))
        torch.set_num_threads(PROCESSES)
        threaded.append(timed(alone))
        torch.set_num_threads(1)
    ratios = sorted(a / b for a, b in zip(together, whole, strict=True))
    return {
        "optim": optim,
        "whole_ms": 1e3 * statistics.median(whole),
        "whole_on_two_threads_ms": 1e3 * statistics.median(threaded),
        "sharded_ms": 1e3 * statistics.median(together),
        "collectives_ms": 1e3 * statistics.median(waiting),
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
        "bytes": nbytes,
        "share_of_gradients": nbytes / gradients,
    }


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, PROCESSES), rank=rank, world_size=PROCESSES)
    rows = []
    for optim in args.optims.split(","):
        rows.append(measured(optim, args.preset, getattr(torch, args.dtype), args.pairs))
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    if rank == 0:
        settings = {"preset": args.preset, "dtype": args.dtype, "pairs": args.pairs, "processes": PROCESSES}
        args.output.write_text(json.dumps({**describe_machine("cpu"), **settings, "rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--optims", default=",".join(OPTIMS), help="separated by commas")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args, f"{folder}/store"), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
