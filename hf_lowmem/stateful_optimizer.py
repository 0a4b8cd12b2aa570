"""The state of an optimizer: it is allocated, moved to the host, resized, saved and loaded as it is declared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowmem import checkpoint
from hf_lowmem.buckets import Buckets
from hf_lowmem.log import get_logger
from hf_lowmem.moments import GroupMean
from hf_lowmem.param_layouts import ParamLayout
from hf_lowmem.placement import HostCopies, Transfer
from hf_lowmem.planned_optimizer import Group, PlannedOptimizer, not_compiled
from hf_lowmem.sharding import is_sharded
from hf_lowmem.state import State
from hf_lowmem.step_checks import check_whole

logger = get_logger(__name__)


class NoLongerKnown:
    """The roles of a copied optimizer: its parameters are other objects than those that roles were found for."""

    def of(self, param: Tensor) -> None:
        """Return None: no parameter is known, and those that were there before the copy have their layouts."""


class StatefulOptimizer(PlannedOptimizer):
    """The part of `LowMemOptimizer` that keeps the state; its arguments are those of `PlannedOptimizer`."""

    def _forget_caches(self) -> None:
        """Empty what is kept for the next step, or for this process only."""
        super()._forget_caches()
        self._buckets, self._host_copies = Buckets(), HostCopies()

    def _forget_buckets(self, param: Tensor | None = None) -> None:
        """Forget what was prepared for the next step: the state of a parameter, or of all, has been replaced."""
        self._buckets.forget(param)

    def buckets_of_one(self) -> Buckets:
        """Return buckets for a parameter that is stepped alone, which count rounding changes with the optimizer's."""
        found = Buckets()
        found.rounding_changed = self._buckets.rounding_changed
        return found

    def init_state(self, param: Tensor) -> State:
        """Allocate the declared state of one of the optimizer's parameters, all zero."""
        for _, group, layouts in self.groups_with_layouts():
            for member, layout in zip(group["params"], layouts, strict=True):
                if member is param:
                    return self.allocate(param, layout, group)
        raise KeyError(f"The optimizer has no parameter {tuple(param.shape)} that is this one.")

    def allocate(self, param: Tensor, layout: ParamLayout, group: Group) -> State:
        """Allocate the declared state of a parameter of a group, all zero."""
        check_whole(param, layout.name, self.steps_flat_pieces_of(layout))
        plan = self.plan_by(layout, group, param)
        specs, place = self.specs_of(param, plan, group), self.state_place(param, plan, group)
        state = self.state[param] = {name: place.zeros(spec) for name, spec in specs.items()}
        self._forget_buckets(param)
        return state

    def release_state(self) -> None:
        """Move the state of groups with `offload_state` to the host, until the next `step` brings it back.

        On CUDA it returns at once. State that is on the CPU stays where it is.
        """
        offloaded = [param for group in self.param_groups if group["offload_state"] for param in group["params"]]
        if offloaded:
            self._buckets.release(state=True)
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
            RuntimeError: the state cannot be carried over: another axis has changed, the weight is projected, or its
                state is not laid out by rows.
        """
        self._host_copies.fetch()
        resized: dict[Tensor, State] = {}
        for _, group, layouts in self.groups_with_layouts():
            for param, layout in zip(group["params"], layouts, strict=True):
                if self.state.get(param):
                    if is_sharded(param):
                        raise RuntimeError(
                            f"The state of {layout.name or 'a sharded weight'} cannot be resized: resize the model "
                            "before it is sharded and the optimizer is built."
                        )
                    plan = self.plan_by(layout, group, param)
                    specs, name = self.specs_of(param, plan, group), layout.name or "A parameter"
                    resized[param] = checkpoint.resized_state(param, self.state[param], specs, name)
                    for moment_name, moment in plan.moments.items():
                        if isinstance(moment, GroupMean):
                            moment.keep_estimates(self.state[param], resized[param], moment_name)
        for param, state in resized.items():
            self.replace_state(param, state)

    @not_compiled
    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters and state, as plain numbers and tensors.

        Beside torch's own keys, `layouts` has the name and the layout options of each parameter, by group.
        """
        self.synchronize_state()
        found = super().state_dict()
        found["state"] = {key: checkpoint.saved(state) for key, state in found["state"].items()}
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
        loaded = self.loaded_state(state_dict)
        self._host_copies.forget()
        self._forget_buckets()
        self.state.clear()
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def loaded_state(self, state_dict: Mapping[str, Any]) -> dict[Any, State]:
        """Return the state that a checkpoint holds by parameter, and take its hyperparameters over into the groups."""
        return checkpoint.load(self, self._layouts, state_dict)

    def replace_state(self, param: Tensor, state: State) -> None:
        """Give a parameter other state, of another layout too, between two steps."""
        self.state[param] = state
        self._forget_buckets(param)
        self._host_copies.forget_buffers(param)
