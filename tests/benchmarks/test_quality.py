"""The quality study: which runs it asks for, and what its report makes of them."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest

from tests import ROOT

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", autouse=True)
def benchmarks_are_importable():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def row(
    optim: str, lr: float, seed: int, loss: float | None, scale: str = "small", beta2: float | None = 0.95
) -> dict[str, Any]:
    run = {"optim": optim, "lr": lr, "beta2": beta2, "seed": seed, "scale": scale, "task": "scratch"}
    fixed = {
        "parameters": 3_000_000,
        "state_bytes_per_parameter": 8.0,
        "cpu": "a CPU",
        "torch": "2",
        "commit": "0" * 40,
    }
    return {"run": run, "held_out_loss": loss, **fixed}


def asked(optim: str, rows: list[dict[str, Any]], seeds: tuple[int, ...] = (0, 1)) -> list[tuple[str, float, int]]:
    from quality import Study, losses_of, wanted

    runs = wanted(optim, Study(0.95, seeds, "small", "scratch"), losses_of(rows))
    return [(run.optim, run.lr, run.seed) for run in runs]


def test_rates_are_added_until_the_best_is_inside_and_then_it_is_repeated():
    assert asked("adamw_torch", []) == [("adamw_torch", lr, 0) for lr in (5e-4, 1e-3, 2e-3)]
    rows = [row("adamw_torch", lr, 0, loss) for lr, loss in ((5e-4, 3.0), (1e-3, 3.1), (2e-3, None))]
    assert asked("adamw_torch", rows) == [("adamw_torch", 2.5e-4, 0)]
    rows.append(row("adamw_torch", 2.5e-4, 0, 3.2))
    assert asked("adamw_torch", rows) == [("adamw_torch", 5e-4, 1)]
    rows.append(row("adamw_torch", 5e-4, 1, 3.0))
    assert asked("adamw_torch", rows) == []


def test_close_rates_are_repeated_and_the_mean_over_seeds_decides():
    from quality_report import results_of

    rows = [row("slim_adamw", lr, 0, loss) for lr, loss in ((5e-4, 3.1), (1e-3, 3.01), (2e-3, 3.0), (4e-3, 3.5))]
    assert asked("slim_adamw", rows) == [("slim_adamw", 1e-3, 1), ("slim_adamw", 2e-3, 1)]
    rows += [row("slim_adamw", 1e-3, 1, 3.01), row("slim_adamw", 2e-3, 1, 3.1)]
    assert asked("slim_adamw", rows) == []
    assert asked("slim_adamw_8bit", rows) == [("slim_adamw_8bit", 1e-3, 0), ("slim_adamw_8bit", 1e-3, 1)]
    assert [result.lr for result in results_of(rows)] == [1e-3]


def test_an_8_bit_name_takes_the_best_rate_of_its_32_bit_name():
    assert {optim for optim, _, _ in asked("slim_adamw_8bit lora=full", [])} == {"slim_adamw lora=full"}
    assert {optim for optim, _, _ in asked("lowmem_adamw_8bit", [])} == {"adamw_torch"}
    rows = [row("slim_adamw", lr, 0, loss) for lr, loss in ((5e-4, 3.1), (1e-3, 3.0), (2e-3, 3.2))]
    assert asked("slim_adamw_8bit", rows) == [("slim_adamw", 1e-3, 1)]
    rows.append(row("slim_adamw", 1e-3, 1, 3.0))
    assert asked("slim_adamw_8bit", rows) == [("slim_adamw_8bit", 1e-3, 0), ("slim_adamw_8bit", 1e-3, 1)]


def test_differences_are_between_runs_of_the_same_seed_and_scale():
    from quality_report import results_of, studies_of

    rows = [row("adamw_torch", 1e-3, seed, 4.0 + seed) for seed in (0, 1)]
    rows += [row("slim_adamw", 2e-3, 0, 4.04), row("slim_adamw", 2e-3, 1, 5.1), row("slim_adamw", 1e-3, 0, None)]
    slim = next(result for result in results_of(rows) if result.optim == "slim_adamw")
    assert (slim.lr, slim.rates[1e-3]) == (2e-3, math.inf)
    assert slim.change == pytest.approx(0.015)
    assert slim.error == pytest.approx(0.005)
    other = row("slim_adamw", 1e-3, 0, 9.0, "micro") | {"parameters": 1_100_000}
    assert sorted(map(len, studies_of([*rows, other]).values())) == [1, 5]


def test_an_optimizer_without_beta2_runs_once_and_is_compared_with_the_better_adamw():
    from quality import Study
    from quality_report import results_of

    runs = {Study(beta2, (0,), "small", "scratch").run("smmf", 1e-3) for beta2 in (0.95, 0.999)}
    assert [run.beta2 for run in runs] == [None]
    rows = [
        row("adamw_torch", 1e-3, seed, loss, beta2=beta2)
        for seed in (0, 1)
        for beta2, loss in ((0.95, 4.2), (0.999, 4.0))
    ]
    rows += [row("smmf", 1e-3, seed, 4.04, beta2=None) for seed in (0, 1)]
    found = {result.beta2: result.change for result in results_of(rows) if result.optim == "smmf"}
    assert found == {0.999: pytest.approx(0.01)}


def test_the_report_is_written_and_unfinished_lines_are_left_out(tmp_path):
    from quality import read
    from quality_report import write_report

    path = tmp_path / "quality.jsonl"
    rows = [row(optim, 1e-3, seed, 4.0 + seed) for optim in ("adamw_torch", "slim_adamw") for seed in (0, 1)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"run": {"opt')
    assert read(path) == rows
    write_report(rows, path.with_suffix(""))
    assert (
        "| `slim_adamw` | 0.95 | 8.000 | 0.001 | 2 | 4.5000 | +0.00% ± 0.00% |" in path.with_suffix(".md").read_text()
    )
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
