"""The callbacks that `register()` adds to every Trainer. They act only on optimizers of this package."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_lowmem.dense import is_plain
from hf_lowmem.log import get_logger
from hf_lowmem.optimizer import LowMemOptimizer
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
        self._before: list[tuple[Any, Tensor, Tensor]] = []  # weights, sampled entries, and their values
        self._shard: Any = None  # one of the narrow weights that are sharded
        self._measured: Measured | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer, self._before = unwrapped(optimizer), []
        ours = isinstance(optimizer, LowMemOptimizer)
        if not self._due or not (self.every_optimizer or ours):
            return
        if ours:
            optimizer.synchronize_state()  # the state may be on its way to the host
        for group in optimizer.param_groups:
            # The first step of a warm-up has a learning rate of 0 and is not meant to change anything.
            if float(group["lr"]) == 0 or group.get("rounding") == "stochastic":
                continue
            for param in group["params"]:
                narrow = param.dtype in (torch.bfloat16, torch.float16)
                # Neither is the first call of an optimizer that only finds its basis.
                idle = (
                    ours
                    and optimizer.idle_calls
                    and float(optimizer.state.get(param, {}).get("step", 0)) < optimizer.idle_calls
                )
                here = local(param)
                if narrow and is_sharded(param):
                    self._shard = param
                if param.grad is not None and here.numel() and narrow and is_plain(here) and not idle:
                    at = sampled_entries(here.numel(), here.device)
                    self._before.append((param, at, stored(optimizer, param, at)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        sampled, self._before, shard, self._shard = self._before, [], self._shard, None
        # A process whose shards are all empty takes part in the sums of the others.
        skipped = getattr(optimizer, "step_was_skipped", False)  # by the scaler of float16 gradients
        if skipped or (not sampled and shard is None):
            return
        optimizer, self._due = unwrapped(optimizer), False
        # These estimated sums over all entries stay on the device until they are logged.
        device = local(sampled[0][0] if sampled else shard).device
        lost = counted = torch.zeros((), dtype=torch.float32, device=device)
        for param, at, before in sampled:
            moved = local_grad(param.grad, param).take(at) != 0
            same = (stored(optimizer, param, at) == before).all(0) & moved
            entries = local(param).numel() / len(at)
            lost = lost + entries * same.sum().to(lost.device)
            counted = counted + entries * moved.sum().to(counted.device)
        if shard is not None:
            lost, counted = lost.clone(), counted.clone()
            add_up([(lost, EVERYONE), (counted, EVERYONE)])
        groups = optimizer.param_groups
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


CALLBACKS = (LostUpdates, OffloadState)
