"""The one optimizer: it allocates, steps, saves and loads whatever state its algorithms declare."""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.checks import (
    check_capturable,
    check_groups,
    check_hyperparameters,
    check_param,
    check_state,
    check_unsharded,
)
from hf_lowmem.composed import compiled_step, composed_step
from hf_lowmem.kernels import Clip, Hyper, KernelKey, Slot, TritonKernel, find_kernel, key_of, warn_of_capturable
from hf_lowmem.kernels.gpu import capturing
from hf_lowmem.kernels.norms import moved, total_norm
from hf_lowmem.placement import HostCopies, Transfer
from hf_lowmem.rounding import noise_key
from hf_lowmem.state import FULL_SPACE, KAHAN_COMP, STEP, Rounding, State, StatePlan, TensorSpec
from hf_lowmem.update_rules import RULE_FLAGS

logger = logging.getLogger(__name__)

Group = dict[str, Any]
# Of any group; a resumed run may change them.
RUN_OPTIONS = ("compile", "rounding", "rounding_seed", "offload_state", "fused_clip", "capturable")


def as_tuple(value: Any) -> Any:
    """Lists as tuples, nested ones too: group values are compared, hashed and saved."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


class Roles(Protocol):
    """Which options each parameter of a model gets: the seam between a model's roles and the optimizer's groups."""

    def of(self, param: Tensor) -> tuple[str, dict[str, Any]] | None:
        """(name, options) of a parameter, or None if it is not known; the options become plain values of its group."""


class LowMemOptimizer(Optimizer):
    """Base of every algorithm: a subclass names its rule, its options and the plan of one parameter's state.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; weight decay is decoupled.
        roles: options per parameter; each incoming group is split by them. Options given in a group win.
        rounding: how a weight narrower than float32 takes an update: "nearest", "stochastic", or "kahan", which keeps
            what was cut off in `kahan_comp`, int16 of the weight's shape.
        rounding_seed: of the noise of "stochastic", which also depends on the parameter's place and its step.
        offload_state: whether `release_state` moves the state to the host until the next step; see `placement.py`.
        fused_clip: whether a `clip_grad_norm_` of accelerate, such as a Trainer's, is left to the one of this class.
        capturable: whether a CUDA graph can capture `step`: `step` and a tensor `lr` are read on the device only.
            Needs an optimizer that projects nothing; excludes `compile` and `offload_state`.
        options: the algorithm's own options, the defaults of every group.

    Raises:
        TypeError: an unknown option.
        ValueError: a hyperparameter out of range, an option that does not fit a parameter, or nothing to train.
    """

    algorithm: ClassVar[str]
    rule: ClassVar[str]
    layout_options: ClassVar[dict[str, Any]]  # the group values that a state's layout depends on, with their defaults
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
        legal = {*self.plan_options(), *RULE_FLAGS.get(self.rule, ()), "compile"}
        if unknown := set(options) - legal:
            raise TypeError(
                f"{type(self).__name__} has no option {min(unknown)!r}; it has {', '.join(sorted(legal))}."
            )
        self._roles = roles
        self._plans: dict[tuple, StatePlan] = {}
        self._host_copies = HostCopies()
        self._rounding_changed: Counter[str] = Counter()
        self._clips: dict[torch.device, Clip] = {}  # of the next step
        self._clipped: dict[Tensor, Any] = {}  # weak references to the gradients, by parameter
        self._clip_captured = self._asked_to_clip = False
        run: dict[str, Any] = dict(rounding=rounding, rounding_seed=rounding_seed, offload_state=offload_state)
        run |= dict(fused_clip=fused_clip, capturable=capturable)
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **run, **options)
        check_hyperparameters(defaults)
        super().__init__(params, {**defaults, "algorithm": self.algorithm})
        if not self.param_groups:
            raise ValueError("The optimizer got no parameter to train: unfreeze some, or pass a non-empty group.")

    # -- what a subclass defines ------------------------------------------------------------------------------------

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        """The state of a parameter of `shape` under the group's `layout_options` and `schedule_options`."""
        raise NotImplementedError

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """All options that `make_plan` takes, with their defaults."""
        return {**cls.layout_options, **cls.schedule_options}

    def rule_of(self, plan: StatePlan, group: Group) -> str:
        """The rule that steps a parameter with this plan."""
        return self.rule

    # -- groups -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split by the options that the roles give its parameters."""
        group = dict(param_group)
        params = group.pop("params")
        named = [params] if isinstance(params, Tensor) else list(params)
        if self._roles is None:
            if named:
                self._add_checked({**group, "params": named})
            return
        split: dict[tuple, list[tuple[str, Tensor]]] = defaultdict(list)
        unplanned = []
        for number, entry in enumerate(named, start=sum(len(g["params"]) for g in self.param_groups)):
            name, param = entry if isinstance(entry, tuple) else (f"unnamed.{number}", entry)
            planned = self._roles.of(param)
            if planned is None:
                unplanned.append(tuple(param.shape))
            name, options = planned or (name, {})
            split[tuple(sorted(options.items()))].append((name, param))
        if unplanned:
            logger.warning(
                "%d parameters are not those of the model that the roles were read from (shapes %s%s): they get the "
                "optimizer's defaults. Build the optimizer from the model that is trained.",
                len(unplanned),
                ", ".join(map(str, unplanned[:3])),
                ", ..." if len(unplanned) > 3 else "",
            )
        for chosen, members in split.items():
            self._add_checked({**dict(chosen), **group, "params": members})

    def _add_checked(self, group: dict[str, Any]) -> None:
        group.update({option: as_tuple(group[option]) for option in self.plan_options() if option in group})
        check_hyperparameters(group)
        super().add_param_group(group)
        added = self.param_groups[-1]
        try:
            for param in added["params"]:
                check_param(param)
                plan = self.plan(added, tuple(param.shape), param.dtype)
                check_capturable(added, bool(self.idle_calls) or plan.projection is not FULL_SPACE)
        except Exception:
            self.param_groups.pop()
            raise

    def plan(self, group: Group, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> StatePlan:
        """The plan of a parameter of `shape` and `dtype` in `group`; a function of these alone."""
        return self._plans_of(group)(shape, dtype)

    def _plans_of(self, group: Group) -> Callable[[tuple[int, ...], torch.dtype], StatePlan]:
        """`plan` for the parameters of one group."""
        values = tuple(group[option] for option in (*self.plan_options(), "rounding"))

        def plan(shape: tuple[int, ...], dtype: torch.dtype) -> StatePlan:
            found = self._plans.get((shape, dtype, values))
            if found is None:
                found = self._plans[shape, dtype, values] = self.state_plan(tuple(shape), dtype, group)
            return found

        return plan

    @classmethod
    def state_plan(cls, shape: tuple[int, ...], dtype: torch.dtype, values: Mapping[str, Any]) -> StatePlan:
        """The state of a parameter under a group's values."""
        plan = cls.make_plan(shape, **{option: values[option] for option in cls.plan_options()})
        return replace(plan, rounding=Rounding.of(values["rounding"], dtype))

    # -- stepping ---------------------------------------------------------------------------------------------------

    def init_state(self, param: Tensor, group: Group) -> State:
        """Allocate the declared state of one parameter, all zero."""
        check_unsharded(param)
        specs = self._specs(param, group)
        state = {name: spec.zeros(param.device) for name, spec in specs.items()}
        self.state[param] = state
        return state

    def _specs(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        specs = self.plan(group, tuple(param.shape), param.dtype).specs(tuple(param.shape))
        return {**specs, "step": replace(STEP, on_host=not group["capturable"])}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. A parameter without a gradient is left alone: no decay, and its `step` does not advance."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        self._fetch_state()
        self._warn_of_missed_clipping()
        for group, key, slots in self._buckets(advance=True):
            with torch.autocast(key.device, enabled=False):
                self._run(key, slots, group)
        self._clips, self._clipped = {}, {}
        for change, weights in self._rounding_changed.items():
            logger.info(
                "Kahan's buffers of %d weights were %s: `rounding` or their dtype has changed.", weights, change
            )
        self._rounding_changed.clear()
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the next step to a total 2-norm of `max_norm`, as torch.nn.utils.clip_grad_norm_ does.

        They are read once for it, and the step scales them as it reads them. They are written only under SOAP, under
        COAP when a basis changes, and under `compile`. Call it before each step that is to clip, once all gradients
        are there: of several calls the last counts, and a gradient that another has taken the place of is not clipped.
        A CUDA graph must capture both calls.

        Args:
            max_norm: at least 0; infinity finds the norm and changes nothing.

        Returns:
            The norm before clipping, of all gradients of the optimizer's parameters: 0-D float32, on the device of
            the first.

        Raises:
            ValueError: `max_norm` is negative or no number.
        """
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm} must be a number of at least 0.")
        self._asked_to_clip = True
        self._host_copies.fetch()
        kept: dict[Any, Tensor] = {}
        buckets = list(self._buckets(advance=False))
        norm = total_norm(((None if group["compile"] else key, slots) for group, key, slots in buckets), kept)
        if max_norm < float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            clipped = [slot for _, _, slots in buckets for slot in slots]
            self._clips = {device: Clip(moved(scale, device), kept) for device in {s.param.device for s in clipped}}
            self._clipped = {slot.param: weakref.ref(slot.grad) for slot in clipped}
            self._clip_captured = any(map(capturing, self._clips))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a clipping whose step was not taken is forgotten."""
        self._clips, self._clipped = {}, {}
        super().zero_grad(set_to_none)

    def _buckets(self, advance: bool) -> Iterator[tuple[Group, KernelKey, list[Slot]]]:
        """The parameters with a gradient, those of a group that a kernel steps together; `advance` counts the step."""
        first = 0
        for group in self.param_groups:
            buckets: dict[tuple[KernelKey, torch.device], list[Slot]] = defaultdict(list)
            members = [
                (number, param) for number, param in enumerate(group["params"], first) if self._has_grad(param, group)
            ]
            if advance and members:
                steps = [self.state[param]["step"] for _, param in members]
                # On the host this is a loop, in which a number would be made a tensor each time.
                torch._foreach_add_(
                    steps, 1 if group["capturable"] else torch.tensor(1.0, dtype=torch.float32, device="cpu")
                )
            plan_of = self._plans_of(group)
            for number, param in members:
                slot = self._slot(param, group, number, plan_of(param.shape, param.dtype))
                key = key_of(self.rule_of(slot.plan, group), slot.plan, param.device.type)
                if param.numel():
                    buckets[key, param.device].append(slot)
            for (key, _), slots in buckets.items():
                yield group, key, slots
            first += len(group["params"])

    def _has_grad(self, param: Tensor, group: Group) -> bool:
        # Every trainable parameter gets its state at the first step, gradient or not: all ranks hold the same keys.
        if param.grad is None and not param.requires_grad:
            return False
        if not self.state.get(param):
            self.init_state(param, group)
        if param.grad is not None and param.grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients (parameter of shape {tuple(param.shape)}): "
                "use sparse=False in the embedding."
            )
        return param.grad is not None

    def _slot(self, param: Tensor, group: Group, number: int, plan: StatePlan) -> Slot:
        state = self.state[param]
        self._fit_rounding(param, state, plan)
        step: Any = state["step"] if group["capturable"] else state["step"].item() - self.idle_calls
        key: Any = 0
        if plan.rounding.kind == "stochastic":
            seed = group["rounding_seed"]
            key = (seed, number) if group["capturable"] else noise_key(seed, number, int(step))
        assert param.grad is not None
        clips = param in self._clipped and self._clipped[param]() is param.grad
        return Slot(param, param.grad, state, plan, step, key, self._clips.get(param.device) if clips else None)

    def _fit_rounding(self, param: Tensor, state: State, plan: StatePlan) -> None:
        # `rounding`, and the weight's dtype, may have changed since the state was made or saved.
        if (KAHAN_COMP in state) != (plan.rounding.kind == "kahan"):
            wanted = plan.rounding.specs(tuple(param.shape))
            state.pop(KAHAN_COMP, None)
            state.update({name: spec.zeros(param.device) for name, spec in wanted.items()})
            self._rounding_changed["started at zero" if wanted else "left out"] += 1

    def _run(self, key: KernelKey, slots: list[Slot], group: Group) -> None:
        slots = [slot.clipped() if slot.plan.projection.takes_gradient(slot.state) else slot for slot in slots]
        projected = [slot for slot in slots if slot.plan.projection is not FULL_SPACE]
        for _, grad, state, plan, *_ in projected:
            plan.projection.before_step(grad, state, plan.bind(state))
        active = [slot for slot in slots if slot.step > 0] if self.idle_calls else slots
        if active:
            self._update(key, active, group)
        for _, grad, state, plan, *_ in projected:
            plan.projection.after_step(grad, state, plan.bind(state), group["betas"][1])

    def _update(self, key: KernelKey, slots: list[Slot], group: Group) -> None:
        beta1, beta2 = group["betas"]
        flags = {flag: group[flag] for flag in RULE_FLAGS.get(key.rule, ())}
        lr = group["lr"]
        if not (group["capturable"] and isinstance(lr, Tensor) and lr.device == slots[0].param.device):
            lr = float(lr)
        hyper = Hyper(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"], flags)
        kernel = None if group["compile"] else find_kernel(key)
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
        if offloads and not self._host_copies.used and any(state.get("step", 0) > 0 for state in self.state.values()):
            self._host_copies.used = True
            logger.warning(
                "offload_state=true, but the state stays on the device: hf_lowmem.register() adds the callback that "
                "moves it, or call release_state() after each step."
            )

    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()
        if self._clips and any(map(capturing, self._clips)) != self._clip_captured:
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

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters and state, as plain numbers and tensors."""
        self.synchronize_state()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._host_copies.fetch()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._roles = None  # parameters are other objects after a copy; the groups hold all that is needed
        self._plans = {}
        self._host_copies = HostCopies()
        self._rounding_changed = Counter()
        self._clips, self._clipped, self._clip_captured, self._asked_to_clip = {}, {}, False, False
        super().__setstate__(state)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: hyperparameters and bit-exact state.

        Options that neither the state's layout nor torch's own hyperparameters depend on stay this run's, `rounding`
        too: at the next step a Kahan buffer that is missing starts at zero, one that is of no use is left out.

        torch's own loader would cast every tensor, 8-bit codes too, to the parameter's dtype, and keep references.

        Raises:
            ValueError: the state was written by another algorithm, or under other rules, sizes or `state_bits`.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_groups = state_dict["param_groups"]
        check_groups(self.param_groups, saved_groups, self.layout_options)
        loaded: dict[Tensor, State] = {}
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for param, key in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(key)
                if saved:
                    specs = self._specs(param, group)
                    check_state(saved, specs, tuple(param.shape))
                    loaded[param] = {
                        name: tensor.to(specs[name].place(param.device) if name in specs else param.device, copy=True)
                        for name, tensor in saved.items()
                    }
        for number, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            kept = ("params", "param_names", *RUN_OPTIONS, *self.schedule_options, *RULE_FLAGS.get(self.rule, ()))
            lr = group["lr"]
            group.update(copy.deepcopy({k: v for k, v in saved_group.items() if k not in kept}))
            if isinstance(lr, Tensor):  # which a scheduler or a captured graph may hold
                rate, earlier = float(group["lr"]), self.param_groups[:number]
                taken = any(other["lr"] is lr for other in earlier) and float(lr) != rate
                group["lr"] = torch.full_like(lr, rate) if taken else lr.fill_(rate)
        self._host_copies.forget()
        self.state.clear()
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
