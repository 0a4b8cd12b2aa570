"""Weights whose state cannot be cut along with them are stepped whole, each by one of the processes that hold it.

Each process takes one weight of a round: it gets all pieces of its weight, of the gradient and of the state, steps the
weight as it would without shards, and sends the pieces back. So the step is that of one process, bit for bit, while
state and arithmetic are divided among the processes, and a process has one whole weight at a time. The distributed
versions of Muon and dion divide their weights among processes in the same way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.registry import find_backend
from hf_lowmem.sharding import Holders, holders_of
from hf_lowmem.state_place import StatePlace
from hf_lowmem.stepping import step_projected

Where = tuple[slice, ...]


class Cargo(NamedTuple):
    """A tensor whose pieces are sent.

    Args:
        here: the piece that this process holds.
        shape: the shape of the whole tensor.
        places: for each process, where its piece is.
    """

    here: Tensor
    shape: tuple[int, ...]
    places: list[Where]

    def size(self, process: int) -> int:
        """Return the bytes of the piece of a process."""
        lengths = [part.stop - part.start for part in self.places[process]]
        return int(self.here.itemsize * math.prod(lengths))

    def assembled(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor from the bytes of all pieces."""
        whole = torch.empty(self.shape, dtype=self.here.dtype, device=self.here.device)
        for place, piece in zip(self.places, pieces, strict=True):
            read(piece, whole[place])
        return whole


class Gathered:
    """A weight that one process steps whole; `step` and `hyper` are those of the current step.

    Args:
        bucket: its bucket, which has no other weight, and in which it is kept for the next step.
    """

    step: ParamStep
    hyper: Hyper

    def __init__(self, bucket: Bucket) -> None:
        (step,), (param,) = bucket, bucket.owners
        placed: Any = param
        self.rule, self.holders = bucket.rule, (holders := holders_of(param))
        shape, place = tuple(param.shape), StatePlace(param, gathered=True)
        self.param = Cargo(step.param, shape, holders.places(shape, placed.placements))
        specs = {name: spec for name, spec in sorted(step.plan.specs(shape).items()) if name != "step"}
        self.state = {
            name: Cargo(step.state[name], spec.shape, holders.places(spec.shape, place.placements(spec)))
            for name, spec in specs.items()
            if spec.shape and not spec.on_host
        }
        self.on_all = [step.state[name] for name in specs if name not in self.state]  # that every process holds whole

    @classmethod
    def of(cls, bucket: Bucket, hyper: Hyper) -> Gathered:
        """Return the weight of a bucket with the gradient and the numbers of this step."""
        weight: Gathered | None = bucket.kept.get("gathered")
        if weight is None:
            weight = bucket.kept["gathered"] = Gathered(bucket)
        (weight.step,), weight.hyper = bucket, hyper
        return weight

    @property
    def grad(self) -> Cargo:
        """Return the gradient, which is cut as the weight is."""
        return self.param._replace(here=self.step.grad)

    @property
    def outgoing(self) -> list[Cargo]:
        """Return what is sent to the process that steps the weight."""
        return [self.param, self.grad, *self.state.values()]

    @property
    def incoming(self) -> list[Cargo]:
        """Return what comes back in pieces; what every process holds whole comes after it."""
        return [self.param, *self.state.values()]

    def taken(self, sent: list[Tensor]) -> list[list[Tensor]]:
        """Step the weight, and return the bytes that each process gets back. What was `sent` is let go of."""
        processes = range(len(sent))
        pieces = [sent[p].split([cargo.size(p) for cargo in self.outgoing]) for p in processes]
        param, grad, *state = (
            cargo.assembled([each[number] for each in pieces]) for number, cargo in enumerate(self.outgoing)
        )
        sent.clear()
        del pieces
        held = {**self.step.state, **dict(zip(self.state, state, strict=True))}
        whole: ParamStep = self.step._replace(param=param, grad=grad, state=held, whole=None)
        step_projected(self.rule, [whole], find_backend(self.rule, whole), self.hyper)
        results = list(zip(self.incoming, [param, *state], strict=True))
        return [
            in_bytes(self.param.here, [*(tensor[cargo.places[process]] for cargo, tensor in results), *self.on_all])
            for process in processes
        ]

    @property
    def returned_size(self) -> int:
        """Return the bytes that this process gets back."""
        rank = self.holders.rank
        return sum(cargo.size(rank) for cargo in self.incoming) + sum(tensor.nbytes for tensor in self.on_all)

    def take_back(self, sent: Tensor) -> None:
        """Write what the process that has stepped the weight has sent."""
        targets = [*(cargo.here for cargo in self.incoming), *self.on_all]
        for target, piece in zip(targets, sent.split([tensor.nbytes for tensor in targets]), strict=True):
            read(piece, target)


def step_gathered(given: Sequence[tuple[Bucket, Hyper]], first: int = 0) -> None:
    """Step weights whose state cannot be cut along with them. All processes that hold one give the same ones.

    Args:
        first: which process steps the largest weight, counted on from the last process to the first again.
    """
    by_holders: dict[Holders, list[Gathered]] = defaultdict(list)
    for bucket, hyper in given:
        weight = Gathered.of(bucket, hyper)
        by_holders[weight.holders].append(weight)
    for holders, weights in by_holders.items():
        for takers in rounds(weights, len(holders.coordinates), first):
            take_round(holders, takers)


def rounds(weights: Sequence[Gathered], processes: int, first: int) -> Iterator[dict[int, Gathered]]:
    """Yield rounds, in each of which a process takes at most one weight, of about the size that the others take."""
    by_size = sorted(weights, key=lambda weight: -math.prod(weight.param.shape))
    for number, begin in enumerate(range(0, len(by_size), processes)):
        order = range(processes) if number % 2 == 0 else range(processes - 1, -1, -1)
        takers = ((first + process) % processes for process in order)
        yield dict(zip(takers, by_size[begin : begin + processes], strict=False))


def take_round(holders: Holders, takers: dict[int, Gathered]) -> None:
    """Step one weight on each process.

    Args:
        takers: the weights by the number of the process that steps them.
    """
    processes, like = range(len(holders.coordinates)), next(iter(takers.values())).param.here
    mine = takers.get(holders.rank)
    outgoing = [in_bytes(like, [c.here for c in takers[p].outgoing]) if p in takers else [] for p in processes]
    sizes = [sum(cargo.size(process) for cargo in mine.outgoing) if mine else 0 for process in processes]
    sent = holders.exchange(like, outgoing, sizes)
    del outgoing
    results: list[list[Tensor]] = mine.taken(sent) if mine else [[] for _ in processes]
    returned = holders.exchange(like, results, [takers[p].returned_size if p in takers else 0 for p in processes])
    for process, weight in takers.items():
        weight.take_back(returned[process])


def in_bytes(like: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the bytes of each tensor, on the device of `like`."""
    flat = [tensor.to(like.device).contiguous().view(-1) for tensor in tensors]
    # The only entry of a slice is contiguous whatever its stride, which a view of its bytes would not take.
    return [tensor.as_strided(tensor.shape, (1,)).view(torch.uint8) for tensor in flat]


def read(piece: Tensor, into: Tensor) -> None:
    """Write bytes into a tensor, in the order of its entries."""
    if piece.storage_offset() % into.itemsize:  # numbers begin at multiples of their size
        piece = piece.clone()
    into.copy_(piece.view(into.dtype).view(into.shape))
