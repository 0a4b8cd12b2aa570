"""Merges runs of the RLHF demo with several seeds: does each stage learn, and do optimizers differ more than seeds?

    for seed in 0 1 2; do
        hf-lowmem demo --rlhf --scale small --seed $seed --output-dir runs/$seed
    done
    python benchmarks/rlhf_seeds.py --commit "$(git rev-parse HEAD)" runs/*/rlhf_demo.json

With a given seed each optimizer's pipeline starts from the same weights and sees the same examples as the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hf_lowmem.demo.report import format_figure  # noqa: E402


def merge(paths: list[Path], commit: str) -> dict[str, Any]:
    demos = sorted((json.loads(path.read_text()) for path in paths), key=lambda demo: demo["settings"]["seed"])
    seeds = [demo["settings"]["seed"] for demo in demos]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"The runs have the seeds {seeds}: give one run of each seed.")
    for demo in demos:
        if shared_by_seeds(demo) != shared_by_seeds(demos[0]):
            seed = demo["settings"]["seed"]
            raise SystemExit(f"The run of seed {seed} differs from the others in more than its seed: repeat it.")
    runs = [{pipeline["optim"]: pipeline["stages"] for pipeline in demo["pipelines"]} for demo in demos]
    rows = [
        {
            "stage": stage,
            "optim": optim,
            "state_bytes": first["state_bytes"],
            "seconds": [by_name[optim][stage]["seconds"] for by_name in runs],
            "figures": {
                name: [by_name[optim][stage]["figures"][name] for by_name in runs] for name in first["figures"]
            },
        }
        for stage in demos[0]["pipelines"][0]["stages"]
        for optim in runs[0]
        for first in [runs[0][optim][stage]]
    ]
    seconds = [demo["seconds"] for demo in demos]
    return {"commit": commit, **shared_by_seeds(demos[0]), "seeds": seeds, "seconds": seconds, "rows": rows}


def shared_by_seeds(demo: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in demo["settings"].items() if key not in ("output_dir", "seed")}
    return {**{key: demo[key] for key in ("device", "platform", "versions")}, "settings": settings}


def render(report: dict[str, Any]) -> str:
    settings, seeds = report["settings"], report["seeds"]
    heading = f"| `optim` | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |"
    rule = "|---|" + "---:|" * (len(seeds) + 1)
    lines = [
        "# The RLHF demo by seed",
        "",
        f"Scale {settings['scale']}; how to run it: `benchmarks/rlhf_seeds.py`. Chance is 50 % in every accuracy.",
        "The start and the end of a reward are its means over the first and the last "
        f"{settings['average_steps']} of {settings['grpo']['steps']} steps.",
        "",
        f"- device: {report['device']}, torch {report['versions']['torch']}, trl {report['versions']['trl']}",
        f"- commit: {report['commit']}",
        f"- seconds in all: {', '.join(f'{seconds:.0f}' for seconds in report['seconds'])}",
    ]
    for stage in dict.fromkeys(row["stage"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["stage"] == stage]
        for name in rows[0]["figures"]:
            lines += ["", f"## {stage}: {name}", "", heading, rule]
            for row in rows:
                values = row["figures"][name]
                cells = " | ".join(format_figure(name, value) for value in [*values, statistics.mean(values)])
                lines.append(f"| `{row['optim']}` | {cells} |")
    lines += [
        "",
        "## Optimizer state and time",
        "",
        "| stage | `optim` | state, MiB | seconds, mean |",
        "|---|---|---:|---:|",
    ]
    for row in report["rows"]:
        mib, seconds = row["state_bytes"] / 2**20, statistics.mean(row["seconds"])
        lines.append(f"| {row['stage']} | `{row['optim']}` | {mib:.2f} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="rlhf_demo.json of each seed")
    parser.add_argument("--commit", required=True, help="of the package that was run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "rlhf_seeds_cpu.json")
    args = parser.parse_args()
    report = merge(args.runs, args.commit)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
