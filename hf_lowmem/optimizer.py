"""The one optimizer: it clips and steps by the state that its algorithms declare and `stateful_optimizer.py` keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.buckets import Buckets
from hf_lowmem.checks import check_flags
from hf_lowmem.clipping import Clipping
from hf_lowmem.gathering import step_gathered
from hf_lowmem.kernels.bucket import Bucket, Hyper
from hf_lowmem.log import get_logger
from hf_lowmem.param_layouts import StateOwner
from hf_lowmem.planned_optimizer import Group, not_compiled
from hf_lowmem.release import Clip, GradientRelease
from hf_lowmem.shards import average_over_shards
from hf_lowmem.stateful_optimizer import StatefulOptimizer
from hf_lowmem.stepping import step_bucket
from hf_lowmem.update_rules import RULE_FLAGS

logger = get_logger(__name__)


class LowMemOptimizer(StatefulOptimizer):
    """The base of every algorithm. A subclass names its update rule and its options, and plans a parameter's state.

    Args:
        params: parameters or groups, as for any `torch.optim.Optimizer`.
        lr, betas, eps, weight_decay: hyperparameters, as for `torch.optim.AdamW`; weight decay is decoupled.
        roles: layout options per parameter, kept beside the groups; those that a group brings win.
        options: the options of `options_cls`. Those that a layout depends on hold for groups that bring none.

    Raises:
        TypeError: an option is unknown.
        ValueError: a value is not legal, an option does not fit a parameter, or there is nothing to train.

    >>> optimizer = hf_lowmem.build_optimizer(torch.nn.Linear(64, 64), "signum", lr=1e-4)
    >>> isinstance(optimizer, hf_lowmem.LowMemOptimizer)
    True
    """

    def _forget_caches(self) -> None:
        """Empty what is kept for the next step, or for this process only."""
        super()._forget_caches()
        self._clipping = Clipping()
        self._release: GradientRelease | None = None
        self._warned_of_release = False

    def _forget_buckets(self, param: Tensor | None = None) -> None:
        super()._forget_buckets(param)
        if self._release is not None:
            self._release.forget_buckets(param)

    # -- stepping ---------------------------------------------------------------------------------------------------

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
        self._check_groups()
        if self._release is None:
            self._clipping.warn_if_missed(self.param_groups)
            self._warn_if_kept()
        released = self._release.finish() if self._release else []
        stepped = released + self.take_step(self._buckets, self)
        self._clipping.forget()
        for change, weights in self._buckets.rounding_changed.items():
            logger.info(
                "Kahan's buffers of %d weights were %s: `rounding` or their dtype has changed.", weights, change
            )
        self._buckets.rounding_changed.clear()
        self.after_step(stepped)
        return loss

    def take_step(self, buckets: Buckets, owner: StateOwner) -> list[Tensor]:
        """Step the parameters of `owner` that have a gradient, and return them.

        Args:
            buckets: those of the owner.
            owner: the optimizer, or one of its parameters.
        """
        try:
            found = buckets.find(owner, advance=True)
            parts = [(owner.param_groups[number], p) for number, b in found for p in self._clipping.applied(b)]
            self._average_over_shards(buckets, [part for _, part in parts])
            gathered = list[tuple[Bucket, Hyper]]()
            for group, part in parts:
                hyper = self._hyper(group, part)
                if part.solo is not None and part.solo.cut.gathered:
                    gathered.append((part, hyper))
                else:
                    with _no_autocast(part.device.type):
                        step_bucket(part, hyper)
            if gathered:
                with _no_autocast(gathered[0][0].device.type):
                    step_gathered(gathered, owner.first_place)
            stepped = buckets.stepped
        finally:
            buckets.release()
        # Kernels write through addresses, which autograd does not see.
        torch.autograd.graph.increment_version(stepped)
        return stepped

    def _average_over_shards(self, buckets: Buckets, parts: Sequence[Bucket]) -> None:
        """Average the second moments whose groups lie on several processes, so that `step_bucket` can apply them."""
        crossing = buckets.crossing
        if not crossing:
            return
        for _, shard in crossing:
            shard.begin()
        for bucket in parts:
            if bucket.pieces:
                with _no_autocast(bucket.device.type):
                    for (shard, number), sums in zip(bucket.pieces, bucket.backend.reduce(bucket), strict=True):
                        shard.add(number, sums)
        average_over_shards([(shard, float(self.param_groups[group]["betas"][1])) for group, shard in crossing])

    def after_step(self, stepped: Sequence[Tensor]) -> None:
        """Change between two steps what an algorithm changes then, such as the layout of these parameters' state."""

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
        if self._release is not None:
            return self._release.clip([param for group in self.param_groups for param in group["params"]], max_norm)
        self._host_copies.fetch()
        self._check_groups()
        try:
            found = [bucket for _, bucket in self._buckets.find(self, advance=False)]
            return self._clipping.find(found, self._buckets.spreads, max_norm)
        finally:
            self._buckets.release()

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does, and forget a clipping whose step was not taken."""
        self._clipping.forget()
        if self._release is not None:
            self._release.discard()
        super().zero_grad(set_to_none)

    # -- gradient release -------------------------------------------------------------------------------------------

    def release_gradients(
        self,
        clip: Clip = "host",
        replicas: Any = None,
        max_norm: float = math.inf,
        counted: Iterable[Tensor] | None = None,
    ) -> GradientRelease:
        """Step each parameter as soon as its gradient is complete from now on, and free the gradient.

        One gradient at a time is on the device then. `step` goes on being called after the backward passes, and takes
        what they have left. A Trainer does this by `optim_args="release=true"`.

        Args:
            clip: where the norm of all gradients comes from, and so whether gradients can be clipped and accumulated:
                see `release.py`.
            replicas: the `DistributedDataParallel` module of the weights, without which the processes would train each
                for itself. FSDP2 needs nothing.
            max_norm: what clip="recompute" clips to; under the others `clip_grad_norm_` says it.
            counted: the parameters whose gradients count in that norm, in the order in which it adds them up; by
                default all of this optimizer, in the order of its groups.

        Raises:
            ValueError: `clip` has no such value, or an option of a group or the processes do not go with it.
            RuntimeError: gradients are held that the last release was to step.

        >>> model = torch.nn.Linear(64, 64)
        >>> optimizer = hf_lowmem.build_optimizer(model, "slim_adamw_8bit", lr=1e-3)
        >>> release = optimizer.release_gradients(clip="none")
        >>> model(torch.ones(1, 64)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> optimizer.step()
        """
        if self._release is not None and self._release.holds_gradients:
            raise RuntimeError(
                "Gradients of the last backward pass are still to be stepped: call step or zero_grad first."
            )
        self.keep_gradients()
        self._release = GradientRelease(self, clip, replicas, max_norm, counted)
        return self._release

    def keep_gradients(self) -> None:
        """Let gradients stay until the step again."""
        if self._release is not None:
            self._release.detach()
        self._release = None

    @property
    def gradient_release(self) -> GradientRelease | None:
        """The release that is in force, if any."""
        return self._release

    def _warn_if_kept(self) -> None:
        """Warn once if `release` is set but nothing releases gradients."""
        if not self._warned_of_release and any(g["release"] for g in self.param_groups):
            self._warned_of_release = True
            logger.warning(
                "release=true, but gradients are kept until the step: hf_lowmem.register() lets a Trainer release "
                "them, or call optimizer.release_gradients()."
            )

    def _check_groups(self) -> None:
        """Refuse groups that have changed, except by DeepSpeed ZeRO where flat pieces are stepped as weights are."""
        flat = self.holds_flat_pieces()
        if flat and self._layout_of_flat_pieces() is None:
            raise RuntimeError(
                f"The groups of {type(self).__name__} hold flat pieces of weights, as DeepSpeed ZeRO makes them, "
                "which have no rows and heads, and mix weights that are stored in different bits: train with FSDP2 or "
                "with 'lowmem_adamw' or 'signum', whose state_bits are 32 or 16 for all weights."
            )
        if len(self.param_groups) != len(self._layouts) and not flat:
            raise RuntimeError(
                f"The optimizer holds {len(self.param_groups)} parameter groups where {len(self._layouts)} were "
                "added: add groups by optimizer.add_param_group, and build the optimizer anew to remove some."
            )
        for number, (group, layouts) in enumerate(zip(self.param_groups, self._layouts, strict=not flat)):
            layouts.check(group, number, self.layout_options, flat)
        for group in self.param_groups:
            check_flags(group, type(self).__name__)

    @classmethod
    def _hyper(cls, group: Group, bucket: Bucket) -> Hyper:
        (beta1, beta2), lr = group["betas"], group["lr"]
        on_device = group["capturable"] and isinstance(lr, Tensor) and lr.device == bucket.device
        lr = lr.reshape(()) if on_device else float(lr)
        flags = cls.flags_of(bucket.rule, group)
        return Hyper(lr, float(beta1), float(beta2), group["eps"], group["weight_decay"], flags)

    @classmethod
    def flags_of(cls, rule: str, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the hyperparameters that only this update rule has."""
        return {flag: group[flag] for flag in RULE_FLAGS.get(rule, ())}

    def _check_capture(self) -> None:
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check
        check()
        self._clipping.check_capture()


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()
