"""What is kept on the host while others need the device: state between steps, and gradients before a step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.sharding import local, placed_like
from hf_lowmem.state import State


class Transfer(NamedTuple):
    """The bytes that were moved and the seconds that the copies took."""

    nbytes: int
    seconds: float


class HostCopies:
    """Copies of state tensors in pinned host memory, to which they move from an accelerator and back, bit for bit.

    On CUDA the copies run on a stream of their own. `release` returns at once, and the device memory is free for other
    tensors as soon as the copies are done; `fetch` makes later kernels wait for its copies. Tensors on the CPU stay
    where they are. The host buffers are reused by the next release.
    """

    def __init__(self) -> None:
        self.used = False
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}
        self._released: list[tuple[Tensor, State, str]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._transfers: list[tuple[int, Any]] = []  # the bytes, and the seconds or pairs of CUDA events
        self._finished = Transfer(0, 0.0)

    def release(self, states: Iterable[tuple[Tensor, State]]) -> None:
        """Replace the state tensors of these parameters that are on an accelerator by copies on the host.

        The first release of a tensor allocates its host buffer and waits for the allocation.
        """
        self.used = True
        self._collect()
        leaving = [
            (param, state, name) for param, state in states for name, tensor in state.items() if on_accelerator(tensor)
        ]
        for param, state, name in leaving:
            buffer = self._buffers.get((param, name))
            # The shape or dtype of the weight, and so of its state, may have changed since the last release.
            if buffer is None or (buffer.shape, buffer.dtype) != (state[name].shape, state[name].dtype):
                pinned = torch.empty_like(state[name], device="cpu", pin_memory=state[name].is_cuda)
                self._buffers[param, name] = pinned
        with self._copying(leaving) as streams:
            for param, state, name in leaving:
                tensor, buffer = state[name], self._buffers[param, name]
                with torch.cuda.stream(streams.get(tensor.device)):
                    buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                if tensor.is_cuda:
                    tensor.record_stream(streams[tensor.device])  # keeps its memory from being reused before the copy
                state[name] = buffer
                self._released.append((param, state, name))

    def fetch(self) -> None:
        """Bring back all released tensors."""
        if not self._released:
            return
        with self._copying(self._released) as streams:
            for param, state, name in self._released:
                # The tensor belongs to the current stream, which is made to wait for the copy below.
                tensor = torch.empty_like(state[name], device=param.device)
                with torch.cuda.stream(streams.get(param.device)):
                    tensor.copy_(state[name], non_blocking=tensor.is_cuda)
                state[name] = tensor
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
        self._released = []

    def forget(self) -> None:
        """Forget the released tensors, because other state has replaced them."""
        self.synchronize()
        self._released = []

    def forget_buffers(self, param: Tensor) -> None:
        """Free the host buffers of a parameter, whose state has got another layout."""
        for key in [key for key in self._buffers if key[0] is param]:
            del self._buffers[key]

    def synchronize(self) -> None:
        """Wait until the host copies are complete."""
        for stream in self._streams.values():
            stream.synchronize()

    def transferred(self) -> Transfer:
        """Return what was moved in both directions since the last call; unfinished copies count in the next call."""
        self._collect()
        finished, self._finished = self._finished, Transfer(0, 0.0)
        return finished

    def _collect(self) -> None:
        """Add up the finished copies and drop their events."""
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
        """Yield the streams to copy on, which wait for the current streams, and record the time of the copies."""
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


class HeldGradients:
    """Sums of gradients that wait on the host for their step; those of CPU parameters stay where they are.

    The sums of a dtype share one pinned buffer, as the allocator of pinned memory rounds each up to a power of two.
    Copies and the kernels that use them run on the current stream, in order.
    """

    def __init__(self) -> None:
        self._places: dict[Tensor, Tensor] = {}  # the part of a pinned buffer that each parameter has
        self._grads: dict[Tensor, Tensor] = {}  # in the order in which they came

    def __len__(self) -> int:
        return len(self._grads)

    def add(self, param: Tensor, grad: Tensor, params: Iterable[Tensor]) -> Tensor:
        """Add a gradient to the sum of a parameter, and return the sum on the gradient's device.

        Args:
            param: the parameter.
            grad: the gradient, which is taken over: it may be written and kept.
            params: all parameters whose gradients may come.
        """
        held, here = self._grads.get(param), local(grad)
        if held is not None:
            here.add_(held.to(here.device, non_blocking=True))
        if not on_accelerator(here):
            self._grads[param] = here
            return grad
        if param not in self._places:
            self._make_room(here.dtype, params)
        self._grads[param] = self._places[param].copy_(here, non_blocking=True)
        return grad

    def drain(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its sum, on the parameter's device, and let go of it."""
        while self._grads:
            param = next(iter(self._grads))
            here = self._grads.pop(param).to(local(param).device, non_blocking=True)
            yield param, placed_like(param, here)

    def clear(self) -> None:
        """Let go of all sums."""
        self._grads.clear()

    def _make_room(self, dtype: torch.dtype, params: Iterable[Tensor]) -> None:
        """Allocate the buffer of all parameters on accelerators whose gradients have this dtype."""
        own = [p for p in params if p.dtype == dtype and on_accelerator(local(p)) and p not in self._places]
        sizes = [local(p).numel() for p in own]
        buffer = torch.empty(sum(sizes), dtype=dtype, pin_memory=torch.cuda.is_available())
        self._places |= {p: part.view(local(p).shape) for p, part in zip(own, buffer.split(sizes), strict=True)}


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
