"""Writes the tables of README.md and docs/ from the committed results and the package. A test fails if they differ.

    python benchmarks/readme_tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. The bytes of each optim name are those of
`hf-lowmem optims`, which a test holds against the declared state; the options are those that the algorithms declare;
the other tables come from benchmarks/results/.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo_seeds import difference
from peers import BASELINE, ROOT
from presets import PRESETS, meta_model
from quality import RATES, SAME_AS
from quality_report import summary_of
from step_time_report import clipped, figure, sections, table, with_quartiles

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.demo import BASELINE as ADAMW
from hf_lowmem.trainer.explain import explain
from hf_lowmem.trainer.names import OPTIM_NAMES

README, (QUALITY, DISTRIBUTED, RELEASE) = (
    ROOT / "README.md",
    (ROOT / "docs" / f"{page}.md" for page in ("quality", "distributed", "release")),
)
STATE = "state_bytes_per_parameter_outside_embeddings"


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def optimizers(current: str) -> str:
    """Return the current table, with the bytes of the names in its first column."""
    head, rule, *rows = current.strip().splitlines()
    lines, seen = [head, rule], []
    for row in rows:
        _, first, _, rest = row.split("|", maxsplit=3)
        names = re.findall(r"`(\w+)`", first)
        lines.append(f"|{first}| {' / '.join(f'{OPTIM_NAMES[name].bytes_per_param:.3f}' for name in names)} |{rest}")
        seen += names
    if sorted(seen) != sorted(OPTIM_NAMES):
        raise ValueError(f"The README's table of optimizers must have each optim name once, but has {seen}.")
    return "\n".join(lines)


def options(_: str) -> str:
    """Return the table of the options in `optim_args`, with the algorithms that have them."""
    owners: dict[tuple[str, str, str], list[str]] = {}
    for algorithm, recipe in RECIPES.items():
        for name, option in recipe.arguments().items():
            default = str(option.default)
            default = default.lower() if isinstance(option.default, bool | None) else default
            owners.setdefault((name, default, option.text.rstrip(".")), []).append(algorithm)
    lines = ["| key | for | default | what |", "|---|---|---|---|"]
    for (name, default, text), algorithms in owners.items():
        lines.append(f"| `{name}` | {named(algorithms)} | {default} | {text} |")
    return "\n".join(lines)


def named(algorithms: list[str]) -> str:
    """Return the names of some algorithms, or of those that are left out of all where these are fewer."""
    others = [algorithm for algorithm in RECIPES if algorithm not in algorithms]
    if not others:
        return "all"
    left_out = len(others) < len(algorithms)
    return "all but " * left_out + ", ".join(f"`{each}`" for each in (others if left_out else algorithms))


def demo(_: str) -> str:
    runs = results("demo_cpu")["runs"]
    return losses("held-out loss", [(run["optim"], run[STATE], run["held_out_loss"]) for run in runs])


def demo_seeds(_: str) -> str:
    rows = [row for row in results("demo_seeds_cpu")["rows"] if row["optim"] in (ADAMW, *OPTIM_NAMES)]
    means = [(row["optim"], row[STATE], statistics.mean(row["held_out_losses"])) for row in rows]
    return losses("mean held-out loss", means)


def losses(what: str, rows: list[tuple[str, float, float]]) -> str:
    """Return a table of losses from rows of (optim, state, loss)."""
    against = next(loss for optim, _, loss in rows if optim == ADAMW)
    lines = [f"| `optim` | state | {what} | against `{ADAMW}` |", "|---|---:|---:|---:|"]
    for optim, state, loss in rows:
        change = "" if optim == ADAMW else f"{100 * (loss / against - 1):+.1f} %"
        lines.append(f"| `{optim}` | {state:.3f} | {loss:.3f} | {change} |")
    return "\n".join(lines)


def rlhf_seeds(_: str) -> str:
    rows = results("rlhf_seeds_cpu")["rows"]
    optims = list(dict.fromkeys(row["optim"] for row in rows))

    def means(stage: str, name: str, optim: str) -> float:
        row = next(row for row in rows if (row["stage"], row["optim"]) == (stage, optim))
        return statistics.mean(row["figures"][name])

    def state(optim: str) -> str:
        sizes = [f"{row['state_bytes'] / 2**20:.2f}" for row in rows if row["optim"] == optim]
        return ", ".join(dict.fromkeys(sizes))

    def before_and_after(name: str, form: str, scale: float, unit: str) -> Callable[[str], str]:
        names = [f"{name}, held-out, {moment}" for moment in ("before", "after")]
        return lambda optim: ", ".join(format(scale * means("GRPO", each, optim), form) for each in names) + unit

    lines = {
        "optimizer state of each stage, MiB": state,
        "SFT, held-out loss": lambda optim: f"{means('SFT', 'held-out loss', optim):.3f}",
        "reward model, held-out accuracy": lambda optim: (
            f"{100 * means('reward model', 'held-out accuracy', optim):.1f} %"
        ),
        "GRPO, words shared with the right answer, held-out, before and after": before_and_after(
            "answer overlap", ".1f", 100, " %"
        ),
        "GRPO, the model's own reward, held-out, before and after": before_and_after("model reward", ".2f", 1, ""),
        "DPO, held-out accuracy": lambda optim: f"{100 * means('DPO', 'held-out accuracy', optim):.1f} %",
    }
    head = [f"| | {' | '.join(f'`{optim}`' for optim in optims)} |", "|---|" + "---:|" * len(optims)]
    return "\n".join([*head, *(f"| {what} | {' | '.join(map(cell, optims))} |" for what, cell in lines.items())])


def step_time(_: str) -> str:
    return step_times("step_time_100m_cpu", lambda row: True)


def step_time_passes(_: str) -> str:
    return step_times("step_time_100m_cpu_passes", lambda row: True)


def step_time_epyc(_: str) -> str:
    """Return the table of the rows that were measured with clipping."""
    return step_times("step_time_100m_cpu_epyc", lambda row: "clipped" in row)


def step_times(name: str, shown: Callable[[dict[str, Any]], bool]) -> str:
    grouped = sections(results(name))
    one, two = grouped["fp32", 1], grouped.get(("fp32", 2), [])
    on_two = {row["optim"]: row for row in two if "error" not in row}
    noise = [with_quartiles("cpu")(row) for row in (*one, *two) if row["optim"] == BASELINE]

    def amortised(row: dict[str, Any]) -> str:
        return f"{row['amortised']['cpu']:.2f} x" if "amortised" in row else ""

    def ratio(row: dict[str, Any]) -> str:
        return f"{row['cpu_ratio']:.2f} x"

    columns = {
        "time": ratio,
        "with clipping": clipped(ratio),
        "with changes of basis": amortised,
        "two threads": lambda row: ratio(on_two[row["optim"]]) if row["optim"] in on_two else "",
        "state, bytes per parameter": figure("state_bytes_per_parameter", ".3f"),
        "extra memory, MiB": figure("extra_bytes", ".0f", 2**-20),
    }
    lines = table([row for row in one if row["optim"] != BASELINE and shown(row)], columns)
    return "\n".join([f"Fused AdamW against itself: {', on two threads '.join(noise)}.", "", *lines])


def ablations(_: str) -> str:
    rows = [row for row in json_lines("ablations_cpu") if row["run"]["lr"] == 2e-3]
    return "\n".join(summary_of(rows, "scratch", "micro", "`optim` and its options"))


def quality(_: str) -> str:
    """Return the table of the study, without names whose learning rates have not all been tried."""
    rows = json_lines("quality_cpu")
    rates: dict[Any, set[float]] = defaultdict(set)
    for row in rows:
        rates[row["run"]["optim"], row["run"]["beta2"]].add(row["run"]["lr"])
    takes_over = {key for key in rates if key[0].split()[0].endswith("_8bit") or key[0] in SAME_AS}
    done = takes_over | {key for key, tried in rates.items() if len(tried) >= len(RATES["scratch"])}
    kept = [row for row in rows if (row["run"]["optim"], row["run"]["beta2"]) in done]
    return "\n".join(summary_of(kept, "scratch", "small", "`optim` and its options"))


def limits(_: str) -> str:
    """Return the table of limits at AdamW's best learning rate and beta2."""
    rows = [row for row in json_lines("quality_cpu") if (row["run"]["beta2"], row["run"]["lr"]) == (0.999, 1e-3)]
    kept = [row for row in rows if "update_limit" in row["run"]["optim"] or row["run"]["optim"] == ADAMW]
    return "\n".join(summary_of(kept, "scratch", "small", "`optim` and its options"))


def demo_rules(_: str) -> str:
    rows = results("demo_rules_cpu")["rows"]
    lines = ["| `optim` and its options | state | mean held-out loss | against AdamW |", "|---|---:|---:|---:|"]
    for row in rows:
        mean = statistics.mean(row["held_out_losses"])
        lines.append(f"| `{row['optim']}` | {row[STATE]:.3f} | {mean:.3f} | {difference(row, rows)} |")
    return "\n".join(lines)


def sharded_step(_: str) -> str:
    columns = {
        "whole weights": lambda row: f"{row['whole_ms']:.0f} ms",
        "on two threads": lambda row: f"{row['whole_on_two_threads_ms']:.0f} ms",
        "shards on two processes": lambda row: f"{row['sharded_ms']:.0f} ms",
        "of it collectives": lambda row: f"{row['collectives_ms']:.0f} ms",
        "ratio to whole": lambda row: "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["quartiles"]),
        "bytes sent, share of the gradients": lambda row: f"{100 * row['share_of_gradients']:.2f} %",
    }
    return "\n".join(table(results("sharded_step_cpu")["rows"], columns))


def release_memory(_: str) -> str:
    """Return what gradient release saves of the gradients, and the time of its steps."""
    report = results("release_memory_cpu")
    gib, head = 2**30, "| `optim` | gradients | peak, plain | peak, released | saved of the gradients | time |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    for row in report["rows"]:
        sizes = " | ".join(f"{row[key] / gib:.2f} GiB" for key in ("gradients", "plain", "released"))
        time = "{:.2f} x ({:.2f} to {:.2f})".format(row["ratio"], *row["quartiles"])
        lines.append(f"| `{row['optim']}` | {sizes} | {row['saved_share']:.0%} | {time} |")
    return "\n".join(lines)


def sharded_memory(_: str) -> str:
    """Return what each process holds of an 8B model: weights, gradients and state, and state alone."""
    cards = (1, 2, 4, 8)
    lines = ["| `optim` | weights | " + " | ".join(f"{n} card{'s' * (n > 1)}" for n in cards) + " |"]
    lines.append("|---|---|" + "---:|" * len(cards))
    for dtype in (torch.float32, torch.bfloat16):
        model = meta_model(PRESETS["8b"], dtype)
        for name in ("adamw_torch", "lowmem_adamw_8bit", "slim_adamw_8bit", "factored_adamw_8bit", "coap_adamw_8bit"):
            found = [explain(model, name, ranks=ranks) for ranks in cards]
            shown = [f"{each.total_bytes / 2**30:.1f} ({each.nbytes / 2**30:.1f})" for each in found]
            lines.append(f"| `{name}` | {str(dtype).removeprefix('torch.')} | {' | '.join(shown)} |")
    return "\n".join(lines)


def json_lines(name: str) -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# The tables of each page.
PAGES: dict[Path, tuple[Callable[[str], str], ...]] = {
    README: (optimizers, options, demo, demo_seeds, rlhf_seeds, step_time, step_time_passes, step_time_epyc),
    QUALITY: (quality, limits, ablations, demo_rules),
    DISTRIBUTED: (sharded_step, sharded_memory),
    RELEASE: (release_memory,),
}


def regenerate(text: str, page: Path = README) -> str:
    """Return a page with all of its tables written again."""
    tables = {function.__name__: function for function in PAGES[page]}
    found: list[str] = []

    def rewrite(match: re.Match[str]) -> str:
        found.append(match[1])
        return f"<!-- table: {match[1]} -->\n\n{tables[match[1]](match[2])}\n\n<!-- end -->"

    text = re.sub(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", rewrite, text, flags=re.DOTALL)
    if sorted(found) != sorted(tables):
        raise ValueError(f"{page.name} must have each of the tables {sorted(tables)} once, but has {sorted(found)}.")
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(regenerate(page.read_text(encoding="utf-8"), page), encoding="utf-8")
