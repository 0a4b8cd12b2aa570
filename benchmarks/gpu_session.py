"""Measures everything that needs a GPU, in one command that never exceeds its time.

    python benchmarks/gpu_session.py --part 1 --minutes 6.5 --out results --commit HASH
    python benchmarks/gpu_session.py --part 2 --minutes 6.5 --out results --commit HASH
    python benchmarks/gpu_session.py --part 1 --minutes 1 --device cpu --preset tiny --out tried

Part 1 checks the kernels and times them, and part 2 measures whole trainings. Each stage runs in a process of its own
for its share of the remaining time, and leaves the time that it does not need to later stages. A stage that fails,
hangs or dies does not stop the others. If `smoke` fails, all later figures are marked as unverified.

Each figure is appended to results.jsonl as soon as it is known. summary.md is written again after every stage, and
printed at the end, even after a SIGTERM. log.txt has the output of the stages. This process never initializes CUDA.
Git, trl, datasets and other packages' optimizers are optional; the summary says what was left out. The exit status is
0 if every stage has done all of its work.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gpu_stages.session import Session
from gpu_stages.summary import render
from processes import Job, seconds_since_boot, start_server

LAST_SECONDS = 2  # time that is reserved for the summary
OWN_SHARE = 0.93  # the share of its time that a stage plans with; it is killed at the end of its time
UNTIMED = ("smoke", "tests")
DONE = "done"
TRIED = 2  # the most calls of one target in a stage on a CPU
SHORTEST = 1.0  # seconds; a call with less time is not started
TRAINED = (
    *("slim_adamw_8bit", "adamw_torch_fused", "adamw_8bit"),
    *("slim_adamw_8bit fused_clip=true", "factored_adamw_8bit", "adam_mini_8bit"),
)
REINFORCED = ("slim_adamw_8bit offload_state=true", "adamw_torch_fused")
QUALITY = ("adamw_torch_fused", "factored_adamw_8bit", "slim_adamw_8bit", "adam_mini_8bit", "coap_adamw_8bit")
ON_8B_SHAPES = {
    "preset": "8b-8layers",
    "names": ("slim_adamw_8bit", "adam_mini_8bit", "bnb_adamw8bit", "lowmem_adamw_8bit"),
    "baselines": ("bf16",),  # a float32 baseline would not fit into memory beside the bfloat16 one
}
TRAINED_1B = ("adamw_torch_fused", "coap_adamw_8bit")
IN_PASSES = ("smmf", "micro_adam", "fadam_8bit", "h_fac")
# Optimizers of other packages may hang. They come early, but after the two that matter most, and in their own process.
FIRST = ("slim_adamw_8bit", "adam_mini_8bit", "bnb_adamw8bit", "flashoptim")


class Call(NamedTuple):
    """A call of `target` with the session and the arguments, in a process of its own.

    Its share of the time is given in seconds of a whole part on a GPU. On a CPU, where a part is only tried out, the
    share is `on_cpu`, and a stage has at most two calls of one target.
    """

    target: str
    seconds: float
    arguments: Mapping[str, Any] = MappingProxyType({})
    on_cpu: float = 1


Stages = dict[str, tuple[Call, ...]]

PARTS: dict[int, Stages] = {
    1: {
        "probe": (Call("gpu_stages.probe:run", 12),),
        "smoke": (Call("gpu_stages.smoke:run", 50, on_cpu=2),),
        "tests": (Call("gpu_stages.unit_tests:run", 100, on_cpu=3),),
        "core": (
            Call("gpu_stages.core:run", 45, {"names": FIRST}, on_cpu=2),
            Call("gpu_stages.core:run", 55, on_cpu=2),
        ),
        "kernels": (Call("gpu_stages.launches:run", 25),),
        "sweep": (Call("gpu_stages.sweep:run", 45, on_cpu=2),),
        "offload": (Call("gpu_stages.offload:run", 15),),
        "profile": (Call("gpu_stages.profiles:run", 15),),
    },
    2: {
        "train-8b": tuple(Call("gpu_stages.training:run", 30, {"optim": optim, "preset": "8b"}) for optim in TRAINED),
        "step-8b-8layers": (Call("gpu_stages.core:run", 40, ON_8B_SHAPES, on_cpu=2),),
        "coap": (
            Call("gpu_stages.core:run", 20, {"names": ("coap_adamw_8bit", "coap_adafactor_8bit")}, on_cpu=2),
            *(Call("gpu_stages.training:run", 8, {"optim": optim, "preset": "1b"}) for optim in TRAINED_1B),
            Call("gpu_stages.core:run", 25, {"names": ("soap_8bit",)}),  # its first step decomposes every weight
        ),
        "passes": (Call("gpu_stages.core:run", 30, {"names": IN_PASSES}, on_cpu=2),),
        "graphs": (Call("gpu_stages.graphs:run", 12),),
        "rlhf": tuple(
            Call("gpu_stages.rlhf:run", 22, {"method": method, "optim": optim}, on_cpu=2)
            for optim in REINFORCED
            for method in ("dpo", "grpo")
        ),
        "quality": (
            Call("gpu_stages.quality:prepare", 10),
            *(Call("gpu_stages.quality:run", 14, {"optim": optim}, on_cpu=2) for optim in QUALITY),
        ),
    },
}  # fmt: skip
PRELOADED = {
    1: ["measure", "hf_lowmem.trainer.build"],
    2: ["train", "datasets", *(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "grpo"))],
}


class Runner:
    """Runs the calls of the stages one after the other, each for its share of the remaining time."""

    def __init__(self, stages: Stages, session: Session, ends: float) -> None:
        self.stages, self.session, self.ends = stages, session, ends
        self.succeeded = True
        self.verified = not any(row["stage"] == "smoke" and row.get("status", DONE) != DONE for row in session.rows())
        self.running: list[Job] = []
        self.compiling: list[Job] = []

    def run(self) -> None:
        """Run all calls. Kernels are compiled in the background while stages run that do not measure time."""
        calls = [(stage, call) for stage, calls in self.stages.items() for call in self.calls_of(calls)]
        shares = [call.seconds if self.session.on_gpu else call.on_cpu for _, call in calls]
        for number, (stage, call) in enumerate(calls):
            if stage in UNTIMED:
                self.compile_beside()
            else:
                self.stop_compiling()
            limit = (self.ends - seconds_since_boot()) * shares[number] / sum(shares[number:])
            status = self.run_call(stage, call, limit)
            self.succeeded &= status == DONE
            if stage == "smoke":
                self.verified = status == DONE
            self.summarize()

    def calls_of(self, calls: Sequence[Call]) -> Iterator[Call]:
        same = Counter[str]()
        for call in calls:
            same[call.target] += 1
            if self.session.on_gpu or same[call.target] <= TRIED:
                yield call

    def run_call(self, stage: str, call: Call, limit: float) -> str:
        """Run one call for at most `limit` seconds, and record how it ended."""
        if limit < SHORTEST:
            return self.note(stage, call, "left out: no time was left", 0.0)
        started = seconds_since_boot()
        session = self.session._replace(
            stage=stage, ends=started + OWN_SHARE * limit, verified=self.verified or stage == "smoke"
        )
        try:
            self.start(call, session).result(limit)
            status = DONE
        except (RuntimeError, TimeoutError) as error:
            status = str(error)
        return self.note(stage, call, status, seconds_since_boot() - started)

    def start(self, call: Call, session: Session, nice: int = 0) -> Job:
        job = Job(call.target, {"session": session, **call.arguments}, session.out / "log.txt", nice)
        self.running.append(job)
        return job

    def compile_beside(self) -> None:
        """Start background processes that compile what will be timed, unless they have been started already."""
        processes = 0 if self.compiling else max((os.cpu_count() or 1) // 4, 1)
        for first in range(processes):
            call = Call("gpu_stages.compilation:run", 0, {"first": first, "every": processes})
            self.compiling.append(self.start(call, self.session._replace(stage="compilation"), nice=10))

    def stop_compiling(self) -> None:
        """Stop the background processes, which would disturb stages that measure time, and record how they ended."""
        for job in self.compiling:
            try:
                job.result(limit=0.1)
                status = DONE
            except (RuntimeError, TimeoutError) as error:
                status = str(error)
            self.session._replace(stage="compilation").row("all", status=status, seconds=0.0)
        self.compiling = []

    def note(self, stage: str, call: Call, status: str, seconds: float) -> str:
        """Write a row that says how a call ended."""
        values = (value for value in call.arguments.values() if value and isinstance(value, (str, tuple)))
        what = " ".join(value if isinstance(value, str) else ", ".join(value) for value in values)
        self.session._replace(stage=stage).row(what or "all", status=status, seconds=seconds)
        print(f"{' '.join(filter(None, (stage, what)))}: {status}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return status

    def summarize(self) -> str:
        text = render(self.session.rows())
        with suppress(OSError):  # a full disk must not stop the session
            (self.session.out / "summary.md").write_text(text)
        return text

    def kill(self) -> None:
        for job in self.running:
            job.kill()


@contextmanager
def ended_as_exit(ends: float) -> Iterator[None]:
    """Make SIGTERM, Ctrl-C and the end of the time raise SystemExit, so that the summary is written in any case."""

    def leave(signum: int, frame: Any) -> None:
        sys.exit(128 + signum)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.signal(number, leave) for number in signals]
    signal.setitimer(signal.ITIMER_REAL, max(ends - seconds_since_boot(), 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def chosen_stages(part: int, names: str | None) -> Stages:
    """Return the stages of a part, or those of them that are named.

    Raises:
        ValueError: the part has no stage of that name.
    """
    stages = PARTS[part]
    wanted = list(stages) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"--stages names no stage of {', '.join(stages)}")
    if unknown := set(wanted) - set(stages):
        raise ValueError(f"part {part} has no stage {', '.join(sorted(unknown))}: it has {', '.join(stages)}")
    return {name: calls for name, calls in stages.items() if name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=PARTS, required=True)
    parser.add_argument("--minutes", type=float, default=6.5, help="the most that it takes (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, or one of an earlier part")
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    parser.add_argument("--stages", help="only these, separated by commas")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--preset", help="of all models, instead of each stage's own")
    args = parser.parse_args()
    started = seconds_since_boot()
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    try:
        stages = chosen_stages(args.part, args.stages)
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small tensors are slower with more threads
    ends = started + 60 * args.minutes - LAST_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        told = (args.device, args.preset, args.commit, f"part {args.part}")
        session = Session(args.out.resolve(), Path(scratch), *told)
        if any(row["stage"] == session.stage for row in session.rows()):
            parser.error(f"--out {args.out} has the results of {session.stage} already: name another folder")
        runner = Runner(stages, session, ends)
        try:
            with ended_as_exit(ends + LAST_SECONDS / 2):
                method = start_server(PRELOADED[args.part], args.device, (ends - seconds_since_boot()) / 3)
                settings = {"device": args.device, "preset": args.preset, "minutes": args.minutes, "processes": method}
                session.row("settings", **settings, command=shlex.join(["python", *sys.argv]))
                runner.run()
        except RuntimeError as error:
            runner.succeeded = False
            session.row("settings", remark=str(error))
        finally:
            runner.kill()
            print(runner.summarize())
    sys.exit(not runner.succeeded)


if __name__ == "__main__":
    main()
