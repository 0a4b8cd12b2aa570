"""Compares an optimizer step with torch.optim.AdamW(fused=True): its time, its memory, and the bytes that it moves.

    python benchmarks/step_time.py                          # the 100m preset on the CPU, with the peers installed
    python benchmarks/step_time.py --optims slim_adamw,bnb_adamw8bit --dtype fp32 --threads 1 --pairs 5
    python benchmarks/step_time.py --device cuda --preset 1b

The parameters are those of a model in `presets.py`, with random normal gradients that are set once. Each optimizer
runs in a process of its own together with fused AdamW, each on its own copy of the model. Their steps are timed in
pairs of alternating order (A B, B A, ...). A ratio is the median over the pairs, with its quartiles. The row that
pairs fused AdamW with itself shows the noise, within which differences mean nothing. A row that fails says why, and a
row that takes more than `--limit` seconds is stopped. No pair is started once a quarter of the limit has passed since
the first step. A row that is more than five times as slow as fused AdamW gets two pairs.

- CPU ms: the CPU time of the process over all threads, which depends less on other programs than wall time does. On
  CUDA it is the device's time, measured by events.
- state B/param: the bytes of all storages in the state, each counted once, over the number of weights.
- moved B/param: the bytes that a step must move. Weights and state are read and written, gradients and the bases of
  projections are read.
- of copy bandwidth: the moved bytes over the step's wall time, relative to `Tensor.copy_` of a large tensor that
  follows each pair on the same threads. A copy counts the bytes that it reads and writes. On most CPUs it also reads
  the cache lines that it overwrites, which a step in place does not, so a step can exceed 100 %.
- extra MiB: the most memory that a step holds beyond what is held before it, from the peak resident memory or, on
  CUDA, from torch's allocator.
- first step: the step that allocates the state and compiles kernels.
- clipped: pairs in which both clip the gradients before they step, as the Trainer does by default, by the optimizer's
  own `clip_grad_norm_` if it has one, or else by torch's. It is measured for torch's optimizers, bitsandbytes, and
  those of ours that do not project.
- host ms, on CUDA: the time until `step()` returns, starting with an idle device.
- graph ms, on CUDA: the device's time of the step as a CUDA graph, for optimizers with `capturable=True`.

If a basis changes on a schedule (COAP, SOAP), the timed steps are those between two changes, or most of them, which is
what the median shows. Each kind of change is also timed, by setting the step counters to where it is due. `amortised`
is the time of the first 200 steps, including the first one, over that of 200 steps of fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from machine import describe_machine
from measure import DTYPES
from peers import BASELINE, PEERS, ROOT
from presets import PRESETS, size
from processes import Job, start_server
from step_time_report import render, save_png

import hf_lowmem

ALL = (*PEERS, *hf_lowmem.optim_names())
MAIN = (BASELINE, *(f"{name}{bits}" for name in ("lowmem_adamw", "slim_adamw", "adam_mini") for bits in ("", "_8bit")))


def planned_rows(args: argparse.Namespace) -> list[tuple[str, int, str]]:
    """Return (dtype, threads, name) of all rows; on the CPU all sections but the first have the main names only."""
    threads = [int(count) for count in args.threads.split(",")] if args.device == "cpu" else [1]
    combinations = [(dtype, count) for dtype in args.dtype.split(",") for count in threads]
    given = tuple(filter(None, args.optims.split(",")))
    rows = []
    for index, (dtype, count) in enumerate(combinations):
        names = given or (ALL if index == 0 or args.device == "cuda" else MAIN)
        rows += [(dtype, count, name) for name in names if given or name not in PEERS or PEERS[name].installed]
    return rows


def measure_in_new_process(limit: float, **row: Any) -> dict[str, Any]:
    """Run `measure` in a process of its own and return its row, or a row with an `error`."""
    job = Job("measure:measure", row | {"limit": limit})
    try:
        found = job.result(limit)
    except (RuntimeError, TimeoutError) as error:
        found = {"error": str(error)[:120]}
    return {"optim": row["name"], "dtype": row["dtype"], "threads": row["threads"]} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="100m", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--optims",
        default="",
        help="our optim names, each perhaps with optim_args after a space, and of: "
        f"{', '.join(PEERS)} (default: all; on the CPU, after the first dtype and number of threads, the main ones)",
    )
    parser.add_argument("--dtype", help="default: fp32 on the CPU, fp32,bf16 on CUDA")
    parser.add_argument("--baseline-dtype", choices=DTYPES, help="of fused AdamW's weights (default: the row's)")
    parser.add_argument("--threads", default="1,2", help="on the CPU (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs per row, at most (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=35, help="seconds for a row (default: %(default)s)")
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    parser.add_argument(
        "--output",
        type=Path,
        help="default: benchmarks/results/step_time_PRESET_DEVICE.json; a .md and a .png beside it",
    )
    args = parser.parse_args()
    if find_spec("matplotlib") is None:
        parser.error("matplotlib draws the chart and is not installed: pip install -c constraints.txt '.[plots]'")
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {args.pairs}")
    args.dtype = args.dtype or ("fp32,bf16" if args.device == "cuda" else "fp32")
    if unknown := set(args.dtype.split(",")) - DTYPES.keys():
        parser.error(f"--dtype takes {' and '.join(DTYPES)}, got {', '.join(unknown)}")

    output = args.output or ROOT / "benchmarks" / "results" / f"step_time_{args.preset}_{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    parameters, tensors = size(args.preset)
    report: dict[str, Any] = {
        "machine": describe_machine(args.device, args.commit),
        "preset": {"name": args.preset, "parameters": parameters, "tensors": tensors},
        "not_installed": sorted({peer.distribution for peer in PEERS.values() if not peer.installed}),
        "rows": [],
    }
    # Without a cache the first step compiles, whatever ran before.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    start_server(["hf_lowmem.trainer.build", "measure"], args.device)
    rows, started = planned_rows(args), time.monotonic()
    for number, (dtype, threads, name) in enumerate(rows, start=1):
        row = measure_in_new_process(
            args.limit,
            name=name,
            preset=args.preset,
            dtype=dtype,
            baseline_dtype=args.baseline_dtype or dtype,
            threads=threads,
            device=args.device,
            pairs=args.pairs,
        )
        report["rows"].append(row)
        summary = row.get("error") or f"{row['cpu_ratio']:.2f} x, wall {row['wall_ratio']:.2f} x"
        progress = f"[{number}/{len(rows)}, {time.monotonic() - started:.0f} s]"
        print(f"{progress} {dtype}, threads {threads}, {name}: {summary}", file=sys.stderr)
        output.write_text(json.dumps(report, indent=2) + "\n")
        output.with_suffix(".md").write_text(render(report))
    save_png(report, output.with_suffix(".png"))
    print(render(report))


if __name__ == "__main__":
    main()
