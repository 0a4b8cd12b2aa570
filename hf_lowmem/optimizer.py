"""The one optimizer: it allocates, steps, saves and loads whatever state its algorithms declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem import checkpoint
from hf_lowmem.buckets import Buckets
from hf_lowmem.checks import check_flags, check_group_keys, nearest_option
from hf_lowmem.clipping import Clipping
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.log import get_logger
from hf_lowmem.option_help import describe, show_options
from hf_lowmem.options import HYPERPARAMETERS, Hyperparameters, Options
from hf_lowmem.param_layouts import GroupLayouts, ParamLayout, Roles, as_tuple
from hf_lowmem.placement import HostCopies, Transfer
from hf_lowmem.state import FULL_SPACE, STEP, Rounding, State, StatePlan, TensorSpec, arithmetic_of
from hf_lowmem.step_checks import check_capturable, check_param, check_whole
from hf_lowmem.stepping import step_bucket
from hf_lowmem.update_rules import RULE_FLAGS

logger = get_logger(__name__)

Group = dict[str, Any]
RUN_OPTIONS = tuple(Options.defaults("run"))
CLASS_DEFAULT: Any = ...  # stands for the default of the class whose object is made


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


class LowMemOptimizer(Optimizer):
    """The base of every algorithm. A subclass names its update rule and its options, and plans a parameter's state.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr, betas, eps, weight_decay: hyperparameters, as for `torch.optim.AdamW`; weight decay is decoupled.
        roles: layout options per parameter, kept beside the groups; those that a group brings win.
        options: the options of `options_cls`. Those that a layout depends on hold for groups that bring none.

    Raises:
        TypeError: an option is unknown.
        ValueError: a value is not legal, an option does not fit a parameter, or there is nothing to train.
    """

    algorithm: ClassVar[str]
    rule: ClassVar[str]
    options_cls: ClassVar[type[Options]] = Options
    hyperparameters: ClassVar[Hyperparameters] = Hyperparameters()  # the defaults of lr, betas, eps and weight_decay
    idle_calls: ClassVar[int] = 0  # first calls of a parameter that prepare its projection and do not update it
    # These are read from `options_cls`: options with their defaults, by what depends on them.
    layout_options: ClassVar[dict[str, Any]]
    schedule_options: ClassVar[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = CLASS_DEFAULT,
        betas: tuple[float, float] = CLASS_DEFAULT,
        eps: float = CLASS_DEFAULT,
        weight_decay: float = CLASS_DEFAULT,
        *,
        roles: Roles | None = None,
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
        given = {**dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), **options}
        given = {name: value for name, value in given.items() if value is not CLASS_DEFAULT}
        values = {**vars(self.hyperparameters), **self.options_cls.defaults(), **given}
        values = {name: as_tuple(value) for name, value in values.items()}
        for name, default in self.layout_options.items():
            if default == ():  # an option of several values, for which None and any iterable will do
                values[name] = as_tuple(tuple(values[name] or ()))
        self.check_values(values)
        self._roles = roles
        self._layouts: list[GroupLayouts] = []
        self._layout_defaults = {option: values.pop(option) for option in self.layout_options}
        self._forget_caches()
        super().__init__(params, {**values, "algorithm": self.algorithm})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError("The optimizer got no parameter to train: unfreeze some, or pass a non-empty group.")

    def _forget_caches(self) -> None:
        """Start with what belongs to the next step, and to this process, empty."""
        self._plans: dict[tuple, StatePlan] = {}
        self._buckets, self._clipping, self._host_copies = Buckets(), Clipping(), HostCopies()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.layout_options = cls.options_cls.defaults("layout", "role")
        cls.schedule_options = cls.options_cls.defaults("schedule")
        show_options(cls)

    def __repr__(self) -> str:
        return describe(self, {**self.defaults, **self._layout_defaults})

    # -- what a subclass defines ------------------------------------------------------------------------------------

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
        """Return the plan of a parameter of `shape` under `layout_options` and `schedule_options`."""
        raise NotImplementedError

    @classmethod
    def plan_options(cls) -> dict[str, Any]:
        """Return all options that `make_plan` takes, with their defaults."""
        return {**cls.layout_options, **cls.schedule_options}

    @classmethod
    def _known_options(cls) -> set[str]:
        """Return all options that the constructor and the groups take, beside torch's own hyperparameters."""
        return set(cls.options_cls.declared())

    @classmethod
    def check_values(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError for the first hyperparameter or option in `values` that is not legal."""
        cls.hyperparameters.check_values(values)
        cls.options_cls.check_values(values)

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
            self.check_values({key: group[key] for key in known & group.keys()})
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
            self.check_values(values)
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
        for _, group, layouts in self.groups_with_layouts():
            for member, layout in zip(group["params"], layouts, strict=True):
                if member is param:
                    return self.allocate(param, layout, group)
        raise KeyError(f"The optimizer has no parameter {tuple(param.shape)} that is this one.")

    def groups_with_layouts(self) -> Iterator[tuple[int, Group, list[ParamLayout]]]:
        """Return each group's number, the group, and the layouts of its parameters."""
        for number, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            yield number, group, layouts.layouts

    def allocate(self, param: Tensor, layout: ParamLayout, group: Group) -> State:
        """Allocate the declared state of a parameter of a group, all zero."""
        check_whole(param, layout.name)
        specs = self.specs_of(param, self.plan_by(layout, group, param), group)
        state = self.state[param] = {name: spec.zeros(param.device) for name, spec in specs.items()}
        self._buckets.forget(param)
        return state

    def plan_by(self, layout: ParamLayout, group: Group, param: Tensor) -> StatePlan:
        """Return the plan of a parameter of a group."""
        return self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)

    @staticmethod
    def specs_of(param: Tensor, plan: StatePlan, group: Group) -> dict[str, TensorSpec]:
        """Return the state tensors that a parameter of a group is to have."""
        specs = plan.specs(tuple(param.shape))
        return {**specs, "step": replace(STEP, on_host=not group["capturable"])}

    def step_options(self, group: Group) -> tuple[Any, ...]:
        """Return the values of a group that its parameters' plans and backends depend on."""
        flags = [group[flag] for flag in RULE_FLAGS.get(self.rule, ())]
        return (*self._schedule(group), group["capturable"], group["compile"], *flags)

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
        self._clipping.warn_if_missed(self.param_groups)
        stepped: list[Tensor] = []
        for number, bucket in self._found_buckets(advance=True):
            group = self.param_groups[number]
            with _no_autocast(bucket.device.type):
                for part in self._clipping.applied(bucket):
                    step_bucket(part, self._hyper(group, part))
            stepped += bucket.params
        # Kernels write through addresses, which autograd does not see.
        torch.autograd.graph.increment_version(stepped)
        self._clipping.forget()
        for change, weights in self._buckets.rounding_changed.items():
            logger.info(
                "Kahan's buffers of %d weights were %s: `rounding` or their dtype has changed.", weights, change
            )
        self._buckets.rounding_changed.clear()
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
        self._host_copies.fetch()
        return self._clipping.find([bucket for _, bucket in self._found_buckets(advance=False)], max_norm)

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; a clipping whose step was not taken is forgotten."""
        self._clipping.forget()
        super().zero_grad(set_to_none)

    def _found_buckets(self, advance: bool) -> list[tuple[int, Bucket]]:
        """Return the checked buckets with the number of their group."""
        if len(self.param_groups) != len(self._layouts):
            raise RuntimeError(
                f"The optimizer holds {len(self.param_groups)} parameter groups where {len(self._layouts)} were added:"
                " add groups by optimizer.add_param_group, and build the optimizer anew to remove some."
            )
        for number, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=True)):
            layouts.check(group, number, self.layout_options)
            check_flags(group, type(self).__name__)
        return self._buckets.find(self, advance)

    @staticmethod
    def _hyper(group: Group, bucket: Bucket) -> Hyper:
        (beta1, beta2), lr = group["betas"], group["lr"]
        on_device = group["capturable"] and isinstance(lr, Tensor) and lr.device == bucket.device
        lr = lr.reshape(()) if on_device else float(lr)
        flags = {flag: group[flag] for flag in RULE_FLAGS.get(bucket.rule, ())}
        return Hyper(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"], flags)

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
        self._clipping.check_capture()

    def synchronize_state(self) -> None:
        """Wait until state that `release_state` is moving to the host can be read there."""
        self._host_copies.synchronize()

    def state_transferred(self) -> Transfer:
        """Return what `release_state` and the steps after it have moved, both ways, since the last call."""
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
        for _, group, layouts in self.groups_with_layouts():
            for param, layout in zip(group["params"], layouts, strict=True):
                if self.state.get(param):
                    specs = self.specs_of(param, self.plan_by(layout, group, param), group)
                    name = layout.name or "A parameter"
                    resized[param] = checkpoint.resized_state(param, self.state[param], specs, name)
        for param, state in resized.items():
            self.state[param] = state
            self._buckets.forget(param)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters and state, as plain numbers and tensors.

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

    @property
    def optim_name(self) -> str:
        """The optim name that users know this optimizer by."""
        return f"{self.algorithm}_8bit" if self._layout_defaults["state_bits"] == 8 else self.algorithm

    @property
    def kept_options(self) -> set[str]:
        """The keys of a group that stay this run's when a checkpoint is loaded."""
        return {"params", *RUN_OPTIONS, *self.plan_options(), *RULE_FLAGS.get(self.rule, ())}

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
        loaded = checkpoint.load(self, self._layouts, state_dict)
        self._host_copies.forget()
        self._buckets.forget()
        self.state.clear()
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
