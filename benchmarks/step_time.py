"""Time of one optimizer step against torch.optim.AdamW(fused=True), and the bytes of optimizer state.

    python benchmarks/step_time.py                              # every optim name, fp32 and bf16, 1 and 2 threads
    python benchmarks/step_time.py --optims slim_adamw --dtype fp32 --threads 1 --pairs 5
    python benchmarks/step_time.py --peers --compile            # and other packages, and slim_adamw compiled
    python benchmarks/step_time.py --device cuda

The parameters are those of a Llama with hidden size 768, 12 layers, 12/4 heads, intermediate size 2048 and a tied
vocabulary of 32000: 110 tensors, 100,092,672 parameters, with random normal gradients that are set once. Each
optimizer runs in a process of its own beside fused AdamW, each on its own copy of the model. Their steps are timed in
pairs whose order alternates (A B, B A, ...). A ratio is the median over the pairs, with its quartiles. The row that
pairs fused AdamW with itself shows the noise: differences within it mean nothing.

CPU time is that of the whole process, all threads together, so it does not depend on what else the machine runs as
much as wall time does. On CUDA the time is the device's, by events, in both columns.

Where a basis changes on a schedule (COAP, SOAP), the timed steps are those between two changes. Each kind of change is
timed too, by setting the step counters to where it is due, and `amortised` is the time of all of the first 200 steps,
the first one included, over that of 200 of fused AdamW's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package beside this file, installed or not

import hf_lowmem  # noqa: E402

BASELINE = "adamw_fused"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("torch", "transformers", "bitsandbytes", "torchao", "adam_mini")
HORIZON = 200  # steps that a change of basis is spread over
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def bnb_adamw8bit(model: torch.nn.Module) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), **ADAM)


def torchao_adamw8bit(model: torch.nn.Module) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), **ADAM)


def authors_adam_mini(model: Any) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    config = model.config
    heads = {"n_heads": config.num_attention_heads, "n_kv_heads": config.num_key_value_heads}
    return Adam_mini(model.named_parameters(), **ADAM, dim=config.hidden_size, **heads)


TORCH: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    BASELINE: lambda model: torch.optim.AdamW(model.parameters(), **ADAM, fused=True),
    "adamw_foreach": lambda model: torch.optim.AdamW(model.parameters(), **ADAM, foreach=True),
}
PEERS = {function.__name__: function for function in (bnb_adamw8bit, torchao_adamw8bit, authors_adam_mini)}
COMPILED = "slim_adamw compile=true"


def build(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of one row: torch's own, a peer's, or an optim name of ours with its optim_args after a space."""
    if builder := (TORCH | PEERS).get(name):
        return builder(model)
    optim, _, optim_args = name.partition(" ")
    return hf_lowmem.build_optimizer(model, optim, **ADAM, optim_args=optim_args or None)


def build_model(dtype: torch.dtype, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    ).to(device, dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of every storage in a nest of state; tensor subclasses by what they are made of."""
    if isinstance(value, dict):
        for item in value.values():
            yield from storages(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from storages(item)
    elif hasattr(value, "__tensor_flatten__"):
        yield from storages([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, torch.Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()


def timed_step(optimizer: torch.optim.Optimizer, device: str) -> tuple[float, float]:
    """One step's (CPU, wall) milliseconds; on CUDA the device's milliseconds twice."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        optimizer.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), start.elapsed_time(end)
    cpu, wall = time.process_time(), time.perf_counter()
    optimizer.step()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def measure(name: str, dtype: str, threads: int, device: str, pairs: int) -> dict[str, Any]:
    """One row: `name` against fused AdamW, in this process."""
    torch.set_num_threads(threads)
    baseline = build(BASELINE, build_model(DTYPES[dtype], device))
    model = build_model(DTYPES[dtype], device)
    contender = build(name, model)

    baseline.step()
    cpu_started, started = time.process_time(), time.perf_counter()
    contender.step()
    if device == "cuda":
        torch.cuda.synchronize()
    first_step = time.perf_counter() - started
    first = {"cpu": first_step if device == "cuda" else time.process_time() - cpu_started, "wall": first_step}

    timed_step(baseline, device), timed_step(contender, device)  # warm
    times: dict[str, list[tuple[float, float]]] = {"baseline": [], "contender": []}
    machine_before, own_before = machine_cpu_seconds(), time.process_time()
    for pair in range(pairs):
        order = [("baseline", baseline), ("contender", contender)]
        for label, optimizer in order if pair % 2 == 0 else reversed(order):
            times[label].append(timed_step(optimizer, device))
    own = time.process_time() - own_before
    other = machine_cpu_seconds() - machine_before - own

    row: dict[str, Any] = {"optim": name, "dtype": dtype, "threads": threads, "pairs": pairs}
    for index, clock in enumerate(("cpu", "wall")):
        ratios = [c[index] / b[index] for c, b in zip(times["contender"], times["baseline"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row |= {f"{clock}_ratio": middle, f"{clock}_ratio_quartiles": [low, high]}
        row |= {f"{clock}_ms": statistics.median(c[index] for c in times["contender"])}
        row |= {f"baseline_{clock}_ms": statistics.median(b[index] for b in times["baseline"])}
    changes = changes_of_basis(contender)
    if changes:
        row |= amortise(contender, changes, row, first, device)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(dict(storages([*contender.state.values()])).values())
    row |= {"first_step_s": first_step, "state_bytes": state, "state_bytes_per_parameter": state / parameters}
    return row | {"other_cpu_per_own": max(0.0, other) / own}


def changes_of_basis(optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    """Kind of change -> the numbers of completed steps at which it is due among the first `HORIZON`."""
    group = optimizer.param_groups[0]
    if interval := group.get("update_interval"):
        recomputed = interval * group["reproject_factor"]
        due = range(interval, HORIZON, interval)
        changes = {"correct": [k for k in due if k % recomputed], "recompute": [k for k in due if k % recomputed == 0]}
        return {kind: steps for kind, steps in changes.items() if steps}
    frequency = group.get("precondition_frequency")
    return {"refresh": list(range(frequency, HORIZON, frequency))} if frequency else {}


def amortise(
    optimizer: Any, changes: dict[str, list[int]], row: dict[str, Any], first: dict[str, float], device: str
) -> dict[str, Any]:
    """The time of a step with each kind of change, and of the first `HORIZON` steps over fused AdamW's."""
    times: dict[str, dict[str, float]] = {}
    total = {"cpu": row["cpu_ms"] * HORIZON, "wall": row["wall_ms"] * HORIZON}
    for kind, steps in changes.items():
        for state in optimizer.state.values():
            state["step"].fill_(steps[0])
        times[kind] = dict(zip(("cpu_ms", "wall_ms"), timed_step(optimizer, device), strict=True))
        for clock in total:
            total[clock] += len(steps) * (times[kind][f"{clock}_ms"] - row[f"{clock}_ms"])
    return {
        "change_of_basis": times,
        "changes": {kind: len(steps) for kind, steps in changes.items()},
        "amortised": {
            clock: (total[clock] + 1e3 * first[clock] - row[f"{clock}_ms"]) / (HORIZON * row[f"baseline_{clock}_ms"])
            for clock in total
        },
    }


def machine_cpu_seconds() -> float:
    """CPU seconds that the whole machine has worked since it started (0 where /proc is missing)."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure_in_new_process(**row: Any) -> dict[str, Any]:
    """`measure` in a process of its own; what went wrong there comes back as `error`."""
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    environment = os.environ | {"OMP_NUM_THREADS": str(row["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    error = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return {"optim": row["name"], "dtype": row["dtype"], "threads": row["threads"], "error": error[0]}


def describe_machine(device: str) -> dict[str, Any]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    changed = git("status", "--porcelain", "--", "hf_lowmem", "benchmarks/*.py")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "commit": git("rev-parse", "HEAD") + (", with uncommitted changes" if changed else ""),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def render(report: dict[str, Any]) -> str:
    """The report as Markdown: one table per dtype and number of threads."""
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    busiest = max(row.get("other_cpu_per_own", 0) for row in report["rows"])
    lines = [
        "# Time of one optimizer step, against `torch.optim.AdamW(fused=True)`",
        "",
        "100,092,672 parameters in 110 tensors (a Llama); method and columns: `benchmarks/step_time.py`.",
        "",
        f"- machine: {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"- versions: Python {machine['python']}, {packages}",
        f"- commit: {machine['commit']}",
        f"- command: `{machine['command']}`",
        f"- other programs used at most {busiest:.0%} of the CPU time that a row's own process used",
    ]
    clock = "device" if machine["gpu"] else "CPU"
    for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in report["rows"]):
        lines += [
            "",
            f"## {dtype}, {threads} thread{'s' if threads > 1 else ''}",
            "",
            f"| optimizer | {clock} ms | {clock} ratio [quartiles] "
            "| wall ms | wall ratio | first step s | bytes/param |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in report["rows"]:
            if (row["dtype"], row["threads"]) != (dtype, threads):
                continue
            label = "adamw_fused against itself" if row["optim"] == BASELINE else row["optim"]
            if "error" in row:
                lines.append(f"| {label} | failed: {row['error']} | | | | | |")
                continue
            low, high = row["cpu_ratio_quartiles"]
            lines.append(
                f"| {label} | {row['cpu_ms']:.1f} | {row['cpu_ratio']:.2f} [{low:.2f}-{high:.2f}] "
                f"| {row['wall_ms']:.1f} | {row['wall_ratio']:.2f} | {row['first_step_s']:.2f} "
                f"| {row['state_bytes_per_parameter']:.3f} |"
            )
    changing = [row for row in report["rows"] if "amortised" in row]
    if changing:
        lines += [
            "",
            f"## Changes of basis, and all of the first {HORIZON} steps",
            "",
            f"| optimizer | dtype, threads | {clock} ms between | with a change (how many) | first step s "
            f"| amortised ratio, {clock} | wall |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
    for row in changing:
        kinds = [
            f"{kind} {times['cpu_ms']:.0f} ({row['changes'][kind]})" for kind, times in row["change_of_basis"].items()
        ]
        lines.append(
            f"| {row['optim']} | {row['dtype']}, {row['threads']} | {row['cpu_ms']:.0f} | {', '.join(kinds)} "
            f"| {row['first_step_s']:.2f} | {row['amortised']['cpu']:.2f} | {row['amortised']['wall']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--optims", default=",".join(hf_lowmem.optim_names()), help="optim names (default: all of ours)"
    )
    parser.add_argument("--dtype", default="fp32,bf16", help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs per row (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers", action="store_true", help="also time the other packages that are installed")
    parser.add_argument("--compile", action="store_true", help=f"also time {COMPILED}")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/step_time_DEVICE.json; a .md beside it"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)  # JSON arguments of `measure`, in a child process
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(**json.loads(args.row))))
        return
    if args.pairs < 2:
        parser.error(f"--pairs must be at least 2, got {args.pairs}")

    names = [*TORCH, *filter(None, args.optims.split(","))]
    names += [COMPILED] if args.compile else []
    names += PEERS if args.peers else []
    threads = [int(count) for count in args.threads.split(",")] if args.device == "cpu" else [torch.get_num_threads()]
    output = args.output or ROOT / "benchmarks" / "results" / f"step_time_{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe_machine(args.device), "rows": []}
    for dtype in args.dtype.split(","):
        for count in threads:
            for name in names:
                row = measure_in_new_process(
                    name=name, dtype=dtype, threads=count, device=args.device, pairs=args.pairs
                )
                if "ModuleNotFoundError" in row.get("error", ""):
                    print(f"{name} skipped: {row['error']}", file=sys.stderr)
                    continue
                report["rows"].append(row)
                summary = row.get("error") or f"{row['cpu_ratio']:.2f} x, wall {row['wall_ratio']:.2f} x"
                print(f"{dtype}, threads {count}, {name}: {summary}", file=sys.stderr)
                output.write_text(json.dumps(report, indent=2) + "\n")
                output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
