"""The parameters of an optimizer in buckets, checked before each step and kept for as long as nothing moves.

Kernels write through addresses, so before anything is written every weight, gradient and state tensor is compared
with what was planned for it. `Marks` compares all of them at once with what was found when the buckets were made;
only where something differs are they looked at one by one, and the buckets made anew.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.checkpoint import FLOATS
from hf_lowmem.dense import densified, is_plain, last_entry
from hf_lowmem.kernels import COMPILED, RULE
from hf_lowmem.kernels.bucket import Bucket, ParamStep
from hf_lowmem.kernels.registry import Backend, choice, find_backend, warn_of_capturable
from hf_lowmem.param_layouts import ParamLayout, StateOwner
from hf_lowmem.rounding import noise_key
from hf_lowmem.sharding import Groups, is_placed_as, is_sharded, local, local_grad, tile_of
from hf_lowmem.shards import Shard
from hf_lowmem.state import KAHAN_COMP, State, StatePlan
from hf_lowmem.step_checks import check_grad, check_sharded, check_stored, check_weight
from hf_lowmem.units import Member, Unit, piece_of, repeats, turns_of_overlapping, units_of

Group = dict[str, Any]
_T = torch.Tensor
# An attrgetter mapped over many tensors takes half the time of a loop.
_grad, _shape, _dtype, _device, _layout = map(operator.attrgetter, ("grad", "shape", "dtype", "device", "layout"))


class Marks(NamedTuple):
    """The layouts of many tensors: if two are equal, no address, shape, stride, dtype or device has changed."""

    types: list[type]
    addresses: list[int]
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    devices: list[torch.device]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Marks:
        layouts = [list(map(mark, tensors)) for mark in (_shape, _T.stride, _dtype, _device)]
        return cls(list(map(type, tensors)), list(map(_T.data_ptr, tensors)), *layouts)


@dataclass(eq=False)
class PreparedBucket:
    """A bucket with what it was made of.

    Args:
        group: the place of its parameters' group.
        units: what it steps.
        later: how many more steps of these parameters this call of the optimizer's `step` takes after this one.
    """

    bucket: Bucket
    group: int
    units: list[Unit]
    later: int

    def __post_init__(self) -> None:
        self.is_random = any(unit.plan.rounding.kind == "stochastic" for unit in self.units)

    def set_step(self, group: Group, idle_calls: int) -> None:
        """Set the numbers of this step, and the keys of its noise."""
        bucket, offset, capturable = self.bucket, self.later + idle_calls, group["capturable"]
        counts = [state["step"] for state in bucket.states]
        bucket.steps = [count - offset for count in (counts if capturable else map(_T.item, counts))]
        if self.is_random:
            seed, keys = group["rounding_seed"], []
            for unit, step in zip(self.units, bucket.steps, strict=True):
                place, offset = unit.member.place, unit.start
                key: Any = (seed, place) if capturable else noise_key(seed, place, int(step), offset)
                keys.append(key if unit.plan.rounding.kind == "stochastic" else 0)
            bucket.noise_keys = keys


class Buckets:
    """The buckets of an optimizer's parameters that have a gradient."""

    def __init__(self) -> None:
        self.rounding_changed: Counter[str] = Counter()  # counts the Kahan buffers that were made or left out
        self._shapes: dict[Tensor, torch.Size] = {}  # of weights that were compared with their state
        self._prepared: PreparedBuckets | None = None

    def forget(self, param: Tensor | None = None) -> None:
        """Forget what was compared: the state of a parameter, or of all, has been replaced."""
        self._prepared = None
        if param is None:
            self._shapes.clear()
        else:
            self._shapes.pop(param, None)

    def find(self, optimizer: StateOwner, advance: bool) -> list[tuple[int, Bucket]]:
        """Return the buckets with the place of their group, all checked; `advance` counts this step.

        Raises:
            RuntimeError: a weight, its gradient or its state do not fit each other; nothing has been counted then.
        """
        groups = optimizer.param_groups
        params = [param for group in groups for param in group["params"]]
        grads = list(map(_grad, params))
        options = [optimizer.step_options(group) for group in groups]
        if self._prepared is None or not self._prepared.still_holds(optimizer, params, grads, options):
            self._prepared = None  # stays unset if a check below raises
            self._prepared = PreparedBuckets(optimizer, params, grads, options, *self._members(optimizer))
        prepared = self._prepared
        if advance:
            prepared.advance()
        for each in prepared.buckets:
            each.set_step(groups[each.group], optimizer.idle_calls)
        return [(each.group, each.bucket) for each in prepared.buckets]

    @property
    def stepped(self) -> list[Tensor]:
        """Return the parameters that a step changes, on whatever process."""
        return [] if self._prepared is None else [m.param for m in self._prepared.members if m.param.numel()]

    @property
    def crossing(self) -> list[tuple[int, Shard]]:
        """Return the shards whose means are averaged over several processes, with the place of their group."""
        return [] if self._prepared is None else self._prepared.crossing

    @property
    def spreads(self) -> dict[Groups, Tensor]:
        """Return the process groups that parameters are cut over, with a zero on their device, float64 if one is."""
        found: dict[Groups, Tensor] = {}
        for member in [] if self._prepared is None else self._prepared.members:
            if member.shard is not None and (spread := member.shard.spread):
                known = found.get(spread, torch.zeros((), dtype=torch.float32, device=member.stored.device))
                found[spread] = known.to(torch.promote_types(known.dtype, member.stored.dtype))
        return found

    def release(self, state: bool = False) -> None:
        """Let go of the gradients, whose memory the next backward pass needs; and of the `state`, which moves away."""
        if self._prepared is not None:
            self._prepared.give([])
        if state:
            self._prepared = None

    def _members(self, optimizer: StateOwner) -> tuple[list[Member], list[Tensor]]:
        """Return the parameters that have a gradient and the gradients as dense tensors.

        Each trainable parameter has its state afterwards.
        """
        members, grads, place = list[Member](), list[Tensor](), optimizer.first_place - 1
        for number, group, layouts in optimizer.groups_with_layouts():
            for param, layout in zip(group["params"], layouts, strict=True):
                place += 1
                grad = param.grad
                if grad is None and not param.requires_grad:
                    continue
                # Every trainable parameter gets its state, gradient or not, so that all ranks hold the same keys.
                state = optimizer.state.get(param) or optimizer.allocate(param, layout, group)
                if grad is None:
                    continue
                plan, names, kept, shard = self._checked_plan(optimizer, param, state, layout, group)
                stored = local(param)
                if shard is not None and any(param is member.param for member in members):
                    raise ValueError(
                        f"{layout.name or 'A sharded weight'} is in its parameter group twice: name it once."
                    )
                grads.append(check_grad(stored, local_grad(grad, param), param.device, optimizer.class_name))
                members.append(Member(number, place, param, stored, kept, plan, names, shard))
        if len(self._shapes) > place + 1 - optimizer.first_place:  # some parameters were swapped out
            self._shapes = {member.param: member.param.shape for member in members}
        return members, grads

    def _checked_plan(
        self, optimizer: StateOwner, param: Tensor, state: State, layout: ParamLayout, group: Group
    ) -> tuple[StatePlan, tuple[str, ...], State, Shard | None]:
        """Return the plan of a parameter, the names of its state, what this process has of it, and how a DTensor is
        stepped; what a change of options or dtype has left of the state is fitted first."""
        name = layout.name or "A parameter"
        check_weight(param, layout.name, self._shapes.get(param), optimizer.steps_flat_pieces_of(layout))
        if not is_plain(local(param)) and state["step"] == 0:
            densified(param)  # a class that cannot be read is refused before anything is written
        plan = optimizer.plan_by(layout, group, param)
        specs, place = optimizer.specs_of(param, plan, group), optimizer.state_place(param, plan, group)
        if (KAHAN_COMP in state) != (plan.rounding.kind == "kahan"):  # `rounding` may have changed since
            state.pop(KAHAN_COMP, None)
            wanted = plan.rounding.specs(tuple(param.shape))
            state.update({key: place.zeros(spec) for key, spec in wanted.items()})
            self.rounding_changed["started at zero" if wanted else "left out"] += 1
        for key, spec in specs.items():  # the weight's dtype may have changed since
            tensor = state.get(key)
            if isinstance(tensor, Tensor) and {tensor.dtype, spec.dtype} == FLOATS:
                state[key] = tensor.to(spec.dtype)
        check_stored(param, state, specs, place, name)
        self._shapes[param] = param.shape
        if not is_sharded(param):
            return plan, tuple(specs), state, None
        check_sharded(group, name)
        kept = {key: local(tensor) for key, tensor in state.items()}
        return plan, tuple(specs), kept, Shard(optimizer.rule_of(plan, group), plan, tile_of(param), kept)


class PreparedBuckets:
    """The buckets as they were made, and all that must not have changed for them to be stepped again."""

    def __init__(
        self,
        optimizer: StateOwner,
        params: list[Tensor],
        grads: list[Tensor | None],
        options: list[Any],
        members: list[Member],
        dense: list[Tensor],
    ) -> None:
        self.params, self.options, self.choice = params, options, choice()
        self.layouts = [layouts for _, _, layouts in optimizer.groups_with_layouts()]
        self.has_grad = [grad is not None for grad in grads]
        self.frozen = [p for p, grad in zip(params, grads, strict=True) if grad is None and not p.requires_grad]
        self.state_params, self.states = list(optimizer.state.keys()), list(optimizer.state.values())
        self.members = members
        self._state, self._is_sharded = optimizer.state, any(member.shard for member in members)
        self.is_plain = all(is_plain(member.stored) for member in members)
        # None of the gradients had to be made dense or be cut anew.
        self.is_plain &= same(dense, (local(grad) for grad in grads if grad is not None))
        self.tensors = self._tensors()
        if self.is_plain:
            self.marks, self.grad_marks = Marks.of(self.tensors), Marks.of(dense)
            self.ends = list(map(last_entry, dense))
        self.buckets = prepared_buckets(optimizer, members, dense)
        self.crossing = [
            (m.group, m.shard) for m in members if m.shard and not m.shard.is_solo and m.shard.cut.crosses
        ]
        capturable = [optimizer.param_groups[member.group]["capturable"] for member in members]
        on_host = [m.state["step"] for m, on_device in zip(members, capturable, strict=True) if not on_device]
        # A number is changed through a view of its memory in a tenth of the time that an operation of torch takes.
        arrays: list[Any] = [step.numpy() for step in on_host]
        self._on_host: list[Any] = [memoryview(array) for array in arrays]
        self._on_device = [m.state["step"] for m, on_device in zip(members, capturable, strict=True) if on_device]

    def _tensors(self) -> list[Any]:
        """Return what this process has of the weights and the declared tensors of their state, with None for one that
        is missing."""
        found: list[Any] = [member.param for member in self.members]
        for member in self.members:
            state = member.state if member.shard is None else self._state[member.param]
            found += map(state.get, member.names)
        return list(map(local, found)) if self._is_sharded else found

    def still_holds(
        self, optimizer: StateOwner, params: list[Tensor], grads: list[Tensor | None], options: list[Any]
    ) -> bool:
        """Return whether all tensors are the same at the same addresses, and take this step's gradients if so."""
        if not self.is_plain or len(params) != len(self.params) or not same(params, self.params):
            return False
        if options != self.options or self.choice != choice():
            return False
        if not same((layouts for _, _, layouts in optimizer.groups_with_layouts()), self.layouts):
            return False
        if [grad is not None for grad in grads] != self.has_grad or any(p.requires_grad for p in self.frozen):
            return False
        state = optimizer.state
        if len(state) != len(self.states) or not same(state.keys(), self.state_params):
            return False
        if not same(state.values(), self.states):
            return False
        tensors = self._tensors()
        if not same(tensors, self.tensors) or any(map(_T.is_neg, tensors)):
            return False
        if Marks.of(tensors) != self.marks:
            return False
        if not self._is_sharded:
            return self._take([grad for grad in grads if grad is not None])
        placed = [(grad, param) for grad, param in zip(grads, params, strict=True) if grad is not None]
        return all(is_placed_as(*each) for each in placed) and self._take([local(grad) for grad, _ in placed])

    def _take(self, grads: list[Tensor]) -> bool:
        """Take this step's gradients if they are laid out as those before, wherever they are."""
        if not all(layout is torch.strided for layout in map(_layout, grads)):
            return False
        found, known = Marks.of(grads), self.grad_marks
        if found._replace(addresses=known.addresses) != known:
            return False
        if any(map(_T.is_neg, grads)) or any(map(_T._is_zerotensor, grads)):
            return False
        offsets, sizes = map(_T.storage_offset, grads), [grad.untyped_storage().nbytes() for grad in grads]
        for address, offset, end, size, grad in zip(found.addresses, offsets, self.ends, sizes, grads, strict=True):
            if end and (not address or (offset + end) * grad.itemsize > size):
                return False
        self.grad_marks = found
        self.give(grads)
        return True

    def give(self, grads: list[Tensor]) -> None:
        """Give the buckets their gradients, or none."""
        for each in self.buckets:
            each.bucket.grads = [piece_of(grads[unit.number], unit.where) for unit in each.units] if grads else ()

    def advance(self) -> None:
        """Count a step of every parameter that has a gradient."""
        for count in self._on_host:
            count[()] += 1.0
        if self._on_device:
            torch._foreach_add_(self._on_device, 1)


def prepared_buckets(optimizer: StateOwner, members: list[Member], grads: list[Tensor]) -> list[PreparedBucket]:
    """Divide what is stepped into buckets, in the order of their groups and, of those with one weight, of the weights.

    All processes then take the steps that need collectives of their own in the same order.
    """
    units = units_of(members)
    turns, later = turns_of_overlapping(units), repeats(members)
    found: dict[Any, list[Unit]] = defaultdict(list)
    for unit in units:
        number, member, group = unit.number, unit.member, optimizer.param_groups[unit.member.group]
        grad = piece_of(grads[number], unit.where)
        rule, backend = optimizer.rule_of(member.plan, group), chosen(optimizer, unit, grad, group)
        # A wrapper subclass is stepped by itself.
        alone = number if unit.is_solo or not is_plain(unit.param) else -1
        spread = member.shard.spread if member.shard else ()
        kind = (rule, backend, unit.param.device, member.plan.arithmetic, alone, spread, unit.crosses)
        found[(member.group, *kind, turns.get(id(unit.param), 0), -later[number])].append(unit)
    buckets = []
    for (group_place, rule, backend, device, _, _, spread, crosses, _, earlier), together in found.items():
        shard = together[0].member.shard
        bucket = Bucket(
            rule,
            backend,
            device,
            params=[unit.param for unit in together],
            grads=[piece_of(grads[unit.number], unit.where) for unit in together],
            states=[unit.state for unit in together],
            plans=[unit.plan for unit in together],
            steps=[0] * len(together),  # they are numbered at each step
            noise_keys=[0] * len(together),
            owners=[unit.member.param for unit in together],
            pieces=[(unit.member.shard, unit.piece) for unit in together if unit.member.shard and crosses],
            solo=shard if shard is not None and shard.is_solo else None,
            spread=spread,
        )
        buckets.append(PreparedBucket(bucket, group_place, together, -earlier))
    return sorted(buckets, key=lambda each: each.group)


def chosen(optimizer: StateOwner, unit: Unit, grad: Tensor, group: Group) -> Backend:
    """Return the backend that steps a parameter or a piece of one."""
    shard = unit.member.shard
    if group["compile"]:
        return COMPILED
    if not is_plain(unit.param) or (shard is not None and shard.cut.gathered):
        return RULE  # the tensor to step is made during the step, and its backend is found there
    step, whole = unit.state["step"] if group["capturable"] else 1.0, None if shard is None else shard.tile.whole
    rule = optimizer.rule_of(unit.member.plan, group)
    backend = find_backend(rule, ParamStep(unit.param, grad, unit.state, unit.plan, step, whole=whole))
    if unit.is_solo and not backend.adds_up_shards:
        raise LookupError(
            f"The backend {backend.name!r} does not step shards under the rule {rule!r}: force another one."
        )
    if group["capturable"] and not backend.takes_numbers_on_device:
        warn_of_capturable(unit.param.device.type)
    return backend


def same(found: Iterable[Any], known: Iterable[Any]) -> bool:
    """Return whether two collections of the same length hold the same objects."""
    return all(map(operator.is_, found, known))
