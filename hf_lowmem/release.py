"""Gradient release: a parameter is stepped as soon as its gradient is complete, and the gradient is freed.

So one gradient at a time is on the device, where a plain step has all of them. Clipping needs the norm of all
gradients before the first step, and accumulation a place for the sums; `clip` says where they come from:

- `none`: nothing is clipped or accumulated, and the backward pass takes the steps.
- `host`: gradients leave for host memory as they come, and are added up there. The optimizer's step brings them back
  one by one, clipped by their norm.
- `previous`: the backward pass takes the steps, clipped by the norm of the step before, which is not exact. The first
  step goes by the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_lowmem.buckets import Buckets
from hf_lowmem.param_layouts import ParamLayout
from hf_lowmem.placement import HeldGradients
from hf_lowmem.replicas import AveragedGradients
from hf_lowmem.sharding import is_placed_as, local, local_grad, placed_like, whole
from hf_lowmem.step_checks import check_released

Clip = Literal["none", "host", "previous"]


class Watcher(Protocol):
    """What looks at a parameter before and after its step."""

    def before_step(self, param: Tensor, group: dict[str, Any]) -> None:
        """Look at a parameter that has its gradient."""

    def after_step(self, param: Tensor) -> None:
        """Look at the same parameter after its step; it still has its gradient."""


class OneParam:
    """One parameter of an optimizer, as a `StateOwner` that has no other."""

    def __init__(self, optimizer: Any, group: int, position: int, place: int) -> None:
        self._optimizer, self._group, self._position = optimizer, group, position
        self.param: Tensor = optimizer.param_groups[group]["params"][position]
        self.first_place = place
        self.buckets = Buckets()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    @property
    def group(self) -> dict[str, Any]:
        """The parameter's group, with this parameter alone."""
        return {**self._optimizer.param_groups[self._group], "params": [self.param]}

    @property
    def name(self) -> str:
        """The parameter's name in the model, or its shape."""
        layout = self._optimizer.layout_at(self._group, self._position)
        return layout.name or f"a parameter of shape {tuple(self.param.shape)}"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [self.group]

    @property
    def state(self) -> dict[Tensor, Any]:
        found = self._optimizer.state.get(self.param)
        return {self.param: found} if found else {}

    def groups_with_layouts(self) -> Iterator[tuple[int, dict[str, Any], list[ParamLayout]]]:
        """Return the group with the layout of the parameter, which may change during a run."""
        yield 0, self.group, [self._optimizer.layout_at(self._group, self._position)]


class GradientRelease:
    """Steps the parameters of an optimizer as their gradients come, from hooks that `detach` removes.

    Args:
        optimizer: the optimizer, whose `take_step` steps a parameter.
        clip: see the module's docstring.
        replicas: the DistributedDataParallel module that holds the parameters, if one does.

    Raises:
        ValueError: an option of the optimizer does not go with it.
    """

    def __init__(self, optimizer: Any, clip: Clip, replicas: Any = None) -> None:
        check_released(optimizer.param_groups)
        self._optimizer, self._clip = optimizer, clip
        self.watcher: Watcher | None = None
        self._views: dict[Tensor, OneParam] = {}
        for number, group in enumerate(optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                self._views.setdefault(param, OneParam(optimizer, number, position, len(self._views)))
        self._held = HeldGradients(self._views)
        self._norms: dict[Tensor, Tensor] = {}
        self._stepped: list[Tensor] = []
        self._scale: Tensor | None = None  # what clipping multiplies the gradients of this step by
        self._next_scale: Tensor | None = None  # what the last norm asks for
        self._averaged = None if replicas is None else AveragedGradients.of(replicas)
        self._hooks: list[Any] = []
        if self._averaged is not None:
            self._averaged.go_to(self._arrived)
        else:
            trained = [param for param in self._views if param.requires_grad]
            self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in trained]

    def detach(self) -> None:
        """Let gradients stay until the optimizer's step, as without release."""
        for hook in self._hooks:
            hook.remove()
        if self._averaged is not None:
            self._averaged.go_to(None)
        self.discard()

    def discard(self) -> None:
        """Forget gradients that have come and were not stepped."""
        self._held.clear()
        self._norms.clear()

    @property
    def _holds(self) -> bool:
        return self._clip == "host" or (self._clip == "previous" and self._scale is None)

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """Take the gradient that the backward pass has completed."""
        grad = param.grad
        if grad is None or param not in self._views:  # DDP hands over parameters of other optimizers, too
            return
        if not is_placed_as(grad, param):
            grad = placed_like(param, local_grad(grad, param))
        if self._holds:
            grad = self._held.add(param, grad)
            self._norms[param] = norm_of(grad)
            param.grad = None
            return
        if param in self._norms:
            raise RuntimeError(
                f"A second gradient of {self._views[param].name} has come before the optimizer's step, and under "
                f'clip="{self._clip}" the first was stepped already: use clip="host" to accumulate gradients.'
            )
        self._norms[param] = norm_of(grad)
        self._step(param, grad)

    def _step(self, param: Tensor, grad: Tensor) -> None:
        """Step one parameter, and free its gradient."""
        view = self._views[param]
        if self._scale is not None:
            here = local(grad)
            here.mul_(self._scale.to(here.device))
        param.grad = grad
        if self.watcher:
            self.watcher.before_step(param, view.group)
        self._stepped += self._optimizer.take_step(view.buckets, view)
        if self.watcher:
            self.watcher.after_step(param)
        param.grad = None

    def clip(self, params: Iterable[Tensor], max_norm: float) -> Tensor:
        """Return the norm of the gradients that have come, and clip those that are still to be stepped.

        The norm is computed as by `torch.nn.utils.clip_grad_norm_`, so that its bits depend on the order of `params`.

        Args:
            params: the parameters whose gradients count.
            max_norm: the largest norm; infinity clips nothing.

        Raises:
            RuntimeError: `max_norm` is finite under clip="none".
        """
        if self._clip == "none" and max_norm < math.inf:
            raise RuntimeError(
                f'Gradients cannot be clipped to {max_norm} under clip="none", as their steps were taken before their '
                'norm was known: use clip="host".'
            )
        norms = [self._norms[param] for param in params if param in self._norms]
        norms += [norm_of(param.grad) for param in params if param.grad is not None and param not in self._norms]
        if not norms:
            return torch.zeros(())
        total: Tensor = whole(torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms])))
        if max_norm < math.inf:
            self._next_scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return total

    def finish(self) -> list[Tensor]:
        """Step what is held, and return all parameters that were stepped since the last call."""
        if self._holds:
            self._scale = self._next_scale
            for param, grad in self._held.drain():
                self._step(param, grad)
        self._scale = self._next_scale if self._clip == "previous" else None
        stepped, self._stepped = self._stepped, []
        self._norms.clear()
        self._next_scale = None
        return stepped


def norm_of(grad: Tensor) -> Tensor:
    """Return the 2-norm of a gradient, 0-D, by the function that `torch.nn.utils.clip_grad_norm_` takes."""
    norm: Tensor = torch._foreach_norm([grad], 2.0)[0]
    return norm
