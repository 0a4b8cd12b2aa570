"""The quality study: held-out losses of all optimizers, each at its best learning rate, over several seeds.

    python benchmarks/quality.py                                  # all names, 3.1 M parameters
    python benchmarks/quality.py --optims adamw_torch,slim_adamw --beta2 0.999
    python benchmarks/quality.py --report                         # writes the table and the picture again

Each optimizer is tried at three learning rates, and at further ones for as long as the best is the lowest or the
highest; then the best, and all whose loss is close to its, are repeated with other seeds, whose mean decides. An 8-bit
name takes the learning rate of the name without 8 bits, and `lowmem_adamw` that of torch's AdamW.
As many processes as cores run at once, with one thread each. Every run is a line of JSON in the results as soon as it
has ended; a study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import ROOT, commit_of_the_tree, cpu_name
from quality_report import write_report
from quality_tasks import SCALES, TASKS, Run, train

sys.path.insert(0, str(ROOT))

from hf_lowmem.trainer.names import OPTIM_NAMES

RESULTS = ROOT / "benchmarks" / "results"
RATES = {"scratch": (5e-4, 1e-3, 2e-3), "encoder": (2e-4, 4e-4, 8e-4)}
OTHER_RATES = {  # of the algorithms whose updates have another size
    "scratch": {"signum": (1e-4, 2e-4, 4e-4)},
    "encoder": {"signum": (2e-5, 4e-5, 8e-5)},
}
WITHOUT_BETA2 = ("signum", "smmf", "coap_adafactor")  # one run counts for every beta2
SAME_AS = {"lowmem_adamw": "adamw_torch"}  # whose learning rates are not tried again
MOST_RATES = 6
CLOSE = 1.01  # rates whose first loss is at most so many times the best one are repeated with the other seeds
FIRST_SEED = 0
Losses = dict[tuple[Any, ...], float]


class Study(NamedTuple):
    """What all runs of a study share.

    Args:
        seeds: those of the best learning rate; all rates are tried with FIRST_SEED.
        rates: the learning rates, or nothing for `RATES` and as many others as it takes.
    """

    beta2: float
    seeds: tuple[int, ...]
    scale: str
    task: str
    rates: tuple[float, ...] = ()

    def run(self, optim: str, lr: float, seed: int = FIRST_SEED) -> Run:
        name = optim.split()[0].removesuffix("_8bit")
        return Run(optim, lr, None if name in WITHOUT_BETA2 else self.beta2, seed, self.scale, self.task)


def wanted(optim: str, study: Study, losses: Losses) -> Iterator[Run]:
    """Yield the runs of one optimizer that can be started, given those that are known."""
    name, *options = optim.split()
    plain = name.removesuffix("_8bit")
    swept = " ".join([SAME_AS.get(plain, plain), *options])
    tried = rates_of(swept, study, losses)
    missing = [run for lr in tried if (run := study.run(swept, lr)).key not in losses]
    if missing:
        yield from missing
        return
    first = {lr: losses[study.run(swept, lr).key] for lr in tried}
    close = [lr for lr in tried if first[lr] <= CLOSE * min(first.values())]
    repeated = {lr: [study.run(swept, lr, seed) for seed in study.seeds] for lr in close}
    missing = [run for runs in repeated.values() for run in runs if run.key not in losses]
    yield from missing
    if missing or swept == optim:
        return
    best = min(close, key=lambda lr: sum(losses[run.key] for run in repeated[lr]))
    yield from (run for seed in study.seeds if (run := study.run(optim, best, seed)).key not in losses)


def rates_of(optim: str, study: Study, losses: Losses) -> list[float]:
    """Return the learning rates to try: the first ones, and others for as long as the best is at an end."""
    if study.rates:
        return list(study.rates)
    name = optim.split()[0]
    rates = list(OTHER_RATES[study.task].get(name, RATES[study.task]))
    while len(rates) < MOST_RATES:
        found = [losses.get(study.run(optim, lr).key) for lr in rates]
        if None in found:
            break
        best = found.index(min(loss for loss in found if loss is not None))
        if best == 0:
            rates.insert(0, rates[0] / 2)
        elif best == len(rates) - 1:
            rates.append(rates[-1] * 2)
        else:
            break
    return rates


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the results; a last line that was not finished is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses_of(rows: Iterable[dict[str, Any]]) -> Losses:
    """Return the held-out losses by run; a run that diverged has an infinite one."""
    return {
        Run(**row["run"]).key: float("inf") if row["held_out_loss"] is None else row["held_out_loss"] for row in rows
    }


def start_worker(nice: int) -> None:
    torch.set_num_threads(1)
    os.nice(nice)


def run_all(optims: list[str], studies: list[Study], path: Path, processes: int, nice: int) -> None:
    """Run whatever is missing, and append a line for each run that has ended."""
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "commit": commit_of_the_tree()}
    losses = losses_of(read(path))
    running: dict[Future[dict[str, Any]], Run] = {}
    failed: list[str] = []
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (nice,)) as pool:
        while True:
            started = {run.key for run in running.values()}
            runs = (run for study in studies for optim in optims for run in wanted(optim, study, losses))
            for run in runs:
                if len(running) < processes and run.key not in started:
                    running[pool.submit(train, run)] = run
                    started.add(run.key)
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(done)
                try:
                    row = {"run": asdict(run), **done.result(), **machine}
                except Exception as error:  # the others go on
                    failed.append(f"{run}: {error}")
                    losses[run.key] = float("inf")
                    continue
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                losses |= losses_of([row])
                print(run, row["held_out_loss"], f"{row['seconds']} s", flush=True)
    if failed:
        raise RuntimeError("Some runs failed, and are tried again next time: " + "; ".join(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optims", default=",".join(["adamw_torch", *OPTIM_NAMES]), help="separated by commas")
    parser.add_argument("--beta2", default="0.95,0.999", help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas; the first learning rates take seed 0")
    parser.add_argument("--rates", help="the only learning rates, separated by commas")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--task", choices=TASKS, default="scratch")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--nice", type=int, default=0, help="how far the runs stand back behind other programs")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality_cpu.jsonl", help="JSON lines")
    parser.add_argument("--report", action="store_true", help="run nothing, and write the report of what there is")
    args = parser.parse_args()
    seeds, rates = (
        tuple(map(int, args.seeds.split(","))),
        tuple(map(float, args.rates.split(",") if args.rates else ())),
    )
    studies = [Study(float(beta2), seeds, args.scale, args.task, rates) for beta2 in args.beta2.split(",")]
    if not args.report:
        run_all(args.optims.split(","), studies, args.output, args.processes, args.nice)
    write_report(read(args.output), args.output.with_suffix(""))


if __name__ == "__main__":
    main()
