"""Merges runs of the demo with several seeds, to compare differences between optimizers with those between seeds.

    for seed in 0 1 2; do
        hf-lowmem demo --seed $seed --output-dir runs/$seed --optims "adamw_torch,slim_adamw_8bit,coap_adamw_8bit"
    done
    python benchmarks/demo_seeds.py --commit "$(git rev-parse HEAD)" runs/*/demo.json

With a given seed each optimizer starts from the same weights and sees the same batches as the others. Runs of the same
seed are joined, and the table holds the optimizers that every seed has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from paired import in_percent, mean_and_error

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_lowmem.demo import BASELINE  # noqa: E402

STATE = "state_bytes_per_parameter_outside_embeddings"


def merge(paths: list[Path], commit: str) -> dict[str, Any]:
    demos = sorted((json.loads(path.read_text()) for path in paths), key=lambda demo: demo["settings"]["seed"])
    by_seed: dict[int, dict[str, Any]] = {}
    for demo in demos:
        by_seed.setdefault(demo["settings"]["seed"], {}).update({run["optim"]: run for run in demo["runs"]})
    runs = list(by_seed.values())
    shared = [optim for optim in runs[0] if all(optim in by_name for by_name in runs)]
    rows = [
        {
            "optim": optim,
            STATE: runs[0][optim][STATE],
            "held_out_losses": [by_name[optim]["held_out_loss"] for by_name in runs],
        }
        for optim in shared
    ]
    common = {key: demos[0][key] for key in ("device", "platform", "versions")}
    settings = {
        key: value for key, value in demos[0]["settings"].items() if key not in ("optims", "output_dir", "seed")
    }
    return {"commit": commit, **common, "settings": settings, "seeds": list(by_seed), "rows": rows}


def render(report: dict[str, Any]) -> str:
    lines = [
        "# Held-out loss of the demo by seed",
        "",
        f"{report['settings']['steps']} steps; how to run it: `benchmarks/demo_seeds.py`.",
        "State in bytes per parameter outside embeddings.",
        "",
        f"- device: {report['device']}, torch {report['versions']['torch']}",
        f"- commit: {report['commit']}",
        "",
        f"| `optim` | state | {' | '.join(f'seed {seed}' for seed in report['seeds'])} | mean | against AdamW |",
        "|---|---:|" + "---:|" * (len(report["seeds"]) + 2),
    ]
    for row in report["rows"]:
        cells = " | ".join(f"{loss:.3f}" for loss in row["held_out_losses"])
        mean = statistics.mean(row["held_out_losses"])
        lines.append(
            f"| `{row['optim']}` | {row[STATE]:.3f} | {cells} | {mean:.3f} | {difference(row, report['rows'])} |"
        )
    return "\n".join(lines) + "\n"


def difference(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the mean difference to AdamW's loss with the same seed, and its standard error."""
    baseline = next((each["held_out_losses"] for each in rows if each["optim"] == BASELINE), None)
    if baseline is None or row["optim"] == BASELINE:
        return ""
    changes = [loss / theirs - 1 for loss, theirs in zip(row["held_out_losses"], baseline, strict=True)]
    return in_percent(*mean_and_error(changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="demo.json of each seed")
    parser.add_argument("--commit", required=True, help="of the package that was run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "demo_seeds_cpu.json")
    args = parser.parse_args()
    report = merge(args.runs, args.commit)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
