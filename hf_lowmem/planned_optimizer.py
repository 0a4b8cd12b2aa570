"""The groups of an optimizer and the plans of their parameters: all that an optimizer knows before it steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.checks import check_group_keys, nearest_option
from hf_lowmem.log import get_logger
from hf_lowmem.option_help import describe, show_options
from hf_lowmem.options import HYPERPARAMETERS, Hyperparameters, Options
from hf_lowmem.param_layouts import GroupLayouts, ParamLayout, Roles, as_tuple
from hf_lowmem.sharding import is_sharded, tile_of
from hf_lowmem.shards import is_gathered
from hf_lowmem.state import FULL_SPACE, STEP, Rounding, StatePlan, TensorSpec, arithmetic_of
from hf_lowmem.state_place import StatePlace
from hf_lowmem.step_checks import check_capturable, check_param, check_whole

logger = get_logger(__name__)

Group = dict[str, Any]
CLASS_DEFAULT: Any = ...  # stands for the default of the class whose object is made
Function = TypeVar("Function", bound=Callable[..., Any])


def not_compiled(function: Function) -> Function:
    """Leave a function out of what torch.compile traces, which cannot see that kernels write through addresses."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def algorithms() -> set[str]:
    """Return what the `algorithm` of a group may be: that of any optimizer class."""
    classes, found = [PlannedOptimizer], set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found.add(getattr(cls, "algorithm", ""))
    return found


class PlannedOptimizer(Optimizer):
    """An optimizer whose class declares its options, and that plans the state of each parameter from them.

    `param_groups` stay the user's. What the layout of a parameter's state depends on is kept beside them, by position.
    """

    algorithm: ClassVar[str]
    rule: ClassVar[str]
    options_cls: ClassVar[type[Options]] = Options
    hyperparameters: ClassVar[Hyperparameters] = Hyperparameters()  # the defaults of lr, betas, eps and weight_decay
    takes_flat_pieces: ClassVar[bool] = False  # whether an entry is stepped alike in whatever weight it is
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
        """Empty what is kept for this process only."""
        self._plans: dict[tuple, StatePlan] = {}
        self._specs: dict[tuple, dict[str, TensorSpec]] = {}

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

    @classmethod
    def rule_of(cls, plan: StatePlan, group: Mapping[str, Any]) -> str:
        """Return the update rule that steps a parameter with this plan."""
        return cls.rule

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
                check_whole(param, layout.name, self.steps_flat_pieces_of(layout))
                plan = self._plan(layout.options, schedule, tuple(param.shape), param.dtype)
                check_capturable(group, bool(self.idle_calls) or plan.projection is not FULL_SPACE)
        except Exception:
            self.param_groups.pop()
            del self._layouts[len(self.param_groups) :]
            raise

    def _layouts_of(self, group: Group) -> GroupLayouts:
        """Return the layouts of a new group: the optimizer's defaults, then each role's options, then the group's."""
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
        brought = {option: as_tuple(group[option]) for option in self.layout_options.keys() & group.keys()}
        return GroupLayouts(layouts, brought, [param.ndim for param in group["params"]])

    def _own_options(self, group: Group) -> dict[str, Any]:
        """Return the layout options that a group brings, which win over the roles'."""
        return {option: as_tuple(group[option]) for option in self.layout_options if option in group}

    def plan(self, group: Group, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> StatePlan:
        """Return the plan that a parameter of `shape` and `dtype` has in `group` where no role says otherwise."""
        options = tuple(sorted({**self._layout_defaults, **self._own_options(group)}.items()))
        return self._plan(options, self._schedule(group), tuple(shape), dtype)

    def plan_of(self, param: Tensor) -> StatePlan:
        """Return the plan of one of the optimizer's parameters.

        Raises:
            KeyError: the optimizer does not have it.
        """
        for group, layouts in zip(self.param_groups, self._layouts, strict=True):
            for member, layout in zip(group["params"], layouts.layouts, strict=True):
                if member is param:
                    return self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)
        raise KeyError(f"The optimizer has no parameter {tuple(param.shape)} that is this one.")

    def _schedule(self, group: Group) -> tuple[Any, ...]:
        """Return the values of a group that plans depend on and that may change at any step."""
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
        """Return the plan of a parameter under a group's values."""
        plan = cls.make_plan(shape, **{option: values[option] for option in cls.plan_options()})
        return replace(plan, rounding=Rounding.of(values["rounding"], dtype), arithmetic=arithmetic_of(dtype))

    def groups_with_layouts(self) -> Iterator[tuple[int, Group, list[ParamLayout]]]:
        """Return each group's number, the group, and the layouts of its parameters."""
        flat = self._layout_of_flat_pieces()
        for number, group in enumerate(self.param_groups):
            if flat is None:
                yield number, group, self._layouts[number].layouts
            else:
                yield number, group, [flat] * len(group["params"])

    def steps_flat_pieces_of(self, layout: ParamLayout) -> bool:
        """Return whether a flat piece of a weight is stepped as the weight would be; 8-bit blocks follow its rows."""
        return self.takes_flat_pieces and layout.option("state_bits") != 8

    def holds_flat_pieces(self) -> bool:
        """Return whether DeepSpeed ZeRO has put flat pieces of weights into the groups, at most one into each."""
        held = [[param.ndim for param in group["params"]] for group in self.param_groups]
        changed = held != [list(layouts.ndims) for layouts in self._layouts]
        return changed and all(ndims in ([], [1]) for ndims in held)

    def _layout_of_flat_pieces(self) -> ParamLayout | None:
        """Return the layout of all parameters where the groups hold flat pieces that are stepped as their weights."""
        if not (self.takes_flat_pieces and self.holds_flat_pieces()):
            return None
        known = {layout.options for layouts in self._layouts for layout in layouts.layouts}
        layout = ParamLayout("", next(iter(known)))
        return layout if len(known) == 1 and self.steps_flat_pieces_of(layout) else None

    def plan_by(self, layout: ParamLayout, group: Group, param: Tensor) -> StatePlan:
        """Return the plan of a parameter of a group."""
        return self._plan(layout.options, self._schedule(group), tuple(param.shape), param.dtype)

    def specs_of(self, param: Tensor, plan: StatePlan, group: Group) -> dict[str, TensorSpec]:
        """Return the state tensors that a parameter of a group is to have."""
        key = (plan, param.shape, group["capturable"])
        if key not in self._specs:
            step = replace(STEP, on_host=not group["capturable"])
            self._specs[key] = {**plan.specs(tuple(param.shape)), "step": step}
        return self._specs[key]

    def state_place(self, param: Tensor, plan: StatePlan, group: Group) -> StatePlace:
        """Return which part of a parameter's state this process holds."""
        return StatePlace(param, is_sharded(param) and is_gathered(self.rule_of(plan, group), plan, tile_of(param)))

    def step_options(self, group: Group) -> tuple[Any, ...]:
        """Return the values of a group that its parameters' plans and backends depend on."""
        flags = [group[flag] for flag in self.options_cls.defaults("flag")]
        return (*self._schedule(group), group["capturable"], group["compile"], *flags)

    @property
    def first_place(self) -> int:
        """The number of the first parameter: an optimizer has all of them."""
        return 0

    @property
    def class_name(self) -> str:
        """The name of the optimizer's class, for sentences."""
        return type(self).__name__

    def layout_at(self, group: int, position: int) -> ParamLayout:
        """Return the layout of a parameter by its group's number and its position there."""
        return self._layouts[group].layouts[position]

    @property
    def optim_name(self) -> str:
        """Return the optim name that users know this optimizer by."""
        return f"{self.algorithm}_8bit" if self._layout_defaults["state_bits"] == 8 else self.algorithm

    @property
    def kept_options(self) -> set[str]:
        """Return the keys of a group that stay this run's when a checkpoint is loaded."""
        return {"params", *self.options_cls.declared()}
