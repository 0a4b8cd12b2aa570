"""The layout options of each parameter, which an optimizer keeps beside its groups, by position.

A user's group may hold weights of many roles, so these options are not the group's. Positions survive where objects do
not: in copies, in pickles, and under sharding, which puts other tensors into the groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from hf_lowmem.state import State, StatePlan, TensorSpec
from hf_lowmem.state_place import StatePlace


class Roles(Protocol):
    """The layout options that the role of each parameter of a model decides, as an optimizer asks for them."""

    def of(self, param: Tensor) -> tuple[str, dict[str, Any]] | None:
        """Return (name, options) of a parameter, or None if it is not known."""


class ParamLayout(NamedTuple):
    """The name of one parameter, "" if it is not known, and its layout options as (option, value) pairs.

    `from_model` is True where the name is the model's own, and not the one in the group's `param_names`.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    from_model: bool = False

    def option(self, name: str) -> Any:
        """Return the value of a layout option, or None if the parameter's optimizer does not have it."""
        return next((value for option, value in self.options if option == name), None)

    def with_options(self, changed: Mapping[str, Any]) -> ParamLayout:
        """Return the layout with other values of some options."""
        return self._replace(options=tuple(sorted({**dict(self.options), **changed}.items())))


class StateOwner(Protocol):
    """What an optimizer says of its parameters to what steps, saves and loads them."""

    rule: ClassVar[str]
    algorithm: ClassVar[str]
    idle_calls: ClassVar[int]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameters in groups with their hyperparameters."""

    @property
    def state(self) -> Any:
        """The state of each parameter."""

    @property
    def first_place(self) -> int:
        """The number of the first parameter among all that are trained, which the noise of a step depends on."""

    @property
    def class_name(self) -> str:
        """The name of the optimizer's class, for sentences."""

    @property
    def optim_name(self) -> str:
        """Return the optim name that users know the optimizer by."""

    @property
    def kept_options(self) -> set[str]:
        """Return the keys of a group that stay this run's when a checkpoint is loaded."""

    def groups_with_layouts(self) -> Iterator[tuple[int, dict[str, Any], list[ParamLayout]]]:
        """Return each group's number, the group, and the layouts of its parameters."""

    def step_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Return the values of a group that its parameters' plans and backends depend on."""

    def plan_by(self, layout: ParamLayout, group: dict[str, Any], param: Tensor) -> StatePlan:
        """Return the plan of a parameter of a group."""

    def specs_of(self, param: Tensor, plan: StatePlan, group: dict[str, Any]) -> dict[str, TensorSpec]:
        """Return the state tensors that a parameter of a group is to have."""

    def state_place(self, param: Tensor, plan: StatePlan, group: dict[str, Any]) -> StatePlace:
        """Return which part of a parameter's state this process holds."""

    def rule_of(self, plan: StatePlan, group: Mapping[str, Any]) -> str:
        """Return the update rule that steps a parameter with this plan."""

    def steps_flat_pieces_of(self, layout: ParamLayout) -> bool:
        """Return whether a flat piece of a weight is stepped as the weight would be."""

    def allocate(self, param: Tensor, layout: ParamLayout, group: dict[str, Any]) -> State:
        """Allocate the declared state of a parameter of a group, all zero."""


def as_tuple(value: Any) -> Any:
    """Return lists as tuples, nested ones too, because options are compared, hashed and saved."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


class GroupLayouts:
    """The layouts of one group's parameters, in the group's order.

    Args:
        layouts: the layout of each parameter.
        own: the layout options that the group itself brought.
        ndims: the number of axes of each parameter.

    `layouts` may change as an algorithm lays state out anew during a run; `built` are those that it began with.
    """

    def __init__(self, layouts: Sequence[ParamLayout], own: Mapping[str, Any], ndims: Sequence[int]) -> None:
        self.layouts = list(layouts)
        self.built = tuple(layouts)
        self.own = dict(own)
        self.ndims = tuple(ndims)

    def check(self, group: Mapping[str, Any], number: int, options: Iterable[str], flat: bool = False) -> None:
        """Refuse a group whose parameters or layout options were changed without `add_param_group`.

        Args:
            number: the position of the group, for the sentence.
            options: the names of all layout options.
            flat: whether it may hold flat pieces of its weights in their place.

        Raises:
            RuntimeError: the group has more or fewer parameters than it came with, or other layout options.
        """
        if len(group["params"]) != len(self.layouts) and not flat:
            raise RuntimeError(
                f"Parameter group {number} holds {len(group['params'])} parameters where {len(self.layouts)} were "
                "added: add parameters by optimizer.add_param_group, and build the optimizer anew to remove some."
            )
        for option in options:
            if (option in group or option in self.own) and as_tuple(group.get(option)) != self.own.get(option):
                raise RuntimeError(
                    f"{option} of parameter group {number} was changed from {self.own.get(option)!r} to "
                    f"{group.get(option)!r}, but the layout of a parameter's state is fixed when it is added: build "
                    "the optimizer anew."
                )

    def saved(self) -> list[dict[str, Any]]:
        """Return the layouts as plain values for a state dict."""
        return [{**({"name": each.name} if each.from_model else {}), **dict(each.options)} for each in self.layouts]
