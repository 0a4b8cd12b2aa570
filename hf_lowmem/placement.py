"""Where an optimizer's state lives between its steps: on the device, or on the host while the device is busy."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.state import State


class Transfer(NamedTuple):
    """Bytes that were moved, and the seconds that their copies took."""

    nbytes: int
    seconds: float


class HostCopies:
    """Moves state tensors from an accelerator to pinned host memory and back, bit for bit.

    On CUDA the copies run on a stream of their own: `release` returns at once and the device memory is free for other
    tensors when its copies are done; `fetch` makes later kernels wait. Tensors on the CPU stay where they are. The
    host buffers are kept from one release to the next.
    """

    def __init__(self) -> None:
        self.used = False
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}
        self._released: list[tuple[Tensor, State, str]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._transfers: list[tuple[int, Any]] = []  # bytes, and pairs of CUDA events or the seconds
        self._finished = Transfer(0, 0.0)

    def release(self, states: Iterable[tuple[Tensor, State]]) -> None:
        """Replace the state tensors of these parameters that are on an accelerator by copies on the host.

        The first release of a tensor allocates its buffer, and waits for that.
        """
        self.used = True
        self._collect()
        leaving = [
            (param, state, name) for param, state in states for name, tensor in state.items() if on_accelerator(tensor)
        ]
        for param, state, name in leaving:
            buffer = self._buffers.get((param, name))
            # The weight's shape or dtype may have changed since, and that of its state with it.
            if buffer is None or (buffer.shape, buffer.dtype) != (state[name].shape, state[name].dtype):
                pinned = torch.empty_like(state[name], device="cpu", pin_memory=state[name].is_cuda)
                self._buffers[param, name] = pinned
        with self._copying(leaving) as streams:
            for param, state, name in leaving:
                tensor, buffer = state[name], self._buffers[param, name]
                with torch.cuda.stream(streams.get(tensor.device)):
                    buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    tensor.record_stream(streams[tensor.device])  # its memory is reused only after the copy
                state[name] = buffer
                self._released.append((param, state, name))

    def fetch(self) -> None:
        """Bring back all that was released."""
        if not self._released:
            return
        with self._copying(self._released) as streams:
            for param, state, name in self._released:
                # Allocated on the stream that will use it, which waits for the copy below.
                tensor = torch.empty_like(state[name], device=param.device)
                with torch.cuda.stream(streams.get(param.device)):
                    tensor.copy_(state[name], non_blocking=tensor.is_cuda)
                state[name] = tensor
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._released = []

    def forget(self) -> None:
        """Drop what was released: the state has been replaced."""
        self.synchronize()
        self._released = []

    def synchronize(self) -> None:
        """Wait until the host copies can be read."""
        for stream in self._streams.values():
            stream.synchronize()

    def transferred(self) -> Transfer:
        """What was moved, both ways, since the last call; copies that are still under way count next time."""
        self._collect()
        finished, self._finished = self._finished, Transfer(0, 0.0)
        return finished

    def _collect(self) -> None:
        """Add up the copies that are done, so that their events can go."""
        pending = []
        for nbytes, timing in self._transfers:
            if is_done(timing):
                done = self._finished
                self._finished = Transfer(done.nbytes + nbytes, done.seconds + seconds_of(timing))
            else:
                pending.append((nbytes, timing))
        self._transfers = pending

    @contextmanager
    def _copying(self, moved: list[tuple[Tensor, State, str]]) -> Iterator[Mapping[torch.device, torch.cuda.Stream]]:
        """The streams to copy on, after what the current ones have under way; takes the time."""
        nbytes = sum(state[name].nbytes for _, state, name in moved)
        devices = {param.device for param, _, _ in moved if param.is_cuda}
        for device in devices:
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            stream.wait_stream(torch.cuda.current_stream(device))
        started = {device: recorded(self._streams[device]) for device in devices}
        start = time.perf_counter()
        yield self._streams
        if devices:
            timing: Any = [(started[device], recorded(self._streams[device])) for device in devices]
        else:
            timing = time.perf_counter() - start
        if nbytes:
            self._transfers.append((nbytes, timing))


def on_accelerator(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def is_done(timing: Any) -> bool:
    return isinstance(timing, float) or all(end.query() for _, end in timing)


def seconds_of(timing: Any) -> float:
    return timing if isinstance(timing, float) else max(start.elapsed_time(end) for start, end in timing) / 1000
