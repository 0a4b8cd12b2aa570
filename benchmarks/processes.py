"""Runs measurements in separate processes, which are stopped when their time is over.

The processes start at once, because they are forked from a server that has done the slow imports without initializing
CUDA. This module imports nothing that initializes CUDA.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

BENCHMARKS = Path(__file__).resolve().parent
LONGEST_ERROR = 200
LAST_WORDS = 2  # seconds that a process has to exit after it has sent its result


def start_server(preload: Iterable[str], device: str, limit: float = 120) -> str:
    """Start the server, which imports these modules as far as it can, and check that a child of it can use the device.

    If a child cannot, later processes are spawned instead and import everything themselves.

    Args:
        limit: the most seconds for each of the two ways.

    Returns:
        "forkserver" or "spawn".

    Raises:
        RuntimeError: the device cannot be used either way.
    """
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    # If the server itself asked CUDA for its devices, its children could not use them.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["PRELOAD"] = ",".join(preload)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["preload"])
    for method in ("forkserver", "spawn"):
        Job.start_method = method
        try:
            Job("processes:touch", {"device": device}).result(limit)
            return method
        except (RuntimeError, TimeoutError) as error:
            reason = error
    raise RuntimeError(f"{device} cannot be used: {reason}")


class Job:
    """A call of `module:function` that runs in a process group of its own."""

    start_method: ClassVar[str] = "forkserver"

    def __init__(self, target: str, arguments: dict[str, Any], log: Path | None = None, nice: int = 0) -> None:
        """Start the process; its output is appended to `log`, or dropped if there is none."""
        context: Any = multiprocessing.get_context(self.start_method)
        self._here, there = context.Pipe(duplex=False)
        self._process = context.Process(target=call, args=(there, target, arguments, log, nice), daemon=True)
        self._process.start()
        there.close()

    def result(self, limit: float) -> Any:
        """Wait for at most `limit` seconds, end the process group, and return the function's result.

        Raises:
            TimeoutError: the function was still running.
            RuntimeError: the function raised an exception, whose first line is the message, or the process died.
        """
        try:
            if not self._here.poll(max(limit, 0)):
                raise TimeoutError(f"stopped after {limit:.0f} s")
            returned, value = self._here.recv()
            self._process.join(LAST_WORDS)
        except EOFError:
            self._process.join()
            raise RuntimeError(f"failed: exit status {self._process.exitcode}") from None
        finally:
            self.kill()
        if not returned:
            raise RuntimeError(f"failed: {value}")
        return value

    def is_running(self) -> bool:
        return bool(self._process.is_alive())

    def kill(self) -> None:
        """End the process and all processes that it has started."""
        assert self._process.pid
        with suppress(ProcessLookupError, PermissionError):  # a process that has just started may not lead a group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(5)  # the kernel waits for work on the GPU, which may never finish


def call(pipe: Connection, target: str, arguments: dict[str, Any], log: Path | None, nice: int) -> None:
    """Run `target` and send (True, its result) or (False, the first line of the exception)."""
    os.setsid()
    os.nice(nice)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        module, _, name = target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        pipe.send((True, function(**arguments)))
    except (Exception, KeyboardInterrupt) as error:
        import traceback

        traceback.print_exc()
        said = (str(error).strip().splitlines() or [""])[0]
        pipe.send((False, f"{type(error).__name__}: {said}"[:LONGEST_ERROR]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def touch(device: str) -> None:
    """Allocate on the device, unless it is the CPU."""
    if device != "cpu":
        import torch

        torch.zeros(1, device=device)


def seconds_since_boot() -> float:
    """Return the time of a clock that all processes share."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
