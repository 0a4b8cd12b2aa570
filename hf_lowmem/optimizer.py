"""The one optimizer: it allocates, steps, saves and loads whatever state its algorithms declare."""

from __future__ import annotations

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.adamw_state import check_takes_adamw, from_adamw, is_adamw
from hf_lowmem.checks import (
    check_capturable,
    check_flags,
    check_grad,
    check_group_keys,
    check_hyperparameters,
    check_param,
    check_stored,
    check_whole,
    nearest_option,
)
from hf_lowmem.composed import compiled_step, composed_step
from hf_lowmem.dense import densified, is_dense, is_plain
from hf_lowmem.kernels import Clip, Hyper, KernelKey, Slot, TritonKernel, find_kernel, key_of, warn_of_capturable
from hf_lowmem.kernels.gpu import capturing
from hf_lowmem.kernels.norms import moved, total_norm
from hf_lowmem.log import get_logger
from hf_lowmem.options import HYPERPARAMETERS, describe, show_options
from hf_lowmem.param_layouts import GroupLayouts, ParamLayout, Roles, as_tuple
from hf_lowmem.placement import HostCopies, Transfer
from hf_lowmem.rounding import noise_key
from hf_lowmem.saved_state import (
    FLOATS,
    check_group_sizes,
    check_groups,
    check_layouts,
    check_state,
    copied,
    resized_state,
)
from hf_lowmem.state import FULL_SPACE, KAHAN_COMP, STEP, Rounding, State, StatePlan, TensorSpec, arithmetic_of
from hf_lowmem.update_rules import RULE_FLAGS

logger = get_logger(__name__)

Group = dict[str, Any]
# Of any group; a resumed run may change them.
RUN_OPTIONS = ("compile", "rounding", "rounding_seed", "offload_state", "fused_clip", "capturable")


Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """The function left out of what torch.compile traces: kernels write through addresses, which it cannot see."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


class NoLongerKnown:
    """The roles of a copied optimizer: its parameters are other objects than those that roles were found for."""

    def of(self, param: Tensor) -> None:
        """No parameter is known; those that were there before the copy have their layouts."""


def algorithms() -> set[str]:
    """What the `algorithm` of a group may be: that of any optimizer class."""
    classes, found = [LowMemOptimizer], set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found.add(getattr(cls, "algorithm", ""))
    return found


class Checked(NamedTuple):
    """What was true of a parameter, its state and its group's values when they were last compared with the plan.

    `bucket` says which parameters it is stepped with: those of one kernel and device, wrapper subclasses apart.
    """

    layout: ParamLayout
    values: tuple[Any, ...]
    shape: torch.Size
    dtype: torch.dtype
    pointer: int
    tensors: tuple[tuple[Tensor, torch.Size, int], ...]
    plan: StatePlan
    bucket: tuple[KernelKey, torch.device, bool]

    def still_holds(self, param: Tensor, state: State) -> bool:
        """Whether weight and state are the same tensors at the same addresses, so that nothing need be compared."""
        if self.shape != param.shape or self.dtype is not param.dtype or len(state) != len(self.tensors):
            return False
        if not is_plain(param) or self.pointer != param.data_ptr() or param.is_neg():
            return False
        for mine, (theirs, shape, pointer) in zip(state.values(), self.tensors, strict=True):
            if mine is not theirs or mine.data_ptr() != pointer or mine.shape != shape:
                return False
            if mine.is_neg() or not mine.is_contiguous():
                return False
        return True


class Member(NamedTuple):
    """One parameter to step: its place among all of the optimizer's, its gradient as a dense tensor, and its state."""

    number: int
    param: Tensor
    grad: Tensor
    state: State
    checked: Checked


class LowMemOptimizer(Optimizer):
    """Base of every algorithm: a subclass names its rule, its options and the plan of one parameter's state.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; weight decay is decoupled.
        roles: layout options per parameter, kept beside the groups; those that a group brings win.
        rounding: how a weight narrower than float32 takes an update: "nearest", "stochastic", or "kahan", which keeps
            what was cut off in `kahan_comp`, int16 of the weight's shape.
        rounding_seed: of the noise of "stochastic", which also depends on the parameter's place and its step.
        offload_state: whether `release_state` moves the state to the host until the next step; see `placement.py`.
        fused_clip: whether a `clip_grad_norm_` of accelerate, such as a Trainer's, is left to the one of this class.
        capturable: whether a CUDA graph can capture `step`: `step` and a tensor `lr` are read on the device only.
            Needs an optimizer that projects nothing; excludes `compile` and `offload_state`.
        options: the algorithm's own options. Those that a layout depends on hold for groups that bring none.

    Raises:
        TypeError: an unknown option.
        ValueError: a hyperparameter out of range, an option that does not fit a parameter, or nothing to train.
    """

    algorithm: ClassVar[str]
    rule: ClassVar[str]
    layout_options: ClassVar[dict[str, Any]]  # the options that a state's layout depends on, with their defaults
    schedule_options: ClassVar[dict[str, Any]] = {}  # those that the plan needs too, which a resumed run may change
    idle_calls: ClassVar[int] = 0  # first calls of a parameter that prepare its projection and do not update it

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        roles: Roles | None = None,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        offload_state: bool = False,
        fused_clip: bool = False,
        capturable: bool = False,
        **options: Any,
    ) -> None:
        legal = self._known_options()
        if unknown := set(options) - legal:
            known = {*HYPERPARAMETERS, "roles", *legal}
            meant = nearest_option(name := min(unknown), known)
            raise TypeError(
                f"{type(self).__name__} has no option {name!r}{f', did you mean {meant!r}?' if meant else ';'} it has "
                f"{', '.join(sorted(known))}."
            )
        self._roles = roles
        self._layouts: list[GroupLayouts] = []
        self._layout_defaults = {
            option: as_tuple(options.pop(option, default)) for option, default in self.layout_options.items()
        }
        self._forget_caches()
        run: dict[str, Any] = dict(rounding=rounding, rounding_seed=rounding_seed, offload_state=offload_state)
        run |= dict(fused_clip=fused_clip, capturable=capturable, compile=False)
        betas = as_tuple(betas)
        defaults = (
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **self.schedule_options) | run | options
        )
        check_hyperparameters({**self._layout_defaults, **defaults})
        super().__init__(params, {**defaults, "algorithm": self.algorithm})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("The optimizer got no parameter to train: unfreeze some, or pass a non-empty group.")

    def _forget_caches(self) -> None:
        """Start with what belongs to the next step, and to this process, empty."""
        self._plans: dict[tuple, StatePlan] = {}
        self._checked: dict[Tensor, Checked] = {}
        self._turns: dict[int, int] | None = (
            None  # of weights that share memory with others, by id; None where unknown
        )
        self._host_copies = HostCopies()
        self._rounding_changed: Counter[str] = Counter()
        self._clips: dict[tuple[torch.device, torch.dtype], Clip] = {}  # of the next step, by device and arithmetic
        self._clipped: dict[Tensor, Any] = {}  # weak references to the gradients, by parameter
        self._clip_captured = self._asked_to_clip = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_options(cls)

    def __repr__(self) -> str:
        return describe(self, {**self.defaults, **self._layout_defaults})

    # -- what a subclass defines ------------------------------------------------------------------------------------

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        """The state of a parameter of `shape` under `layout_options` and `schedule_options`."""
        raise NotImplementedError

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """All options that `make_plan` takes, with their defaults."""
        return {**cls.layout_options, **cls.schedule_options}

    @classmethod
    def _known_options(cls) -> set[str]:
        """All options that the constructor and the groups take, beside torch's own hyperparameters."""
        return {*cls.plan_options(), *RULE_FLAGS.get(cls.rule, ()), *RUN_OPTIONS}

    def rule_of(self, plan: StatePlan, group: Group) -> str:
        """The rule that steps a parameter with this plan."""
        return self.rule

    # -- groups -----------------------------------------------------------------------------------------------------

    @not_compiled
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; the layout options of its parameters are kept beside it.

        Raises:
            TypeError: `param_group` is no dict, or its parameters are a set or no tensors.
            ValueError: a hyperparameter out of range, an option that is misspelt or does not fit a parameter, a flag
                of torch's optimizers that this one does not support, or a parameter that is in another group.
        """
        known = {*HYPERPARAMETERS, "algorithm", *self._known_options()}
        if isinstance(param_group, dict):
            check_group_keys(param_group, known, type(self).__name__)
            if param_group.get("algorithm", self.algorithm) not in algorithms():
                raise ValueError(
                    f"A parameter group has algorithm={param_group['algorithm']!r}, a key that says which optimizer "
                    "wrote a checkpoint: give a tag of your own another name."
                )
            param_group["algorithm"] = self.algorithm
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_hyperparameters({key: group[key] for key in known & group.keys()})
            self._layouts.append(self._layouts_of(group))
            schedule = self._schedule(group)
            for param, layout in zip(group["params"], self._layouts[-1].layouts, strict=True):
                check_param(param)
                check_whole(param, layout.name)
                plan = self._plan(layout.options, schedule, tuple(param.shape), param.dtype)
                check_capturable(group, bool(self.idle_calls) or plan.projection is not FULL_SPACE)
        except Exception:
            self.param_groups.pop()
            del self._layouts[len(self.param_groups) :]
            raise

    def _layouts_of(self, group: Group) -> GroupLayouts:
        """The layout of each parameter of a new group: the optimizer's defaults, its role's options, the group's."""
        own = self._own_options(group)
        names = group.get("param_names") or [""] * len(group["params"])
        layouts, unplanned = [], []
        for param, name in zip(group["params"], names, strict=True):
            planned = self._roles.of(param) if self._roles else None
            if self._roles and planned is None:
                unplanned.append(tuple(param.shape))
            role_name, chosen = planned or ("", {})
            options = {**self._layout_defaults, **chosen, **own}
            layouts.append(ParamLayout(role_name or name, tuple(sorted(options.items())), bool(role_name)))
        if unplanned:
            logger.warning(
                "%d parameters are not those of the model that the roles were read from (shapes %s%s): they get the "
                "optimizer's defaults. Build the optimizer from the model that is trained.",
                len(unplanned),
                ", ".join(map(str, unplanned[:3])),
                ", ..." if len(unplanned) > 3 else "",
            )
        return GroupLayouts(
            layouts, {option: as_tuple(group[option]) for option in self.layout_options.keys() & group.keys()}
        )

    def _own_options(self, group: Group) -> dict[str, Any]:
        """The layout options that a group brings, which win over the roles'."""
        return {option: as_tuple(group[option]) for option in self.layout_options if option in group}

    def plan(self, group: Group, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> StatePlan:
        """The plan that a parameter of `shape` and `dtype` has in `group` where no role says otherwise."""
        options = tuple(sorted({**self._layout_defaults, **self._own_options(group)}.items()))
        return self._plan(options, self._schedule(group), tuple(shape), dtype)

    def plan_of(self, param: Tensor) -> StatePlan:
        """The plan of one of the optimizer's parameters.

        Raises:
            KeyError: the optimizer does not have it.
        """
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for member, layout in zip(group["params"], layouts.layouts, strict=True):
                if member is param:
                    return self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)
        raise KeyError(f"The optimizer has no parameter {tuple(param.shape)} that is this one.")

    def _schedule(self, group: Group) -> tuple[Any, ...]:
        """The values of a group that plans depend on and that may change at any step."""
        return tuple([group[option] for option in (*self.schedule_options, "rounding")])

    def _plan(
        self,
        options: tuple[tuple[str, Any], ...],
        schedule: tuple[Any, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> StatePlan:
        key = (options, schedule, shape, dtype)
        found = self._plans.get(key)
        if found is None:
            values = dict(options) | dict(zip((*self.schedule_options, "rounding"), schedule, strict=True))
            check_hyperparameters(values)
            found = self._plans[key] = self.state_plan(shape, dtype, values)
        return found

    @classmethod
    def state_plan(cls, shape: tuple[int, ...], dtype: torch.dtype, values: Mapping[str, Any]) -> StatePlan:
        """The state of a parameter under a group's values."""
        plan = cls.make_plan(shape, **{option: values[option] for option in cls.plan_options()})
        return replace(plan, rounding=Rounding.of(values["rounding"], dtype), arithmetic=arithmetic_of(dtype))

    # -- stepping ---------------------------------------------------------------------------------------------------

    def init_state(self, param: Tensor) -> State:
        """Allocate the declared state of one of the optimizer's parameters, all zero."""
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for member, layout in zip(group["params"], layouts.layouts, strict=True):
                if member is param:
                    return self._init_state(param, layout, self._schedule(group), group)
        raise KeyError(f"The optimizer has no parameter {tuple(param.shape)} that is this one.")

    def _init_state(self, param: Tensor, layout: ParamLayout, schedule: tuple[Any, ...], group: Group) -> State:
        check_whole(param, layout.name)
        plan = self._plan(layout.options, schedule, tuple(param.shape), param.dtype)
        state = {name: spec.zeros(param.device) for name, spec in self._specs(param, plan, group).items()}
        self.state[param] = state
        self._checked.pop(param, None)
        return state

    @staticmethod
    def _specs(param: Tensor, plan: StatePlan, group: Group) -> dict[str, TensorSpec]:
        specs = plan.specs(tuple(param.shape))
        return {**specs, "step": replace(STEP, on_host=not group["capturable"])}

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. A parameter without a gradient is left alone: no decay, and its `step` does not advance.

        Under torch.compile the step is left out of the compiled region and taken as it is.

        Raises:
            RuntimeError: a weight, its gradient or its state do not fit each other; nothing has been stepped then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        self._fetch_state()
        self._warn_of_missed_clipping()
        stepped: list[Tensor] = []
        for group, key, slots in self._buckets(advance=True):
            with _no_autocast(key.device):
                for bucket in [slots] if is_plain(slots[0].param) else [[slot] for slot in slots]:
                    self._run(key, bucket, group)
            stepped += [slot.param for slot in slots]
        # Kernels write through addresses, which autograd does not see.
        torch.autograd.graph.increment_version(stepped)
        self._clips, self._clipped = {}, {}
        for change, weights in self._rounding_changed.items():
            logger.info(
                "Kahan's buffers of %d weights were %s: `rounding` or their dtype has changed.", weights, change
            )
        self._rounding_changed.clear()
        return loss

    @not_compiled
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the next step to a total 2-norm of `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

        They are read once for it, and the step scales them as it reads them. They are written only under SOAP, under
        COAP when a basis changes, and under `compile`. Call it before each step that is to clip, once all gradients
        are there: of several calls the last counts, and a gradient replaced after this call is not clipped.
        A CUDA graph must capture both calls.

        Args:
            max_norm: at least 0; infinity finds the norm and changes nothing.

        Returns:
            The norm before clipping, of all gradients of the optimizer's parameters: 0-D float32, or float64 where
            one of them is float64, on the device of the first.

        Raises:
            ValueError: `max_norm` is negative or no number.
        """
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm} must be a number of at least 0.")
        self._asked_to_clip = True
        self._host_copies.fetch()
        kept: dict[Any, Tensor] = {}
        buckets = self._buckets(advance=False)
        norm = total_norm(((None if group["compile"] else key, slots) for group, key, slots in buckets), kept)
        if max_norm < float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            clipped = [slot for _, _, slots in buckets for slot in slots]
            kinds = {(slot.param.device, slot.plan.arithmetic) for slot in clipped}
            self._clips = {kind: Clip(moved(scale, kind[0]).to(kind[1]), kept) for kind in kinds}
            self._clipped = {slot.param: weakref.ref(slot.param.grad) for slot in clipped}
            self._clip_captured = any(capturing(device) for device, _ in self._clips)
        return norm

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a clipping whose step was not taken is forgotten."""
        self._clips, self._clipped = {}, {}
        super().zero_grad(set_to_none)

    def _buckets(self, advance: bool) -> list[tuple[Group, KernelKey, list[Slot]]]:
        """The parameters with a gradient, all checked, by what a kernel steps together; `advance` counts the step."""
        if len(self.param_groups) != len(self._layouts):
            raise RuntimeError(
                f"The optimizer holds {len(self.param_groups)} parameter groups where {len(self._layouts)} were added:"
                " add groups by optimizer.add_param_group, and build the optimizer anew to remove some."
            )
        for number, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            layouts.check(group, number, self.layout_options)
            check_flags(group, type(self).__name__)
        firsts = accumulate((len(group["params"]) for group in self.param_groups), initial=0)
        members = [self._members(*entry) for entry in zip(self.param_groups, self._layouts, firsts, strict=False)]
        if self._turns is None:
            self._turns = turns_of_overlapping(self._checked)
        found = []
        for group, with_grad in zip(self.param_groups, members, strict=True):
            if advance and with_grad:
                steps = [member.state["step"] for member in with_grad]
                # On the host this is a loop, in which a number would be made a tensor each time.
                torch._foreach_add_(
                    steps, 1 if group["capturable"] else torch.tensor(1.0, dtype=torch.float32, device="cpu")
                )
            buckets: dict[tuple[Any, int, int], list[Slot]] = defaultdict(list)
            for member, later in zip(with_grad, repeats(with_grad), strict=True):
                if member.param.numel():
                    turn = self._turns.get(id(member.param), 0)
                    buckets[member.checked.bucket, turn, -later].append(self._slot(member, group, later))
            found += [(group, bucket[0], slots) for (bucket, *_), slots in buckets.items()]
        return found

    def _members(self, group: Group, layouts: GroupLayouts, first: int) -> list[Member]:
        """The parameters of a group that have a gradient; each trainable one has its state afterwards."""
        schedule, found, owner = self._schedule(group), [], type(self).__name__
        values = (*schedule, group["capturable"], *[group[flag] for flag in RULE_FLAGS.get(self.rule, ())])
        for number, (param, layout) in enumerate(zip(group["params"], layouts.layouts, strict=True), first):
            grad = param.grad
            if grad is None and not param.requires_grad:
                continue
            # Every trainable parameter gets its state, gradient or not, so that all ranks hold the same keys.
            state = self.state.get(param) or self._init_state(param, layout, schedule, group)
            if grad is None:
                continue
            checked = self._checked.get(param)
            if (
                checked is None
                or checked.layout is not layout
                or checked.values != values
                or not checked.still_holds(param, state)
            ):
                checked = self._check(param, layout, schedule, values, group)
            found.append(Member(number, param, check_grad(param, grad, checked.bucket[1], owner), state, checked))
        return found

    def _check(
        self, param: Tensor, layout: ParamLayout, schedule: tuple[Any, ...], values: tuple[Any, ...], group: Group
    ) -> Checked:
        """Compare a weight and its state with their plan; what a change of options or dtype has left is fitted."""
        check_whole(param, layout.name)
        name = layout.name or "A parameter"
        last, state = self._checked.get(param), self.state[param]
        if last is not None and last.shape != param.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(param.shape)}, but its optimizer state was made for {tuple(last.shape)}: if "
                "the weight was resized, call optimizer.resize_state() before the next step."
            )
        if not param.is_floating_point():
            raise RuntimeError(f"{name} of shape {tuple(param.shape)} is {param.dtype}: only floats can be stepped.")
        if param.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{name} of shape {tuple(param.shape)} is an inference tensor, which cannot be updated outside of "
                "torch.inference_mode(): train a clone of it."
            )
        if is_plain(param) and not is_dense(param):
            raise RuntimeError(
                f"{name} of shape {tuple(param.shape)} has no storage that holds all of its entries as they are: "
                "train a plain tensor."
            )
        if is_plain(param) and torch._debug_has_internal_overlap(param) == 1:
            raise RuntimeError(
                f"{name} of shape {tuple(param.shape)} has entries that share memory, as those of an expanded tensor "
                "do: train a clone of it."
            )
        if last is None and not is_plain(param):
            densified(param)  # a class that cannot be read is refused before anything is written
        plan = self._plan(layout.options, schedule, tuple(param.shape), param.dtype)
        specs = self._specs(param, plan, group)
        self._fit_rounding(param, state, plan)
        for key, spec in specs.items():
            # The weight's dtype may have changed since the state was made or saved.
            tensor = state.get(key)
            if isinstance(tensor, Tensor) and {tensor.dtype, spec.dtype} == FLOATS:
                state[key] = tensor.to(spec.dtype)
        check_stored(param, state, specs, name)
        held = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
        tensors = tuple((tensor, tensor.shape, tensor.data_ptr()) for tensor in held)
        self._turns = None
        pointer = param.data_ptr() if is_plain(param) else 0
        kernel = key_of(self.rule_of(plan, group), plan, param.device.type)
        bucket = (kernel, param.device, is_plain(param))
        checked = Checked(layout, values, param.shape, param.dtype, pointer, tensors, plan, bucket)
        self._checked[param] = checked
        if len(self._checked) > sum(len(group["params"]) for group in self.param_groups):  # some were swapped out
            params = [member for group in self.param_groups for member in group["params"] if member in self._checked]
            self._checked = {member: self._checked[member] for member in params}
        return checked

    def _slot(self, member: Member, group: Group, later: int = 0) -> Slot:
        """A member to step; `later` more of its steps have been counted already."""
        number, param, grad, state, checked = member
        plan, clip = checked.plan, None
        step: Any = state["step"] - later if group["capturable"] else state["step"].item() - self.idle_calls - later
        key: Any = 0
        if plan.rounding.kind == "stochastic":
            seed = group["rounding_seed"]
            key = (seed, number) if group["capturable"] else noise_key(seed, number, int(step))
        if self._clipped and param in self._clipped and self._clipped[param]() is param.grad:
            clip = self._clips.get((param.device, plan.arithmetic))
        return Slot(param, grad, state, plan, step, key, clip)

    def _fit_rounding(self, param: Tensor, state: State, plan: StatePlan) -> None:
        # `rounding`, and the weight's dtype, may have changed since the state was made or saved.
        if (KAHAN_COMP in state) != (plan.rounding.kind == "kahan"):
            wanted = plan.rounding.specs(tuple(param.shape))
            state.pop(KAHAN_COMP, None)
            state.update({name: spec.zeros(param.device) for name, spec in wanted.items()})
            self._rounding_changed["started at zero" if wanted else "left out"] += 1

    def _run(self, key: KernelKey, slots: list[Slot], group: Group) -> None:
        """Step the slots of a bucket; a weight that is a wrapper subclass is stepped by itself, as a dense copy."""
        (wrapper, plan), staged = (slots[0].param, slots[0].plan), not is_plain(slots[0].param)
        if staged:
            # A weight that rounds to nearest keeps float32's digits for the wrapper's own rounding.
            dtype = plan.arithmetic if plan.rounding.kind == "nearest" else wrapper.dtype
            slots = [slots[0]._replace(param=densified(wrapper, dtype), grad=slots[0].grad.to(dtype))]
        # Products and compiled steps take one dtype; kernels and rules read any.
        slots = [
            slot._replace(grad=slot.grad.to(slot.plan.arithmetic))
            if slot.grad.dtype != slot.param.dtype and (group["compile"] or slot.plan.projection is not FULL_SPACE)
            else slot
            for slot in slots
        ]
        slots = [slot.clipped() if slot.plan.projection.takes_gradient(slot.state) else slot for slot in slots]
        # A basis is found from numbers, which a gradient on the meta device does not have.
        projected = [s for s in slots if s.plan.projection is not FULL_SPACE and not s.grad.is_meta]
        for _, grad, state, plan, *_ in projected:
            plan.projection.before_step(grad, state, plan.bind(state))
        active = [slot for slot in slots if slot.step > 0] if self.idle_calls else slots
        if active:
            self._update(key, active, group)
        for _, grad, state, plan, *_ in projected:
            plan.projection.after_step(grad, state, plan.bind(state), group["betas"][1])
        if staged:
            wrapper.copy_(slots[0].param)

    def _update(self, key: KernelKey, slots: list[Slot], group: Group) -> None:
        beta1, beta2 = group["betas"]
        flags = {flag: group[flag] for flag in RULE_FLAGS.get(key.rule, ())}
        lr = group["lr"]
        on_device = group["capturable"] and isinstance(lr, Tensor) and lr.device == slots[0].param.device
        lr = lr.reshape(()) if on_device else float(lr)
        hyper = Hyper(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"], flags)
        kernel = None if group["compile"] or not is_plain(slots[0].param) else find_kernel(key)
        if group["capturable"]:  # the other kernels take their numbers from the host
            if isinstance(kernel, TritonKernel):
                slots = kernel.step(slots, hyper)
            else:
                warn_of_capturable(key.device)
            kernel = None
        if kernel:
            kernel(slots, hyper)
            return
        for slot in slots:
            (compiled_step if group["compile"] else composed_step)(key.rule, slot, hyper)

    # -- state ------------------------------------------------------------------------------------------------------

    def release_state(self) -> None:
        """Move the state of groups with `offload_state` to the host, until the next `step` brings it back.

        On CUDA it returns at once. State that is on the CPU stays where it is.
        """
        offloaded = [param for group in self.param_groups if group["offload_state"] for param in group["params"]]
        self._host_copies.release((param, self.state[param]) for param in offloaded if param in self.state)

    def _fetch_state(self) -> None:
        self._host_copies.fetch()
        offloads = any(group["offload_state"] for group in self.param_groups)
        if offloads and not self._host_copies.used and self._has_stepped():
            self._host_copies.used = True
            logger.warning(
                "offload_state=true, but the state stays on the device: hf_lowmem.register() adds the callback that "
                "moves it, or call release_state() after each step."
            )

    def _has_stepped(self) -> bool:
        params = (param for group in self.param_groups for param in group["params"])
        return any(self.state.get(param, {}).get("step", 0) > 0 for param in params)

    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()
        if self._clips and any(capturing(device) for device, _ in self._clips) != self._clip_captured:
            raise RuntimeError(
                "clip_grad_norm_ was called outside of the CUDA graph that captures its step: capture both in one."
            )

    def _warn_of_missed_clipping(self) -> None:
        if not self._asked_to_clip and any(group["fused_clip"] for group in self.param_groups):
            self._asked_to_clip = True  # to say it once
            logger.warning(
                "fused_clip=true, but the optimizer was not asked to clip: hf_lowmem.register() lets a Trainer's "
                "max_grad_norm do so, or call optimizer.clip_grad_norm_(max_norm) before each step."
            )

    def synchronize_state(self) -> None:
        """Wait until state that `release_state` is moving to the host can be read there."""
        self._host_copies.synchronize()

    def state_transferred(self) -> Transfer:
        """What `release_state` and the steps after it have moved, both ways, since the last call of this method."""
        return self._host_copies.transferred()

    @not_compiled
    @torch.no_grad()
    def resize_state(self) -> None:
        """Fit the state to weights whose first axis has become longer or shorter, as of an extended vocabulary.

        Rows that were there keep their state, and new ones start at zero. Call it after the weights were resized and
        before the next step; it does nothing where all state fits.

            model.resize_token_embeddings(len(tokenizer))
            optimizer.resize_state()

        Raises:
            RuntimeError: the state cannot be carried over: another axis has changed, or the weight is projected.
        """
        self._host_copies.fetch()
        resized: dict[Tensor, State] = {}
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for param, layout in zip(group["params"], layouts.layouts, strict=True):
                if self.state.get(param):
                    plan = self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)
                    specs = self._specs(param, plan, group)
                    resized[param] = resized_state(param, self.state[param], specs, layout.name or "A parameter")
        for param, state in resized.items():
            self.state[param] = state
            self._checked.pop(param, None)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters and state, as plain numbers and tensors.

        Beside torch's own keys, `layouts` has the name and the layout options of each parameter, by group.
        """
        self.synchronize_state()
        found = super().state_dict()
        for group in found["param_groups"]:
            group["algorithm"] = self.algorithm  # the group's own may be of another optimizer that has it too
        return {**found, "layouts": [layouts.saved() for layouts in self._layouts]}

    def __getstate__(self) -> dict[str, Any]:
        self._host_copies.fetch()
        kept = {"_layouts": self._layouts, "_layout_defaults": self._layout_defaults}
        return {**super().__getstate__(), **kept, "_roles": NoLongerKnown() if self._roles else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_caches()
        super().__setstate__(state)

    def _optim_name(self) -> str:
        """The optim name that users know this optimizer by."""
        return f"{self.algorithm}_8bit" if self._layout_defaults["state_bits"] == 8 else self.algorithm

    @not_compiled
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: hyperparameters and bit-exact state.

        Options that neither the state's layout nor torch's own hyperparameters depend on stay this run's, `rounding`
        too: at the next step a Kahan buffer that is missing starts at zero, one that is of no use is left out.

        torch's own loader would cast every tensor, 8-bit codes too, to the parameter's dtype, and keep references.
        The state of torch's AdamW is taken over where the optimizer's moments are AdamW's; see `adamw_state.py`.

        Raises:
            ValueError: the state was written by another algorithm, or under other rules, sizes or `state_bits`.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        adamw = is_adamw(saved_groups, state_dict["state"])
        if adamw:
            check_takes_adamw(saved_groups, self.rule, self._optim_name())
            check_group_sizes(self.param_groups, saved_groups)
        else:
            check_groups(self.param_groups, saved_groups, self.algorithm, self._optim_name())
        for saved_group in saved_groups:
            check_flags({} if adamw else saved_group, type(self).__name__)
        check_layouts(self._layouts, state_dict.get("layouts"), saved_groups)
        loaded: dict[Tensor, State] = {}
        for group, layouts, saved_group in zip(self.param_groups, self._layouts, saved_groups, strict=True):
            for param, layout, key in zip(group["params"], layouts.layouts, saved_group["params"], strict=True):
                if saved := state_dict["state"].get(key):
                    plan = self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)
                    if adamw:
                        saved = from_adamw(saved, plan, tuple(param.shape))
                    specs = self._specs(param, plan, group)
                    check_state(saved, specs, tuple(param.shape))
                    with torch.inference_mode(False):  # a later step may be outside of it
                        loaded[param] = {name: copied(value, specs.get(name), param) for name, value in saved.items()}
        kept = {"params", *RUN_OPTIONS, *self.plan_options(), *RULE_FLAGS.get(self.rule, ())}
        for number, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            lr, keeps = group["lr"], kept | ({"param_names"} & group.keys())
            taken_over = {
                k: v for k, v in saved_group.items() if k not in keeps and (k in HYPERPARAMETERS or not adamw)
            }
            group.update(copy.deepcopy(taken_over))
            if isinstance(lr, Tensor):  # which a scheduler or a captured graph may hold
                rate, earlier = float(group["lr"]), self.param_groups[:number]
                taken = any(other["lr"] is lr for other in earlier) and float(lr) != rate
                group["lr"] = torch.full_like(lr, rate) if taken else lr.fill_(rate)
        self._host_copies.forget()
        self._checked.clear()
        known = {key for saved_group in saved_groups for key in saved_group["params"]}
        self.state.clear()
        # What belongs to no weight is the user's, and is carried along as torch carries it.
        self.state.update({key: value for key, value in state_dict["state"].items() if key not in known})
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def repeats(members: list[Member]) -> list[int]:
    """For each member, how often its parameter comes again after it.

    torch steps a parameter as often as its group names it, one time after the other.
    """
    left = Counter(id(member.param) for member in members)
    if len(left) == len(members):
        return [0] * len(members)
    left.subtract(left.keys())
    found = []
    for member in members:
        found.append(left[id(member.param)])
        left[id(member.param)] -= 1
    return found


def turns_of_overlapping(checked: Mapping[Tensor, Checked]) -> dict[int, int]:
    """For parameters that share memory with others, by id: which of them is stepped when.

    A kernel steps the parameters of a bucket on several threads, which must not write the same entries.
    """
    spans = sorted(
        (
            each.pointer,
            each.pointer + param.untyped_storage().nbytes()
            if not param.is_contiguous()
            else each.pointer + param.nbytes,
            number,
            id(param),
        )
        for number, (param, each) in enumerate(checked.items())
        if each.pointer
    )
    turns: dict[int, int] = {}
    reach = turn = 0
    for start, end, _, param_id in spans:
        turn = turn + 1 if start < reach else 0
        reach = max(reach, end)
        if turn:
            turns[param_id] = turn
    return turns


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
