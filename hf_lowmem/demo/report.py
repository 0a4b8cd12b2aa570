"""The figures that the demos measure, and the tables, the drawing and the JSON that show them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import cycle
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure  # unlike pyplot, it needs no display and changes no global state
from tqdm import tqdm

from hf_lowmem.demo.settings import BASELINE, RlhfSettings, Settings
from hf_lowmem.planner.tables import table

PACKAGES = ("hf_lowmem", "torch", "transformers", "trl", "accelerate", "datasets")
COLORS = ("#4c566a", "#d95f02", "#1b7f9e", "#7a5195", "#5f8a3b", "#c44e6b")
ACCURACY, ANSWER_OVERLAP = "held-out accuracy", "answer overlap"  # the figures that are shown in percent

Curve = list[tuple[int, float]]  # (step, value) pairs


@dataclass
class Training:
    """The results of one training run: its optimizer state, times, curves of all that it logged, and figures."""

    parameters: int
    state_bytes: int
    state_bytes_per_parameter: float
    state_bytes_per_parameter_outside_embeddings: float
    seconds: float
    seconds_per_step: float
    curves: dict[str, Curve]
    figures: dict[str, float] = field(default_factory=dict)

    def last(self, key: str) -> float:
        """Return the value that was logged last under this key."""
        return self.curves[key][-1][1]


Pipeline = Mapping[str, Training]  # the training runs of one optimizer by stage


class Panel(NamedTuple):
    """A panel of the figure: the stage that it shows, and the keys of its curves."""

    stage: str
    train: str
    held_out: Sequence[str]
    title: str
    ylabel: str


def measure_state(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the number of trained parameters and the bytes of all tensors in the optimizer's state."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied weight appears once
    outside = [p for p in parameters if id(p) not in embeddings]

    def state_bytes(params: Iterable[torch.nn.Parameter]) -> int:
        return sum(value.nbytes for p in params for value in optimizer.state[p].values() if torch.is_tensor(value))

    count = sum(p.numel() for p in parameters)
    return {
        "parameters": count,
        "state_bytes": state_bytes(parameters),
        "state_bytes_per_parameter": state_bytes(parameters) / count,
        "state_bytes_per_parameter_outside_embeddings": state_bytes(outside) / sum(p.numel() for p in outside),
    }


def describe_device() -> str:
    """Return the name of the GPU, or the number of threads on the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def describe_run(optim: str, run: Training, baseline: Training | None) -> dict[str, Any]:
    """Return the demo's numbers for one optimizer, ready for JSON."""
    change = None if baseline is None else 100 * (run.last("eval_loss") / baseline.last("eval_loss") - 1)
    numbers = {"optim": optim, "held_out_loss": run.last("eval_loss"), "held_out_loss_change_percent": change}
    curves = {"train_losses": run.curves["loss"], "held_out_losses": run.curves["eval_loss"]}
    return numbers | {name: value for name, value in vars(run).items() if not isinstance(value, dict)} | curves


def headline(runs: list[dict[str, Any]]) -> str:
    """Return what the first optimizer beside the baseline does to memory and loss, "" if one of the two is missing."""
    baseline = next((run for run in runs if run["optim"] == BASELINE), None)
    other = next((run for run in runs if run["optim"] != BASELINE), None)
    if baseline is None or other is None:
        return ""
    less = baseline["state_bytes"] / other["state_bytes"]
    change = other["held_out_loss_change_percent"]
    return f"{other['optim']}: {less:.1f} times less optimizer state than AdamW, held-out loss {change:+.1f} %"


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Print the demo's table, with a row per optimizer."""
    head = ("optim", "state, MiB", "bytes per param", "without embeddings", "held-out loss", "change", "s per step")
    rows = [
        (
            run["optim"],
            f"{run['state_bytes'] / 2**20:.2f}",
            f"{run['state_bytes_per_parameter']:.3f}",
            f"{run['state_bytes_per_parameter_outside_embeddings']:.3f}",
            f"{run['held_out_loss']:.4f}",
            "-" if (change := run["held_out_loss_change_percent"]) is None else f"{change:+.2f} %",
            f"{run['seconds_per_step']:.3f}",
        )
        for run in runs
    ]
    tqdm.write(f"\nLlama, {runs[0]['parameters']:,} parameters; optimizer state as measured after the last step\n")
    tqdm.write("\n".join(table(head, rows)))
    tqdm.write(f"\nThe change is against {BASELINE}. Times are comparable only on a machine that does nothing else.")


def print_pipelines(pipelines: Mapping[str, Pipeline]) -> None:
    """Print the RLHF demo's table, with a column per optimizer."""
    first = next(iter(pipelines.values()))
    rows: list[Sequence[str]] = []
    for stage in first:
        runs = [pipeline[stage] for pipeline in pipelines.values()]
        figures = [(name, *(format_figure(name, run.figures[name]) for run in runs)) for name in runs[0].figures]
        figures += [("optimizer state, MiB", *(f"{run.state_bytes / 2**20:.2f}" for run in runs))]
        figures += [("seconds", *(f"{run.seconds:.0f}" for run in runs))]
        rows += [("" if number else stage, *figure) for number, figure in enumerate(figures)]
    parameters = next(iter(first.values())).parameters
    tqdm.write(f"\nLlama, {parameters:,} parameters; each optimizer trained all its models itself\n")
    tqdm.write("\n".join(table(("stage", "", *pipelines), rows, left=(0, 1))) + "\n")


def format_figure(name: str, value: float) -> str:
    return f"{value:.1%}" if name.startswith((ACCURACY, ANSWER_OVERLAP)) else f"{value:.3f}"


def draw(pipelines: Mapping[str, Pipeline], panels: Sequence[Panel]) -> Figure:
    """Draw the panels of curves, and one with a bar of optimizer memory per optimizer."""
    rows, columns = (1, 2) if len(panels) == 1 else (2, 3)
    figure = Figure(figsize=(6 * columns, 4.8 * rows), dpi=130, layout="constrained")
    *places, memory = figure.subplots(rows, columns).flat
    for axes, panel in zip(places, panels, strict=True):
        for (optim, pipeline), color in zip(pipelines.items(), cycle(COLORS), strict=False):
            curves = pipeline[panel.stage].curves
            axes.plot(*zip(*curves[panel.train], strict=True), color=color, linewidth=1, alpha=0.4)
            for key in panel.held_out:
                axes.plot(*zip(*curves[key], strict=True), color=color, marker="o", markersize=5, label=optim)
        axes.set(title=f"{panel.stage}: {panel.title}", ylabel=panel.ylabel, xlabel="step (held-out: dots)")
        axes.grid(alpha=0.25)
    places[0].legend(frameon=False)
    for (optim, pipeline), color in zip(pipelines.items(), cycle(COLORS), strict=False):
        largest = max(pipeline.values(), key=lambda run: run.state_bytes)
        bar = memory.barh(optim, largest.state_bytes / 2**20, color=color, height=0.6)
        memory.bar_label(bar, [f"{largest.state_bytes_per_parameter:.2f} B/param"], padding=4)
    memory.set(title="Optimizer state", xlabel="MiB", xmargin=0.35)
    memory.invert_yaxis()
    return figure


def save(settings: Settings | RlhfSettings, name: str, figure: Figure, numbers: dict[str, Any]) -> None:
    """Write the figure, and the numbers with what is needed to repeat them, to the output folder."""
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    png, path = settings.output_dir / f"{name}.png", settings.output_dir / f"{name}.json"
    figure.savefig(png)
    versions = {package: import_module(package).__version__ for package in PACKAGES}
    circumstances = {
        "settings": asdict(settings) | {"output_dir": str(settings.output_dir)},
        "device": describe_device(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | versions,
    }
    path.write_text(json.dumps(circumstances | numbers, indent=2, default=vars) + "\n", encoding="utf-8")
    tqdm.write(f"Figure: {png}, numbers: {path}")
