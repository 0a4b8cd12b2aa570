"""The callback that keeps and shows what a run logs."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, TrainerCallback

Curve = list[tuple[int, float]]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps every number that one run logs, with its step, and the step times.

    Shows the latest of the logged keys in `shown`, each under its short name: as a live line, or without a TTY as a
    line each time the last of these keys is logged.
    """

    def __init__(self, label: str, steps: int, shown: dict[str, str], console: Console) -> None:
        self.label, self.steps, self.shown, self.console = label, steps, shown, console
        self.curves: defaultdict[str, Curve] = defaultdict(list)
        self.step_seconds: list[float] = []
        self.step_started = 0.0
        self.progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[latest]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(label, total=steps, latest="")

    def last(self, key: str) -> float:
        """The value logged last under this key."""
        return self.curves[key][-1][1]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self.step_started)
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = with_names_of_sets(logs or {})
        for key, value in logs.items():
            self.curves[key].append((state.global_step, float(value)))
        latest = "  ".join(f"{name} {self.last(key):.3f}" for key, name in self.shown.items() if self.curves[key])
        self.progress.update(self.task, latest=latest)
        if list(self.shown)[-1] in logs and not self.console.is_terminal:
            self.console.print(f"{self.label:<16} step {state.global_step}/{self.steps}  {latest}")


def train_watched(
    label: str, trainer: Any, shown: dict[str, str], console: Console, evaluate_first: bool = False
) -> Watch:
    """Train, with held-out figures of the last step in any case; returns what was logged."""
    watch = Watch(label, trainer.args.max_steps, shown, console)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)  # `watch` shows the progress
    with watch.progress:
        if evaluate_first:
            trainer.evaluate()
        trainer.train()
        if trainer.args.max_steps % trainer.args.eval_steps:
            trainer.evaluate()
    return watch


def with_names_of_sets(logs: dict[str, Any]) -> dict[str, Any]:
    """The logs of one of several evaluation sets with its name in every key.

    The Trainer's own keys have it, as in `eval_another_loss`. TRL's metrics are `eval_accuracy` for every set.
    """
    losses = [key for key in logs if key.startswith("eval_") and key.endswith("_loss")]
    prefix = losses[0].removesuffix("_loss") if losses else "eval"
    return {
        prefix + key.removeprefix("eval") if key.startswith("eval_") and not key.startswith(prefix) else key: value
        for key, value in logs.items()
    }
