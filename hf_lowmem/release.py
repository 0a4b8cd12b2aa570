"""Gradient release: a parameter is stepped as soon as its gradient is complete, and the gradient is freed.

So one gradient at a time is on the device, where a plain step has all of them. Clipping needs the norm of all
gradients before the first step, and accumulation a place for the sums; `clip` says where they come from:

- `none`: nothing is clipped or accumulated, and the backward pass takes the steps.
- `host`: gradients leave for host memory as they come, and are added up there. The optimizer's step brings them back
  one by one, clipped by their norm.
- `recompute`: `backward` goes through the graph twice, first for the norm, then for the steps.
- `previous`: the backward pass takes the steps, clipped by the norm of the step before, which is not exact. The first
  step goes by the host.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_lowmem.buckets import Buckets
from hf_lowmem.log import get_logger
from hf_lowmem.param_layouts import ParamLayout
from hf_lowmem.placement import HeldGradients
from hf_lowmem.replicas import AveragedGradients, warn_if_apart
from hf_lowmem.sharding import is_placed_as, is_sharded, local, local_grad, placed_like, whole
from hf_lowmem.step_checks import check_released

logger = get_logger(__name__)

Clip = Literal["none", "host", "recompute", "previous"]
_RELEASED: Any = WeakIdKeyDictionary()  # a weak reference to the release of each parameter


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
        self.buckets: Buckets = optimizer.buckets_of_one()
        self._layouts: list[ParamLayout] = []

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
        """Return the group with the layout of the parameter, which may change during a run.

        It is the same list until then, by which buckets know that nothing has changed.
        """
        layout = self._optimizer.layout_at(self._group, self._position)
        if not self._layouts or self._layouts[0] is not layout:
            self._layouts = [layout]
        yield 0, self.group, self._layouts


class GradientRelease:
    """Steps the parameters of an optimizer as their gradients come, from hooks that `detach` removes.

    Args:
        optimizer: the optimizer, whose `take_step` steps a parameter.
        clip: see the module's docstring.
        replicas: the DistributedDataParallel module that holds the parameters, if one does.
        max_norm: what `recompute` clips the norm of all gradients to.
        counted: the parameters whose gradients count in that norm, in the order in which it adds them up; those of
            the optimizer by default.

    Raises:
        ValueError: `clip` is none of these, `max_norm` is negative or does not go with it, or an option of the
            optimizer or the processes do not.
    """

    def __init__(
        self,
        optimizer: Any,
        clip: Clip,
        replicas: Any = None,
        max_norm: float = math.inf,
        counted: Iterable[Tensor] | None = None,
    ) -> None:
        if clip not in get_args(Clip):
            raise ValueError(f"clip={clip!r} must be one of {', '.join(map(repr, get_args(Clip)))}.")
        if not max_norm >= 0:
            raise ValueError(f"max_norm={max_norm} must be a number of at least 0.")
        if clip != "recompute" and max_norm < math.inf:
            raise ValueError(
                f'max_norm={max_norm} goes with clip="recompute" alone: under others clip_grad_norm_ clips.'
            )
        check_released(optimizer.param_groups)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if clip == "recompute" and (replicas is not None or any(map(is_sharded, params))):
            raise ValueError("clip=recompute goes with one process, but not with DDP or FSDP2: use clip=host.")
        self._max_norm, self._counted = max_norm, params if counted is None else list(counted)
        self._finds_norm = False  # whether the backward pass only looks at gradients
        self.optimizer, self._clip = optimizer, clip
        self.watcher: Watcher | None = None
        self._views: dict[Tensor, OneParam] = {}
        self._held = HeldGradients()
        self._norms: dict[Tensor, Tensor] = {}
        self._stepped: list[Tensor] = []
        self._scale: Tensor | None = None  # what clipping multiplies the gradients of this step by
        self._next_scale: Tensor | None = None  # what the last norm asks for
        self._averaged = None if replicas is None else AveragedGradients.of(replicas)
        self._hooks: dict[Tensor, Any] = {}
        arrived = weakref.WeakMethod(self._arrived)  # so that hooks do not keep an optimizer that nothing else has

        def take(param: Tensor) -> None:
            if (method := arrived()) is not None:
                method(param)

        self._take = take
        if self._averaged is not None:
            self._averaged.go_to(take)
        else:
            warn_if_apart(params)
        self._watch_params()

    def _watch_params(self) -> None:
        """Take the gradients of all parameters of the groups that are trained now."""
        for number, group in enumerate(self.optimizer.param_groups):
            for position, param in enumerate(group["params"]):
                if param not in self._views:
                    _claim(param, self)
                    self._views[param] = OneParam(self.optimizer, number, position, len(self._views))
                if param.requires_grad and param not in self._hooks and self._averaged is None:
                    self._hooks[param] = param.register_post_accumulate_grad_hook(self._take)

    def detach(self) -> None:
        """Let gradients stay until the optimizer's step, as without release."""
        for hook in self._hooks.values():
            hook.remove()
        for param in self._views:
            _RELEASED.pop(param, None)
        if self._averaged is not None:
            self._averaged.go_to(None)
        self.discard()

    def discard(self) -> None:
        """Forget gradients that have come and were not stepped."""
        self._held.clear()
        self._norms.clear()
        if self.recomputes:
            self._scale = None

    def forget_buckets(self, param: Tensor | None = None) -> None:
        """Forget what was prepared for the next step of a parameter, or of all."""
        for view in self._views.values() if param is None else [self._views[param]] if param in self._views else []:
            view.buckets.forget(param)

    @property
    def holds_gradients(self) -> bool:
        """Return whether gradients have come that are still to be stepped."""
        return bool(self._held)

    @property
    def recomputes(self) -> bool:
        """Return whether the backward pass is to be taken by `backward`."""
        return self._clip == "recompute"

    @property
    def _holds(self) -> bool:
        return self._clip == "host" or (self._clip == "previous" and self._scale is None)

    def backward(self, loss: Tensor, backward: Callable[..., Any] = Tensor.backward) -> None:
        """Go through the graph of a loss under clip="recompute": for the norm of all gradients, and for clipped steps.

        Activations that are checkpointed are computed twice, and what the graph holds is kept until the second pass.

        Args:
            loss: the loss, 0-D.
            backward: what computes the gradients, which takes the loss and `retain_graph`.

        Raises:
            RuntimeError: `clip` has another value, under which the loss's own `backward` is called; or the last
                gradients were stepped, and the optimizer's `step` has not ended their step.

        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = hf_lowmem.build_optimizer(model, "slim_adamw_8bit", lr=1e-3)
        >>> release = optimizer.release_gradients(clip="recompute", max_norm=1.0)
        >>> release.backward(model(torch.ones(1, 64)).sum())
        >>> optimizer.step()
        """
        if not self.recomputes:
            raise RuntimeError(f'Under clip="{self._clip}" one backward pass is enough: call loss.backward().')
        if self._norms:
            raise RuntimeError(
                "The gradients of the last loss were stepped already, to which those of another cannot be added: call "
                'optimizer.step() after each backward, or use clip="host" to accumulate gradients.'
            )
        if self._max_norm < math.inf:
            self._watch_params()
            self._finds_norm = True
            try:
                backward(loss, retain_graph=True)
            finally:
                self._finds_norm = False
            norm = self._norm(self._counted)
            self._scale = None if norm is None else scale_for(norm, self._max_norm)
            self._norms.clear()
        backward(loss)

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """Take the gradient that the backward pass has completed."""
        grad = param.grad
        if grad is None or param not in self._views:  # DDP hands over parameters of other optimizers, too
            return
        if not is_placed_as(grad, param):
            grad = placed_like(param, local_grad(grad, param))
        if self._holds:
            grad = self._held.add(param, grad, self._views)
            self._norms[param] = norm_of(grad)
            param.grad = None
            return
        if self._finds_norm:
            self._norms[param] = norm_of(grad)
            param.grad = None
            return
        if self.recomputes and self._scale is None and self._max_norm < math.inf:
            raise RuntimeError(
                'Under clip="recompute" gradients are clipped by the norm of a first backward pass: call '
                "optimizer.gradient_release.backward(loss) in place of loss.backward(), or hf_lowmem.register() for a "
                "Trainer."
            )
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
        self._stepped += self.optimizer.take_step(view.buckets, view)
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
        params = list(params)
        total = self._norm(params)
        if total is None:
            return torch.zeros(())
        self._next_scale = scale_for(total, max_norm)
        for param in params:
            if self._next_scale is not None and param.grad is not None and param not in self._norms:
                grad = local(param.grad)  # its step is still to be taken, as without release
                grad.mul_(self._next_scale.to(grad.device))
        return total

    def _norm(self, params: Sequence[Tensor]) -> Tensor | None:
        """Return the norm of the gradients that have come and of those that are still there, 0-D; None without any."""
        norms = [self._norms[param] for param in params if param in self._norms]
        norms += [norm_of(param.grad) for param in params if param.grad is not None and param not in self._norms]
        return whole(torch.linalg.vector_norm(torch.stack(in_torchs_order(norms)))) if norms else None

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
        self._watch_params()
        return stepped


def _claim(param: Tensor, release: GradientRelease) -> None:
    """Note whose release a parameter's gradient goes to; an optimizer that had it until now keeps gradients."""
    if _other_release(param, release):
        gc.collect()  # an optimizer that nothing else has is gone after that
    if other := _other_release(param, release):
        other.optimizer.keep_gradients()
        logger.warning(
            "The gradients of a parameter of shape %s were released to another optimizer, which keeps gradients now.",
            tuple(param.shape),
        )
    _RELEASED[param] = weakref.ref(release)


def _other_release(param: Tensor, release: GradientRelease) -> GradientRelease | None:
    found: GradientRelease | None = _RELEASED[param]() if param in _RELEASED else None
    return None if found is release else found


def in_torchs_order(norms: list[Tensor]) -> list[Tensor]:
    """Return the norms of gradients in the order in which torch adds them up, on the device of the first."""
    alike: dict[Any, Any] = torch.utils._foreach_utils._group_tensors_by_device_and_dtype([[*norms]])
    return [norm.to(norms[0].device) for (group,), _ in alike.values() for norm in group]


def scale_for(norm: Tensor, max_norm: float) -> Tensor | None:
    """Return what multiplies gradients of this norm as `torch.nn.utils.clip_grad_norm_` does, or None for nothing."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm < math.inf else None


def norm_of(grad: Tensor) -> Tensor:
    """Return the 2-norm of a gradient, 0-D, by the function that `torch.nn.utils.clip_grad_norm_` takes."""
    norm: Tensor = torch._foreach_norm([grad], 2.0)[0]
    return norm
