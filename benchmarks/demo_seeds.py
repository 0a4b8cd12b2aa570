"""The demo's held-out loss over several seeds: is a difference between optimizers larger than that between seeds?

    python benchmarks/demo_seeds.py --optims adamw_torch,coap_adamw_8bit --seeds 0,1,2

Each optimizer starts from the same weights and sees the same batches as the others with that seed. An optim name may
be followed by its optim_args, as for `hf-lowmem demo`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from step_time import describe_machine  # noqa: E402

from hf_lowmem.demo import BASELINE, Settings  # noqa: E402
from hf_lowmem.demo.train import run_demo  # noqa: E402

OPTIMS = (
    BASELINE,
    "coap_adamw_8bit",
    "coap_adafactor_8bit",
    "soap_8bit",
    "coap_adamw update_interval=10",
    "coap_adamw update_interval=10 eq5_scale=rms",
)


def render(report: dict[str, Any]) -> str:
    machine, seeds = report["machine"], report["seeds"]
    baseline = next((row["held_out_losses"] for row in report["rows"] if row["optim"] == BASELINE), None)
    lines = [
        "# Held-out loss of the demo by seed",
        "",
        f"- machine: {machine['cpu']}, torch {machine['versions']['torch']}",
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        "",
        f"| `optim` | state, bytes/param | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | against AdamW |",
        "|---|---:|" + "---:|" * (len(seeds) + 2),
    ]
    for row in report["rows"]:
        losses = row["held_out_losses"]
        mean = statistics.mean(losses)
        against = f"{mean / statistics.mean(baseline) - 1:+.1%}" if baseline and row["optim"] != BASELINE else ""
        cells = " | ".join(f"{loss:.3f}" for loss in losses)
        lines.append(
            f"| `{row['optim']}` | {row['state_bytes_per_parameter']:.3f} | {cells} | {mean:.3f} | {against} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optims", default=",".join(OPTIMS), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "demo_seeds_cpu.json")
    args = parser.parse_args()
    optims, seeds = tuple(args.optims.split(",")), [int(seed) for seed in args.seeds.split(",")]

    rows: list[dict[str, Any]] = [{"optim": optim, "held_out_losses": []} for optim in optims]
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs = run_demo(Settings(optims=optims, seed=seed, output_dir=Path(folder)))
        for row, run in zip(rows, runs, strict=True):
            row["held_out_losses"].append(run.held_out_loss)
            row["state_bytes_per_parameter"] = run.state_bytes_per_parameter
    report = {"machine": describe_machine("cpu"), "seeds": seeds, "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
