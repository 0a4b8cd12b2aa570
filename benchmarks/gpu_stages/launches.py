"""Times each kernel of a step, and finds how much of the device's bandwidth it reaches."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from measure import COPY_BYTES, copying, timed
from peers import build
from presets import PRESETS, build_model

from gpu_stages.session import Session
from hf_lowmem import optimizer as optimizer_module
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.kernels.triton.launch import Launch
from hf_lowmem.kernels.triton.variants import Variant

NAMES = ("slim_adamw_8bit", "factored_adamw_8bit", "adam_mini_8bit", "lowmem_adamw_8bit")
REPEATS = 5
HOST_S = 1e-3  # seconds; more than the host needs for a launch

Calls = dict[str, list[tuple[float, float]]]  # (milliseconds, bytes that must be moved) of each call by kernel


def run(session: Session) -> None:
    copy = copying(session.device)
    milliseconds = statistics.median(timed(copy, session.device, HOST_S)[1] for _ in range(REPEATS))
    reached = 2 * COPY_BYTES[session.device] / 1e6 / milliseconds
    for name in NAMES:
        model = build_model(PRESETS[session.preset or "1b"], torch.bfloat16, session.device)
        optimizer = build(name, model)
        for _ in range(2):
            optimizer.step()
        calls: Calls = defaultdict(list)
        with (timed_launches if session.on_gpu else timed_kernels)(calls):
            for _ in range(REPEATS):
                optimizer.step()
        for kernel, each in calls.items():
            milliseconds, nbytes = (sum(column) / REPEATS for column in zip(*each, strict=True))
            figures: dict[str, float] = {"launches": len(each) // REPEATS, "ms": milliseconds}
            if nbytes:
                rate = nbytes / 1e6 / milliseconds
                figures |= {"gb_per_s": rate, "copy_share": rate / reached}
            session.row(f"{name}: {kernel}", **figures)


@contextmanager
def timed_launches(calls: Calls) -> Iterator[None]:
    """Time the launches of Triton inside the context, one at a time, each starting with an idle device."""
    from triton.runtime.jit import JITFunction

    run_kernel, step, under_way = JITFunction.run, Launch.step, []

    def one_launch(self: Any, *args: Any, **options: Any) -> Any:
        variant, entries = under_way[-1]
        name = self.__name__ if self.__name__ == "combine" else f"{self.__name__} {described(variant)}"
        milliseconds = timed(lambda: run_kernel(self, *args, **options), "cuda", HOST_S)[1]
        calls[name].append((milliseconds, entries * bytes_per_entry(self.__name__, variant)))

    def one_call(self: Launch, *args: Any) -> None:
        under_way.append((self.variant, self.entries))
        step(self, *args)
        under_way.pop()

    with mock.patch.object(JITFunction, "run", one_launch), mock.patch.object(Launch, "step", one_call):
        yield


def described(variant: Variant) -> str:
    return f"{variant.second}, {variant.means}, {variant.blocks} x {variant.block}, {variant.moment}"


def bytes_per_entry(kernel: str, variant: Variant) -> float:
    """Return the bytes that a kernel must move, without scales and means."""
    weight = variant.weight.primitive_bitwidth / 8
    if kernel == "sum_squares":
        return weight
    if kernel != "step":
        return 0.0
    moment = variant.moment.primitive_bitwidth / 8
    second = 0.0 if variant.second != "full" else 1.0 if moment == 1 else 4.0
    return 3 * weight + 2 * (moment + second) + (4.0 if variant.rounding == "kahan" else 0.0)


@contextmanager
def timed_kernels(calls: Calls) -> Iterator[None]:
    """Time the steps of CPU buckets inside the context, by their rule and backend."""
    step_bucket = optimizer_module.step_bucket

    def call(bucket: Bucket, hyper: Hyper) -> None:
        states = [(state["exp_avg"], state.get("exp_avg_sq")) for state in bucket.states]
        nbytes = sum(3 * param.nbytes for param in bucket.params)
        nbytes += sum(2 * (first.nbytes + (0 if second is None else second.nbytes)) for first, second in states)
        milliseconds = timed(lambda: step_bucket(bucket, hyper), "cpu")[1]
        calls[f"{bucket.rule}, {bucket.backend.name}"].append((milliseconds, nbytes))

    with mock.patch.object(optimizer_module, "step_bucket", call):
        yield
