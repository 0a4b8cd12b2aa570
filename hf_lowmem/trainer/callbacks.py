"""The callbacks that `register()` adds to every Trainer. They act only on optimizers of this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_lowmem.dense import is_plain
from hf_lowmem.log import get_logger
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.release import Clip
from hf_lowmem.sharding import EVERYONE, add_up, is_sharded, local, local_grad
from hf_lowmem.state import KAHAN_COMP

logger = get_logger(__name__)

SAMPLES = 256  # the number of entries that are compared per weight
GIB = 2**30


class Measured(NamedTuple):
    """The share of lost updates in one step (a 0-D tensor on the device), and what the warning says about the step."""

    share: Tensor
    step: int
    lr: float
    kahan: bool


class LostUpdates(TrainerCallback):  # type: ignore[misc]
    """Logs `lost_updates`, the share of weight entries that an update did not change, and warns once above half.

    An update of less than half a unit in the last place of a bfloat16 or float16 weight is lost to rounding. One step
    per logging interval is measured, on 256 entries of each such weight. Entries without a gradient do not count, and
    each weight counts by its size. With `rounding="kahan"` an update is lost only if the compensation does not change
    either. Nothing is logged if no weight is narrower than float32, or with `rounding="stochastic"`, which loses
    nothing on average.

    Set `LostUpdates.every_optimizer = True` before the Trainer is created to measure other packages' optimizers, too.

    >>> from transformers import Trainer, TrainingArguments
    >>> model = torch.nn.Linear(8, 8).bfloat16()
    >>> trainer = Trainer(model, TrainingArguments(report_to="none"), callbacks=[hf_lowmem.LostUpdates()])
    """

    every_optimizer: ClassVar[bool] = False

    def __init__(self) -> None:
        self._due = True
        self._warned = False
        self._optimizer: Any = None
        self._before: list[tuple[Any, Tensor, Tensor]] = []  # weights, sampled entries, and their values
        self._counts: list[tuple[Tensor, Tensor]] = []  # of a weight's entries: lost updates, and all
        self._shard: Any = None  # one of the narrow weights that are sharded
        self._measured: Measured | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._optimizer, self._before, self._counts = unwrapped(optimizer), [], []
        release = self._optimizer.gradient_release if isinstance(self._optimizer, LowMemOptimizer) else None
        if release is not None:
            release.watcher = self if self._due else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._optimizer, self._before = unwrapped(optimizer), []
        ours = isinstance(self._optimizer, LowMemOptimizer)
        if not self._due or not (self.every_optimizer or ours):
            return
        if ours:
            self._optimizer.synchronize_state()  # the state may be on its way to the host
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                self.before_step(param, group)

    def before_step(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Take the sample of a parameter that is about to be stepped, if its updates can be lost."""
        # The first step of a warm-up has a learning rate of 0 and is not meant to change anything.
        if float(group["lr"]) == 0 or group.get("rounding") == "stochastic":
            return
        optimizer, narrow = self._optimizer, param.dtype in (torch.bfloat16, torch.float16)
        # Neither is the first call of an optimizer that only finds its basis.
        idle = (
            isinstance(optimizer, LowMemOptimizer)
            and optimizer.idle_calls
            and float(optimizer.state.get(param, {}).get("step", 0)) < optimizer.idle_calls
        )
        here = local(param)
        if narrow and is_sharded(param):
            self._shard = param
        if param.grad is not None and here.numel() and narrow and is_plain(here) and not idle:
            at = sampled_entries(here.numel(), here.device)
            self._before.append((param, at, stored(optimizer, param, at)))

    def after_step(self, param: Tensor) -> None:
        """Count the lost updates of a parameter that was stepped alone."""
        self._count()

    def _count(self) -> None:
        """Count the lost updates of the samples, in sums over all entries that stay on the device."""
        for param, at, before in self._before:
            moved = local_grad(param.grad, param).take(at) != 0
            same = (stored(self._optimizer, param, at) == before).all(0) & moved
            entries = local(param).numel() / len(at)
            self._counts.append((entries * same.sum(), entries * moved.sum()))
        self._before = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        skipped = getattr(optimizer, "step_was_skipped", False)  # by the scaler of float16 gradients
        if skipped:
            self._before = []
        self._count()
        counts, self._counts, shard, self._shard = self._counts, [], self._shard, None
        # A process whose shards are all empty takes part in the sums of the others.
        if skipped or (not counts and shard is None):
            return
        self._due = False
        device = counts[0][0].device if counts else local(shard).device
        lost = counted = torch.zeros((), dtype=torch.float32, device=device)
        for lost_here, all_here in counts:
            lost, counted = lost + lost_here.to(device), counted + all_here.to(device)
        if shard is not None:
            lost, counted = lost.clone(), counted.clone()
            add_up([(lost, EVERYONE), (counted, EVERYONE)])
        groups = self._optimizer.param_groups
        kahan = all(group.get("rounding") == "kahan" for group in groups)
        self._measured = Measured(lost / counted, state.global_step + 1, max(float(g["lr"]) for g in groups), kahan)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._due = True
        if self._measured is None:
            return
        measured, self._measured = self._measured, None
        share = measured.share.item()
        if share != share:  # no sampled entry had a gradient
            return
        add_to_log("lost_updates", round(share, 4), state, logs)
        if share > 0.5 and not self._warned and state.is_world_process_zero:
            self._warned = True
            remedy = 'Set optim_args="rounding=kahan" (2 more bytes per weight) or "rounding=stochastic", train'
            logger.warning(
                "%.0f %% of the updates of 16-bit weights at step %d were lost to rounding, because its learning rate "
                "of %.1e is too small for them. %s float32 weights, or raise learning_rate.",
                100 * share,
                measured.step,
                measured.lr,
                "Train" if measured.kahan else remedy,
            )


class OffloadState(TrainerCallback):  # type: ignore[misc]
    """Moves the state of an optimizer that was built with `offload_state=true` to the host.

    In trainers whose rollouts last for several steps (GRPO, RLOO and others) the state leaves the device after each
    step that is followed by a generation or an evaluation; in all other trainers it leaves after every step. The next
    step brings it back. State on the CPU stays where it is.

    Logs `offload_gib` and `offload_seconds`: what was moved in both directions since the last log, and how long the
    copies took.

    >>> from transformers import Trainer, TrainingArguments
    >>> model = torch.nn.Linear(8, 8)
    >>> optimizer = hf_lowmem.build_optimizer(model, "lowmem_adamw", lr=1e-3, optim_args="offload_state=true")
    >>> trainer = Trainer(
    ...     model,
    ...     TrainingArguments(report_to="none"),
    ...     optimizers=(optimizer, None),
    ...     callbacks=[hf_lowmem.OffloadState()],
    ... )
    """

    def __init__(self) -> None:
        self._batches = 0  # the number of micro-batches so far, which tells when the trainer generates

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = offloading(optimizer)
        if optimizer is None:
            return
        on_cpu = all(param.device.type == "cpu" for group in optimizer.param_groups for param in group["params"])
        if on_cpu and state.is_world_process_zero:
            logger.info("offload_state does nothing here: the optimizer's state is already on the CPU.")
        optimizer.release_state()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._batches += 1
        optimizer = offloading(optimizer)
        # An evaluation may generate, too.
        if optimizer is not None and (control.should_evaluate or generates_before_update(args, self._batches)):
            optimizer.release_state()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        optimizer = offloading(optimizer)
        moved = optimizer.state_transferred() if optimizer is not None else None
        if moved is not None and moved.nbytes:
            add_to_log("offload_gib", round(moved.nbytes / GIB, 6), state, logs)
            add_to_log("offload_seconds", round(moved.seconds, 6), state, logs)


class ReleaseGradients(TrainerCallback):  # type: ignore[misc]
    """Lets an optimizer that was built with `release=true` step each weight in the backward pass.

    `clip` says where the norm for `max_grad_norm` comes from, and whether gradients are accumulated.

    >>> from transformers import Trainer, TrainingArguments
    >>> model = torch.nn.Linear(8, 8)
    >>> optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3, optim_args="release=true")
    >>> trainer = Trainer(
    ...     model,
    ...     TrainingArguments(report_to="none"),
    ...     optimizers=(optimizer, None),
    ...     callbacks=[hf_lowmem.ReleaseGradients()],
    ... )
    """

    def __init__(self) -> None:
        self.trainer: Any = None  # which registration sets, as callbacks are not given the wrapped model

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, LowMemOptimizer) or not any(g["release"] for g in optimizer.param_groups):
            return
        clip = clip_of(args, optimizer.param_groups[0]["clip"])
        optimizer.keep_gradients()  # those of a run that was interrupted are of no use
        max_norm = args.max_grad_norm or math.inf if clip == "recompute" else math.inf
        counted = None if model is None else model.parameters()
        optimizer.release_gradients(clip, self._replicas(args, optimizer), max_norm, counted)

    def _replicas(self, args: Any, optimizer: LowMemOptimizer) -> Any:
        """Return the DistributedDataParallel module of a run, or None where there is one process or FSDP2.

        Raises:
            ValueError: the processes share their gradients in another way.
        """
        sharded = all(is_sharded(param) for group in optimizer.param_groups for param in group["params"])
        if args.world_size == 1 or sharded:
            return None
        wrapped = getattr(self.trainer, "model_wrapped", None)
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped
        raise ValueError(
            f"release=true goes with one process, DistributedDataParallel and FSDP2, but not with the "
            f"{args.world_size} processes of this run: call hf_lowmem.register() before the Trainer is made, or leave "
            "release out."
        )

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, LowMemOptimizer):
            optimizer.keep_gradients()


def clip_of(args: Any, wanted: str) -> Clip:
    """Return how a run with these arguments clips released gradients.

    Raises:
        ValueError: the run has a scaler of gradients, or `wanted` cannot do what it asks for.
    """
    clips, accumulates = args.max_grad_norm > 0, args.gradient_accumulation_steps > 1
    if args.fp16:
        raise ValueError("release=true does not go with fp16=True, whose gradients are scaled: use bf16=True.")
    if wanted == "auto":
        return "host" if clips or accumulates else "none"
    if wanted == "none" and clips:
        raise ValueError(
            f"clip=none does not clip to max_grad_norm={args.max_grad_norm}: use clip=host, or set it to 0."
        )
    if wanted != "host" and accumulates:
        raise ValueError(
            f"clip={wanted} does not add up gradients over gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: use clip=host."
        )
    if wanted == "recompute" and args.torch_compile:
        raise ValueError(
            "clip=recompute does not go with torch_compile=True, whose graphs are gone after one backward pass: use "
            "clip=host."
        )
    if wanted == "previous" and clips:
        logger.warning("clip=previous is not exact: each step is clipped by the norm of the step before.")
    return cast(Clip, wanted)


def generates_before_update(args: Any, batches: int) -> bool:
    """Return whether a trainer generates between its first `batches` micro-batches and the next update.

    The answer is True for trainers that do not say how long they reuse a rollout.
    """
    lifetime = getattr(args, "steps_per_generation", None)
    if lifetime is None:
        return True
    lifetime *= getattr(args, "num_iterations", 1)  # the number of micro-batches that are trained on one rollout
    return any(batch % lifetime == 0 for batch in range(batches, batches + args.gradient_accumulation_steps))


def offloading(optimizer: Any) -> LowMemOptimizer | None:
    """Return our optimizer if it was built with `offload_state=true`, and None otherwise."""
    optimizer = unwrapped(optimizer)
    wanted = isinstance(optimizer, LowMemOptimizer) and any(g["offload_state"] for g in optimizer.param_groups)
    return optimizer if wanted else None


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


@lru_cache(maxsize=1 << 10)  # 2 KiB each
def sampled_entries(numel: int, device: torch.device) -> Tensor:
    """Return flat int64 indices of a fixed random sample of a weight's entries.

    They are cached, because copying them to the device would wait for it.
    """
    generator = torch.Generator().manual_seed(numel)
    return torch.randint(numel, (min(SAMPLES, numel),), generator=generator).to(device)


def stored(optimizer: Any, param: Tensor, at: Tensor) -> Tensor:
    """Return what is stored for some entries of a weight: their values and Kahan's compensation, or zero without."""
    weight, comp = local(param.detach()).take(at).float(), local(optimizer.state.get(param, {}).get(KAHAN_COMP))
    kept = torch.zeros_like(weight) if comp is None else comp.take(at.to(comp.device)).to(weight)
    return torch.stack([weight, kept])


def add_to_log(name: str, value: float, state: Any, logs: dict[str, Any] | None) -> None:
    """Add a number to the current log and to the entry that the Trainer has already made for it in the history."""
    if logs is not None:
        logs[name] = value
    if state.log_history:
        state.log_history[-1][name] = value


CALLBACKS = (LostUpdates, OffloadState, ReleaseGradients)
