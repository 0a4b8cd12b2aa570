"""The callback that measures second moments in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_lowmem.algorithms.calibration import CalibratedAdamW
from hf_lowmem.snr.tracker import SnrTracker, is_due
from hf_lowmem.trainer.build import refuse_sharding
from hf_lowmem.trainer.callbacks import unwrapped


class SnrCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the signal-to-noise ratios of the second moments, from which `hf-lowmem snr rules` chooses.

    It measures after the first step, every 100 steps below 1000, and then every 1000, which takes less than 1 % of the
    time of training. The steps are those of SlimAdam's authors, who measure before a step and not after it. Each
    measurement is appended at once to a CSV in their columns. A resumed run goes on with its file. Under DDP the first
    process writes.

    Args:
        path: the CSV; by default `snr.csv` in the Trainer's `output_dir`.
        every: the number of steps between measurements after the first step, in place of that schedule.

    Raises:
        ValueError: `every` is not a whole number of at least 1. When training begins: the run shards its weights, or
            the optimizer keeps no full second moment, as adamw_torch and lowmem_adamw do, or only until `rules=auto`
            averages it.

    >>> from transformers import Trainer, TrainingArguments
    >>> model = torch.nn.Linear(8, 8)
    >>> trainer = Trainer(model, TrainingArguments(report_to="none"), callbacks=[hf_lowmem.SnrCallback(every=50)])
    """

    def __init__(self, path: str | Path | None = None, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(
                f"every={every!r} must be a whole number of at least 1, or None for the authors' schedule."
            )
        self.path = path
        self.every = every
        self._tracker: SnrTracker | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        refuse_sharding(args, "SnrCallback")
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, CalibratedAdamW) and optimizer.calibrates:
            raise ValueError(
                "rules=auto measures by itself, and averages the second moments that SnrCallback would measure: leave "
                "SnrCallback out, or train with lowmem_adamw."
            )
        path = Path(args.output_dir, "snr.csv") if self.path is None else self.path
        self._tracker = SnrTracker(model, path, resumed_step=state.global_step)
        self._tracker.check(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._tracker is not None and is_due(state.global_step, self.every):
            self._tracker.measure(unwrapped(optimizer), state.global_step)
