"""What the RLHF demo measured, and the table, the figure and the JSON made of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hf_lowmem.demo.preferences import KINDS
from hf_lowmem.demo.report import COLORS, circumstances
from hf_lowmem.demo.rlhf_settings import RlhfSettings
from hf_lowmem.demo.watch import Curve

# The keys of `Pipeline.stages`, in their order.
SFT, REWARD, GRPO, DPO = "SFT", "reward model", "GRPO", "DPO"

# The keys of a stage's `figures`.
LOSS = "held-out loss"
ACCURACY = "held-out accuracy"
MARGIN = "held-out margin"
MODEL_REWARD, ANSWER_OVERLAP = "model reward", "answer overlap"


@dataclass(frozen=True)
class Stage:
    """One stage's results: `figures` by name, and a curve of (step, value) pairs for everything the trainer logged."""

    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    state_bytes_per_parameter_outside_embeddings: float
    seconds: float
    figures: dict[str, float]
    curves: dict[str, Curve]


@dataclass(frozen=True)
class Pipeline:
    """One optimizer's stages, by name."""

    optim: str
    stages: dict[str, Stage]


def print_table(pipelines: list[Pipeline], console: Console) -> None:
    """A column for each optimizer; two fit in 80 columns."""
    stages = pipelines[0].stages
    title = f"\nLlama, {stages[SFT].parameters:,} parameters; each optimizer trained all its models itself"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("", no_wrap=True)
    for pipeline in pipelines:
        table.add_column(pipeline.optim, justify="right")
    for name, stage in stages.items():
        label = name
        for figure in stage.figures:
            values = [p.stages[name].figures[figure] for p in pipelines]
            table.add_row(label, figure, *(format_figure(figure, value) for value in values))
            label = ""
        table.add_row("", "optimizer state, MiB", *(f"{p.stages[name].state_bytes / 2**20:.2f}" for p in pipelines))
        table.add_row("", "seconds", *(f"{p.stages[name].seconds:.0f}" for p in pipelines), end_section=True)
    console.print(table)


def format_figure(name: str, value: float) -> str:
    is_share = name.startswith((ACCURACY, ANSWER_OVERLAP))
    return f"{value:.1%}" if is_share else f"{value:.3f}"


def save_json(pipelines: list[Pipeline], settings: RlhfSettings, device: str, seconds: float, path: Path) -> None:
    """Everything in the table and the figure, with what is needed to repeat it."""
    report = circumstances(settings, device) | {"seconds": seconds, "pipelines": [asdict(p) for p in pipelines]}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def save_png(pipelines: list[Pipeline], path: Path) -> None:
    """A panel for each stage, two for GRPO's two rewards, and one of optimizer memory."""
    from matplotlib.figure import Figure  # this API needs no display and touches no global state

    figure = Figure(figsize=(15, 8.4), dpi=120, layout="constrained")
    panels = figure.subplots(2, 3)
    (loss, accuracy, memory), (model_reward, shared, margin) = panels

    draw_curves(loss, pipelines, SFT, "loss", "eval_loss")
    loss.set(title="SFT: held-out loss (dots) and training loss", ylabel="nats per token")
    draw_curves(model_reward, pipelines, GRPO, "rewards/reward_model/mean", "eval_rewards/reward_model/mean")
    model_reward.set(title="GRPO: its own reward model's score", ylabel="mean score (held-out questions: dots)")
    draw_curves(shared, pipelines, GRPO, "rewards/answer_overlap/mean", "eval_rewards/answer_overlap/mean")
    shared.set(title="GRPO: words shared with the right answer", ylabel="mean F1 (held-out questions: dots)")
    draw_curves(margin, pipelines, DPO, "rewards/margins", *(f"eval_{kind}_rewards/margins" for kind in KINDS))
    margin.set(title="DPO: reward margin", ylabel="chosen - rejected (held-out pairs by kind: dots)")

    rows = [(f"{stage}\n{kind}", stage, f"{ACCURACY}, {kind}") for stage in (REWARD, DPO) for kind in KINDS]
    draw_bars(
        accuracy,
        [label for label, _, _ in rows],
        pipelines,
        [[100 * p.stages[stage].figures[name] for _, stage, name in rows] for p in pipelines],
        "{:.0f}",
    )
    accuracy.axhline(50, color="black", linewidth=1, linestyle=":")
    accuracy.set(title="Held-out pairs told apart, by rejected answer (dotted: chance)", ylabel="%", ylim=(0, 108))

    stages = list(pipelines[0].stages)
    sizes = [[p.stages[stage].state_bytes / 2**20 for stage in stages] for p in pipelines]
    draw_bars(memory, stages, pipelines, sizes, "{:.1f}")
    memory.set(title="Optimizer state", ylabel="MiB")

    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, model_reward, shared, margin):
        axes.grid(alpha=0.25)
        axes.set_xlabel("step")
    loss.legend(frameon=False)
    memory.legend(frameon=False)
    figure.savefig(path)


def draw_curves(axes: Any, pipelines: list[Pipeline], stage: str, train: str, *held_out: str) -> None:
    """A thin line for the training curve and dots for each held-out one."""
    for color, pipeline in zip(colors(pipelines), pipelines, strict=True):
        curves = pipeline.stages[stage].curves
        axes.plot(*zip(*curves[train], strict=True), color=color, linewidth=1, alpha=0.5)
        for label, key in zip((pipeline.optim, *[None] * len(held_out)), held_out, strict=False):
            axes.plot(*zip(*curves[key], strict=True), color=color, marker="o", markersize=5, label=label)


def draw_bars(
    axes: Any, labels: list[str], pipelines: list[Pipeline], heights: list[list[float]], number: str
) -> None:
    """A group of bars for each label, in it one for each pipeline."""
    width = 0.8 / len(pipelines)
    for i, (color, pipeline) in enumerate(zip(colors(pipelines), pipelines, strict=True)):
        offset = (i - (len(pipelines) - 1) / 2) * width
        places = [place + offset for place in range(len(labels))]
        bars = axes.bar(places, heights[i], width=0.9 * width, color=color, label=pipeline.optim)
        axes.bar_label(bars, [number.format(height) for height in heights[i]], padding=2)
    axes.set_xticks(range(len(labels)), labels)


def colors(pipelines: list[Pipeline]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(pipelines))]
