"""What happens around a Trainer's steps; `register()` adds both callbacks to every Trainer.

Each acts only where the optimizer is one of this package's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.state import KAHAN_COMP

logger = logging.getLogger(__name__)

SAMPLES = 256  # entries per weight
GIB = 2**30


class LostUpdates(TrainerCallback):  # type: ignore[misc]
    """Logs `lost_updates`, the share of weight entries that an update left as they were, and warns once above half.

    An update smaller than half a unit in the last place of a bfloat16 or float16 weight rounds to nothing. One step
    per logging interval is looked at, at 256 entries of each such weight, of which those with a gradient count; each
    weight counts by its size. With `rounding="kahan"` an entry is lost where its buffer stays too. Nothing is logged
    where no weight is narrower than float32, or under `rounding="stochastic"`, which loses nothing on average.

    Args:
        every_optimizer: look at other packages' optimizers too.
    """

    def __init__(self, every_optimizer: bool = False) -> None:
        self.every_optimizer = every_optimizer
        self._due = True
        self._warned = False
        self._before: list[tuple[Any, Tensor, Tensor]] = []  # weight, places, what was stored there
        self._share: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = unwrapped(optimizer)
        if not self._due or not (self.every_optimizer or isinstance(optimizer, LowMemOptimizer)):
            return
        for group in optimizer.param_groups:
            # A warm-up's first step has no learning rate and changes nothing, by intention.
            if float(group["lr"]) == 0 or group.get("rounding") == "stochastic":
                continue
            for param in group["params"]:
                if param.grad is not None and param.numel() and param.dtype in (torch.bfloat16, torch.float16):
                    at = sampled_places(param)
                    self._before.append((param, at, stored(optimizer, param, at)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not self._before:
            return
        optimizer, self._due = unwrapped(optimizer), False
        # Sums over entries, estimated; they stay on the device until they are logged.
        lost = counted = torch.zeros((), device=self._before[0][0].device)
        for param, at, before in self._before:
            moved = param.grad.take(at) != 0
            same = (stored(optimizer, param, at) == before).all(0) & moved
            entries = param.numel() / len(at)
            lost = lost + entries * same.sum().to(lost.device)
            counted = counted + entries * moved.sum().to(counted.device)
        self._before, self._share = [], lost / counted

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._due = True
        if self._share is None:
            return
        share, self._share = self._share.item(), None
        if share != share:  # no sampled entry had a gradient
            return
        add_to_log("lost_updates", round(share, 4), state, logs)
        if share > 0.5 and not self._warned:
            self._warned = True
            logger.warning(
                "%.0f %% of the weights' updates at step %d were lost to rounding: the learning rate is too small for "
                'weights of 16 bits. Set optim_args="rounding=kahan" (2 more bytes per weight) or '
                '"rounding=stochastic", train float32 weights, or raise learning_rate.',
                100 * share,
                state.global_step,
            )


class OffloadState(TrainerCallback):  # type: ignore[misc]
    """Moves the optimizer's state to the host where it was built with `offload_state=true`.

    It leaves the device after each step that a generation follows (GRPO, RLOO and other trainers whose rollouts last
    for several steps), or after every step (SFT, DPO, trainers that generate at every step); the next step brings it
    back. Logs `offload_gib` and `offload_seconds`, what was moved both ways since the last log and how long the copies
    took. State on the CPU stays where it is.
    """

    def __init__(self) -> None:
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._first_step = state.global_step
        optimizer = offloading(optimizer)
        if optimizer is None:
            return
        if all(param.device.type == "cpu" for group in optimizer.param_groups for param in group["params"]):
            logger.info("offload_state does nothing here: the optimizer's state is on the CPU already.")
        optimizer.release_state()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = offloading(optimizer)
        if optimizer is not None and generates_before_update(args, state.global_step - self._first_step):
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


def generates_before_update(args: Any, steps_done: int) -> bool:
    """Whether a trainer generates between `steps_done` steps and the next update; True where none is known to."""
    lifetime = getattr(args, "steps_per_generation", None)
    if lifetime is None:
        return True
    lifetime *= getattr(args, "num_iterations", 1)  # batches that one rollout serves
    first = steps_done * args.gradient_accumulation_steps
    return any(batch % lifetime == 0 for batch in range(first, first + args.gradient_accumulation_steps))


def offloading(optimizer: Any) -> LowMemOptimizer | None:
    optimizer = unwrapped(optimizer)
    wanted = isinstance(optimizer, LowMemOptimizer) and any(g["offload_state"] for g in optimizer.param_groups)
    return optimizer if wanted else None


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def sampled_places(param: Tensor) -> Tensor:
    """Fixed places (flat, int64) all over a weight: the same at every call."""
    generator = torch.Generator().manual_seed(param.numel())
    return torch.randint(param.numel(), (min(SAMPLES, param.numel()),), generator=generator).to(param.device)


def stored(optimizer: Any, param: Tensor, at: Tensor) -> Tensor:
    """What is kept of a weight at some places: the weight, and Kahan's buffer, zero before the first step."""
    weight, comp = param.detach().take(at), optimizer.state.get(param, {}).get(KAHAN_COMP)
    return torch.stack(
        [weight, torch.zeros_like(weight) if comp is None else comp.take(at.to(comp.device)).to(at.device)]
    )


def add_to_log(name: str, value: float, state: Any, logs: dict[str, Any] | None) -> None:
    """Add a number to what is being logged, and to the history, which has it already."""
    if logs is not None:
        logs[name] = value
    if state.log_history:
        state.log_history[-1][name] = value


CALLBACKS = (LostUpdates, OffloadState)
