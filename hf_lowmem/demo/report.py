"""What the demo measured, and the table, the figure and the JSON made of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hf_lowmem.demo import BASELINE, Settings
from hf_lowmem.demo.rlhf_settings import RlhfSettings

PACKAGES = ("hf_lowmem", "torch", "transformers", "trl", "accelerate", "datasets")
COLORS = ("#4c566a", "#d95f02", "#1b7f9e", "#7a5195", "#5f8a3b", "#c44e6b")


@dataclass(frozen=True)
class Run:
    """One optimizer's results. Losses are (step, loss) pairs."""

    optim: str
    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    state_bytes_per_parameter_outside_embeddings: float
    held_out_loss: float
    seconds_per_step: float
    train_losses: list[tuple[int, float]]
    held_out_losses: list[tuple[int, float]]


def measure_state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Count the bytes of every tensor in the optimizer's state: of all parameters, and of those not in embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied weight comes once
    outside = [p for p in parameters if id(p) not in embeddings]

    def state_bytes(params: Iterable[torch.nn.Parameter]) -> int:
        tensors = [value for p in params for value in optimizer.state[p].values() if torch.is_tensor(value)]
        return sum(t.numel() * t.element_size() for t in tensors)

    count = sum(p.numel() for p in parameters)
    return {
        "parameters": count,
        "state_bytes": state_bytes(parameters),
        "state_bytes_per_parameter": state_bytes(parameters) / count,
        "state_bytes_per_parameter_outside_embeddings": state_bytes(outside) / sum(p.numel() for p in outside),
    }


def loss_change_percent(run: Run, runs: list[Run]) -> float | None:
    """The held-out loss against the baseline's, or None where the baseline was not run."""
    baseline = next((r.held_out_loss for r in runs if r.optim == BASELINE), None)
    return None if baseline is None else 100 * (run.held_out_loss / baseline - 1)


def print_table(runs: list[Run], console: Console) -> None:
    """The summary, narrow enough for 80 columns."""
    title = f"\nLlama, {runs[0].parameters:,} parameters; optimizer state as measured after the last step"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption = "Times compare optimizers only where the machine has nothing else to do."
    table.caption_justify, table.caption_style = "left", ""
    table.add_column("\noptim", no_wrap=True)
    for heading in (
        "state\nMiB",
        "bytes per\nparameter",
        "outside\nembeddings",
        "held-out\nloss",
        f"against\n{BASELINE}",
        "s per\nstep",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        change = loss_change_percent(run, runs)
        table.add_row(
            run.optim,
            f"{run.state_bytes / 2**20:.2f}",
            f"{run.state_bytes_per_parameter:.3f}",
            f"{run.state_bytes_per_parameter_outside_embeddings:.3f}",
            f"{run.held_out_loss:.4f}",
            "-" if change is None else f"{change:+.2f} %",
            f"{run.seconds_per_step:.3f}",
        )
    console.print(table)


def save_json(runs: list[Run], settings: Settings, device: str, path: Path) -> None:
    """Everything in the table and the figure, with what is needed to repeat it."""
    report = circumstances(settings, device) | {
        "baseline": BASELINE,
        "runs": [asdict(run) | {"held_out_loss_change_percent": loss_change_percent(run, runs)} for run in runs],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def circumstances(settings: Settings | RlhfSettings, device: str) -> dict[str, Any]:
    """The settings, the device and the versions."""
    return {
        "settings": asdict(settings) | {"output_dir": str(settings.output_dir)},
        "device": device,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in PACKAGES},
    }


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return None


def save_png(runs: list[Run], path: Path) -> None:
    """Loss curves on the left, a bar of optimizer memory per optimizer on the right."""
    from matplotlib.figure import Figure  # this API needs no display and touches no global state

    figure = Figure(figsize=(12, 4.8), dpi=150, layout="constrained")
    losses, memory = figure.subplots(1, 2, width_ratios=(1.5, 1))
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]

    for run, color in zip(runs, colors, strict=True):
        losses.plot(*zip(*run.train_losses, strict=True), color=color, linewidth=1, alpha=0.4)
        losses.plot(*zip(*run.held_out_losses, strict=True), color=color, marker="o", markersize=5, label=run.optim)
    losses.set(xlabel="step", ylabel="loss (nats per token)", title="Loss: held-out (dots) and training (thin lines)")
    losses.legend(frameon=False)
    losses.grid(alpha=0.25)

    sizes = [run.state_bytes / 2**20 for run in runs]
    bars = memory.barh([run.optim for run in runs], sizes, color=colors, height=0.6)
    memory.bar_label(
        bars,
        [f"{size:.1f} MiB\n{r.state_bytes_per_parameter:.2f} B/param" for size, r in zip(sizes, runs, strict=True)],
        padding=4,
    )
    memory.invert_yaxis()
    memory.set(xlabel="optimizer state (MiB)", title="Optimizer memory", xlim=(0, 1.35 * max([*sizes, 1e-3])))
    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
