"""The parameters of a step, and the units that kernels step: a parameter is one, and a shard is one or a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_lowmem.dense import is_plain, last_entry
from hf_lowmem.shards import Shard, first_place
from hf_lowmem.state import State, StatePlan


class Member(NamedTuple):
    """A parameter to step.

    Args:
        group: the number of its group.
        place: its own number among all.
        param: the optimizer's parameter.
        stored: what this process has of it: the parameter itself, or the shard of a DTensor.
        state: what this process has of its state.
        plan: the plan of its state.
        names: the names of the declared state tensors.
        shard: how it is stepped, if it is a DTensor.
    """

    group: int
    place: int
    param: Tensor
    stored: Tensor
    state: State
    plan: StatePlan
    names: tuple[str, ...]
    shard: Shard | None = None


class Unit(NamedTuple):
    """A kernel steps each unit as one weight: it is a parameter, or a piece of a shard.

    Args:
        number: that of the member among all.
        piece: the number of the piece in the shard.
        where: the piece, as slices of the shard.
        start: the place of its first entry in the weight.
    """

    number: int
    member: Member
    param: Tensor
    state: State
    plan: StatePlan
    piece: int = 0
    where: tuple[slice, ...] = ()
    start: int = 0

    @property
    def crosses(self) -> bool:
        """Return whether its means are averaged over several processes."""
        return self.member.shard is not None and self.member.shard.cut.crosses

    @property
    def is_solo(self) -> bool:
        """Return whether its step takes collectives of its own, so that all processes take it at the same turn."""
        return self.member.shard is not None and self.member.shard.is_solo


def units_of(members: Sequence[Member]) -> list[Unit]:
    """Return what is stepped of the members: of an empty shard nothing, unless its process takes part in the step."""
    found = []
    for number, member in enumerate(members):
        shard = member.shard
        if shard is None or shard.is_solo:
            if member.stored.numel() or shard is not None:
                start = 0 if shard is None or shard.cut.gathered else first_place(shard.tile, 0, 0)
                found.append(Unit(number, member, member.stored, member.state, member.plan, start=start))
            continue
        for piece_number, (piece, state) in enumerate(zip(shard.cut.pieces, shard.piece_states, strict=True)):
            param = member.stored[piece.where] if piece.where else member.stored
            found.append(Unit(number, member, param, state, piece.plan, piece_number, piece.where, piece.start))
    return found


def piece_of(grad: Tensor, where: tuple[slice, ...]) -> Tensor:
    return grad[where] if where else grad


def repeats(members: Sequence[Member]) -> list[int]:
    """Return, for each member, how often its parameter comes again after it in its group.

    torch steps a parameter as often as its group names it, one time after the other.
    """
    left = Counter((member.group, id(member.param)) for member in members)
    found = []
    for member in members:
        left[member.group, id(member.param)] -= 1
        found.append(left[member.group, id(member.param)])
    return found


def turns_of_overlapping(units: Sequence[Unit]) -> dict[int, int]:
    """Return the turn in which each parameter that shares memory with others is stepped, by its id.

    A kernel steps the parameters of a bucket on several threads, which must not write the same entries.
    """
    spans = sorted(
        (param.data_ptr(), param.data_ptr() + last_entry(param) * param.itemsize, place, id(param))
        for place, param in enumerate({id(unit.param): unit.param for unit in units}.values())
        if is_plain(param) and param.data_ptr()
    )
    turns: dict[int, int] = {}
    reach = turn = 0
    for start, end, _, param_id in spans:
        turn = turn + 1 if start < reach else 0
        reach = max(reach, end)
        if turn:
            turns[param_id] = turn
    return turns
