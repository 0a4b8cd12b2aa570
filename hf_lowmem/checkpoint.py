"""State that comes from a checkpoint or from a weight of another size: it is compared with the plan, and copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.adamw_state import ANEW, check_takes_adamw, from_adamw, is_adamw
from hf_lowmem.checks import check_flags
from hf_lowmem.names import canonical_name
from hf_lowmem.options import HYPERPARAMETERS
from hf_lowmem.param_layouts import GroupLayouts, StateOwner, as_tuple
from hf_lowmem.sharding import whole
from hf_lowmem.state import KAHAN_COMP, Rounding, State, TensorSpec
from hf_lowmem.state_place import StatePlace, as_bytes, from_bytes

Group = Mapping[str, Any]
FLOATS = {torch.float32, torch.float64}
KAHAN = Rounding("kahan")
COUNTS = ("step", "proj_count")


def load(optimizer: StateOwner, layouts: Sequence[GroupLayouts], state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Take a checkpoint's hyperparameters over into an optimizer's groups, and return the state by parameter.

    Nothing is changed where the checkpoint does not fit.

    Raises:
        ValueError: the checkpoint is another optimizer's, or its state is laid out otherwise.
    """
    saved_groups = state_dict["param_groups"]
    adamw = is_adamw(saved_groups, state_dict["state"])
    if adamw:
        check_takes_adamw(saved_groups, optimizer.rule, optimizer.optim_name)
        check_group_sizes(optimizer.param_groups, saved_groups)
    else:
        check_groups(optimizer.param_groups, saved_groups, optimizer.algorithm, optimizer.optim_name)
    for saved_group in saved_groups:
        check_flags({} if adamw else saved_group, type(optimizer).__name__)
    check_layouts(layouts, state_dict.get("layouts"), saved_groups)
    known = {key for saved_group in saved_groups for key in saved_group["params"]}
    # State that belongs to no weight is the user's, and it is carried along as torch carries it.
    loaded = {key: value for key, value in state_dict["state"].items() if key not in known}
    for (_, group, members), saved_group in zip(optimizer.groups_with_layouts(), saved_groups, strict=True):
        for param, layout, key in zip(group["params"], members, saved_group["params"], strict=True):
            if held := state_dict["state"].get(key):
                plan = optimizer.plan_by(layout, group, param)
                if adamw:
                    held = from_adamw({k: whole(value) for k, value in held.items()}, plan, tuple(param.shape))
                specs, place = optimizer.specs_of(param, plan, group), optimizer.state_place(param, plan, group)
                check_state(held, specs, tuple(param.shape))
                with torch.inference_mode(False):  # a later step may be outside of it
                    # Kahan's buffer of a run with another `rounding` or dtype is kept; the next step decides on it.
                    declared = {**KAHAN.specs(tuple(param.shape)), **specs}
                    loaded[param] = {name: copied(value, declared[name], place) for name, value in held.items()}
    take_over(optimizer.param_groups, saved_groups, optimizer.kept_options, HYPERPARAMETERS if adamw else None)
    return loaded


def take_over(
    groups: Sequence[dict[str, Any]], saved: Sequence[Group], kept: set[str], only: Sequence[str] | None
) -> None:
    """Copy the values of saved groups, all but the `kept` ones, or `only` some; a tensor lr stays the same tensor."""
    for number, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        lr, keeps = group["lr"], kept | ({"param_names"} & group.keys())
        wanted = {k: v for k, v in saved_group.items() if k not in keeps and (only is None or k in only)}
        group.update(copy.deepcopy(wanted))
        if isinstance(lr, Tensor):  # which a scheduler or a captured graph may hold
            rate = float(group["lr"])
            taken = any(other["lr"] is lr for other in groups[:number]) and float(lr) != rate
            group["lr"] = torch.full_like(lr, rate) if taken else lr.fill_(rate)


def check_groups(current: Sequence[Group], saved: Sequence[Group], algorithm: str, optim: str) -> None:
    """Refuse a checkpoint of another optimizer than `algorithm`, which users know as `optim`, or of another model."""
    written_by = {group.get("algorithm", "another optimizer") for group in saved} or {"another optimizer"}
    if written_by != {algorithm}:
        raise ValueError(
            f"The checkpoint's optimizer state was written by {', '.join(sorted(written_by))}, not by {algorithm}: "
            f"resume with the same optim name, or, to go on with optim={optim!r}, {ANEW}."
        )
    check_group_sizes(current, saved)


def saved(state: Any) -> Any:
    """Return a parameter's state as a checkpoint holds it, in which no tensor is int16."""
    if not isinstance(state, dict):  # state that belongs to no weight is the user's
        return state
    narrow = [name for name, value in state.items() if isinstance(value, Tensor) and value.dtype == torch.int16]
    return {**state, **{name: as_bytes(state[name]) for name in narrow}} if narrow else state


def as_saved(spec: TensorSpec, value: Any) -> TensorSpec:
    """Return the declaration of a state tensor as `saved` writes it; a checkpoint of an earlier version has int16."""
    in_bytes = isinstance(value, Tensor) and value.dtype == torch.uint8 and spec.dtype == torch.int16
    dims = (*spec.param_dims, None)
    return replace(spec, shape=(*spec.shape, 2), param_dims=dims, dtype=torch.uint8) if in_bytes else spec


HINT = "resume with the model, optim name, optim_args, rules and target modules of the run that wrote the checkpoint"


def check_group_sizes(current: Sequence[Group], saved: Sequence[Group]) -> None:
    """Refuse groups that hold another number of parameters."""
    if len(current) != len(saved):
        raise ValueError(f"The checkpoint has {len(saved)} parameter groups, expected {len(current)}: {HINT}.")
    for number, (mine, theirs) in enumerate(zip(current, saved, strict=True)):
        if len(mine["params"]) != len(theirs["params"]):
            raise ValueError(
                f"Checkpoint group {number} holds {len(theirs['params'])} parameters, expected {len(mine['params'])}: "
                f"{HINT}."
            )


def check_state(saved: Mapping[str, Any], specs: Mapping[str, TensorSpec], shape: tuple[int, ...]) -> None:
    """Refuse saved state that is not laid out as declared for a parameter of `shape`.

    A float32 tensor may take a float64 one's place and the other way round: the weight's dtype may have changed.
    """
    hint = "Resume with the same optim name, rules and state_bits."
    if set(saved) - {KAHAN_COMP} != set(specs) - {KAHAN_COMP}:
        raise ValueError(
            f"Checkpoint state of a parameter of shape {shape} has {sorted(saved)}, expected {sorted(specs)}. {hint}"
        )
    for name, spec in specs.items():
        if name not in saved:
            continue
        value = saved[name]
        if name in COUNTS:
            check_count(name, value)
            continue
        spec = as_saved(spec, value)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Checkpoint state {name!r} is {value!r}, expected a tensor of shape {spec.shape}. {hint}"
            )
        if value.shape != spec.shape or (value.dtype != spec.dtype and {value.dtype, spec.dtype} != FLOATS):
            if name.startswith("proj") and value.shape == spec.shape:
                hint = f"Resume with proj_bits={8 * value.dtype.itemsize}."
            raise ValueError(
                f"Checkpoint state {name!r} has shape {tuple(value.shape)} and {value.dtype}, expected {spec.shape} "
                f"and {spec.dtype}. {hint}"
            )


def check_count(name: str, value: Any) -> None:
    """Refuse what is no count: a number, or a tensor of one element, that is finite and at least 0."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
        raise ValueError(f"Checkpoint state {name!r} is {value!r}, expected a finite number of at least 0.")


def check_layouts(
    current: Sequence[GroupLayouts], saved: Sequence[Sequence[Mapping[str, Any]]] | None, groups: Sequence[Group]
) -> None:
    """Refuse a checkpoint of other parameters, or one whose state was laid out by other options.

    Args:
        current: the optimizer's own.
        saved: the checkpoint's, by group; None where what wrote it keeps no layouts.
        groups: the checkpoint's, whose `param_names` name the parameters that `saved` does not.

    Raises:
        ValueError: with the first parameter that differs.
    """
    for number, (mine, group) in enumerate(zip(current, groups, strict=True)):
        theirs = saved[number] if saved else [{}] * len(mine.layouts)
        names = group.get("param_names") or [""] * len(mine.layouts)
        for layout, entry, its_name in zip(mine.layouts, theirs, names, strict=False):
            name = canonical_name(str(entry.get("name") or its_name))
            if layout.name and name and canonical_name(layout.name) != name:
                raise ValueError(
                    f"Checkpoint group {number} holds the parameter {name!r}, expected {layout.name!r}: {HINT}."
                )
            for option, value in layout.options:
                found = as_tuple(entry.get(option))
                if option in entry and found != value:
                    which = f" for {layout.name}" if layout.name else ""
                    if option == "state_bits" and 8 in (found, value):
                        which += (
                            " (8 is that of the optim names that end in _8bit; where only embeddings differ, set "
                            f"embedding_bits={found!r})"
                        )
                    raise ValueError(
                        f"Checkpoint group {number} has {option}={found!r}, expected {value!r}{which}: {HINT}."
                    )


def copied(value: Any, spec: TensorSpec, place: StatePlace) -> Tensor:
    """Return a copy of a saved tensor or number as the declared state tensor, contiguous whatever its strides were."""
    written = as_saved(spec, value)
    part, shape = place.part_of(value, spec), place.shape(spec)
    tensor = torch.empty(shape, dtype=spec.dtype, device=spec.place(place.param.device))
    number = part if isinstance(part, Tensor) else torch.tensor(part, device="cpu")
    if written is not spec:
        number = from_bytes(number)
    return place.placed(tensor.copy_(number.reshape(shape)), spec)


def resized_state(param: Tensor, state: State, specs: Mapping[str, TensorSpec], name: str) -> State:
    """Return the state of a weight whose first axis has changed: its old rows are kept, and new ones are zero."""
    found: State = {}
    for key, old in state.items():
        spec = specs.get(key)
        if spec is None or old.shape == spec.shape:
            found[key] = old
            continue
        by_row = spec.param_dims[:1] == (0,) and old.shape[1:] == spec.shape[1:] and old.dtype == spec.dtype
        if not by_row or "proj_count" in state:
            raise RuntimeError(
                f"The optimizer state {key!r} of {name} has shape {tuple(old.shape)} and {old.dtype}, which cannot be "
                f"carried over to {spec.shape} and {spec.dtype}: build the optimizer anew."
            )
        rows = min(old.shape[0], spec.shape[0])
        found[key] = spec.zeros(param.device)
        found[key][:rows] = old[:rows]
    return found
