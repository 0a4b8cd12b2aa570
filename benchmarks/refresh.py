"""Times a new basis: COAP's recomputation and correction, SOAP's power step, and the full SVD that GaLore computes.

    python benchmarks/refresh.py                     # the weights of a 100-million Llama, one thread
    python benchmarks/refresh.py --hidden 2048 --intermediate 5461 --repeats 1
    python benchmarks/refresh.py --device cuda

Each shape has one random gradient, and a rank of a quarter of its smaller side. Everything runs in one process, and
each time is that of the fastest repeat. The floor is the time of the two products that every low-rank step needs:
projecting the gradient, and projecting the update back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine  # noqa: E402

from hf_lowmem.projections import eigenbasis, low_rank  # noqa: E402


def seconds(function: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the CPU seconds of the process, or the seconds of the device, in the fastest run."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter if device == "cuda" else time.process_time
        started = clock()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return best


def measure(m: int, n: int, repeats: int, device: str) -> dict[str, float]:
    """Return the milliseconds for a gradient (m, n)."""
    torch.manual_seed(0)
    grad = torch.randn(m, n, device=device)
    x = low_rank.long_side_first(grad)
    rank = x.shape[1] // 4
    basis = low_rank.first_basis(x, rank)
    exp_avg = grad @ basis.mT if m >= n else basis @ grad
    gram = (x.mT @ x).unsqueeze(0)
    vectors = eigenbasis.eigenvectors(gram)
    runs: dict[str, Callable[[], Any]] = {
        "floor": lambda: (x @ basis.mT) @ basis,
        "coap_correct": lambda: low_rank.corrected_basis(grad, basis, exp_avg, unit=True),
        "coap_recompute": lambda: low_rank.recomputed_basis(x, basis),
        "soap_power_step": lambda: eigenbasis.power_step(gram, vectors),
        "full_svd": lambda: torch.linalg.svd(grad, full_matrices=False),
    }
    return {name: 1e3 * seconds(run, repeats, device) for name, run in runs.items()}


def render(report: dict[str, Any]) -> str:
    machine = report["machine"]
    names = [name for name in report["rows"][0] if name not in ("shape", "weights")]
    device = f"{machine['gpu'] or machine['cpu']}, {report['threads']} threads"
    lines = [
        "# The cost of a new basis",
        "",
        "Milliseconds per matrix, and for all weights of the model; method: `benchmarks/refresh.py`. `floor` is the",
        "gradient's projection and the update's way back, which every step of COAP and GaLore takes.",
        "",
        f"- machine: {device}, torch {machine['versions']['torch']}",
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        "",
        f"| gradient | weights | {' | '.join(names)} | full SVD over recompute |",
        "|---|---:|" + "---:|" * (len(names) + 1),
    ]
    total = {name: sum(row["weights"] * row[name] for row in report["rows"]) for name in names}
    rows = [*report["rows"], {"shape": "all", "weights": sum(row["weights"] for row in report["rows"]), **total}]
    for row in rows:
        cells = " | ".join(f"{row[name]:.1f}" for name in names)
        ratio = row["full_svd"] / row["coap_recompute"]
        lines.append(f"| {row['shape']} | {row['weights']} | {cells} | {ratio:.1f} x |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--key-value", type=int, default=256, help="outputs of the key and value projections")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/refresh_DEVICE.json; a .md beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    shapes = {
        (args.hidden, args.hidden): 2,
        (args.key_value, args.hidden): 2,
        (args.intermediate, args.hidden): 2,
        (args.hidden, args.intermediate): 1,
    }
    rows = [
        {"shape": f"{m} x {n}", "weights": args.layers * count, **measure(m, n, args.repeats, args.device)}
        for (m, n), count in shapes.items()
    ]
    report = {"machine": describe_machine(args.device), "threads": args.threads, "rows": rows}
    output = args.output or ROOT / "benchmarks" / "results" / f"refresh_{args.device}.json"
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
