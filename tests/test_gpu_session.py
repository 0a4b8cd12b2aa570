"""benchmarks/gpu_session.py: nothing that goes wrong in a stage costs a later one its time or its figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_session
import measure
from gpu_stages import core, summary
from gpu_stages.session import Session

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"
# Stages of a part that have the faults of session_faults.py, in the place of the real ones.
DRIVER = """
import sys, gpu_session
stages = sys.argv.pop(1).split(",")
gpu_session.PRELOADED[2] = []
gpu_session.PARTS[2] = {
    name: (gpu_session.Call(f"session_faults:{name.replace('smoke', 'raises')}", 10),) for name in stages
}
gpu_session.main()
"""


def started(command: list[str], out: Path, minutes: float, **environment: str) -> subprocess.Popen:
    options = ["--part", "2", "--minutes", str(minutes), "--device", "cpu", "--preset", "tiny", "--out", str(out)]
    path = os.pathsep.join([str(BENCHMARKS), str(TESTS), environment.pop("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *command, *options],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def endings(out: Path) -> dict[str, str]:
    return {row["stage"]: row["status"] for row in rows_in(out) if "status" in row}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_goes_wrong_in_a_stage_stops_no_later_one(tmp_path: Path) -> None:
    before = time.monotonic()
    session = started(["-c", DRIVER, "raises,dies,hangs,works"], tmp_path, 0.15)
    printed, _ = session.communicate(timeout=100)
    assert session.returncode == 1, printed
    assert time.monotonic() - before < 60 * 0.15 + 5  # Python starts and ends, too
    ended = endings(tmp_path)
    assert ended.pop("hangs").startswith("stopped after")
    assert ended == {"raises": "failed: ValueError: of a stage", "dies": "failed: exit status 7", "works": "done"}
    figures = [row for row in rows_in(tmp_path) if "status" not in row]
    assert [row["row"] for row in figures[1:]] == ["before it raises", "before it hangs", "works"]
    assert not any(map(is_running, figures[2]["pids"]))
    assert (tmp_path / "summary.md").read_text() in printed
    assert "ValueError: of a stage\nand more" in (tmp_path / "log.txt").read_text()


def test_a_terminated_session_keeps_what_it_has_measured(tmp_path: Path) -> None:
    session = started(["-c", DRIVER, "works,hangs,raises"], tmp_path, 2)
    results = tmp_path / "results.jsonl"
    until = time.monotonic() + 60
    while not (results.exists() and "before it hangs" in results.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    session.send_signal(signal.SIGTERM)
    printed, _ = session.communicate(timeout=60)
    assert session.returncode == 128 + signal.SIGTERM
    assert endings(tmp_path) == {"works": "done"}
    assert "| works | 1.5 |" in (tmp_path / "summary.md").read_text()
    assert "| works | 1.5 |" in printed
    assert not any(map(is_running, rows_in(tmp_path)[-1]["pids"]))


def test_figures_after_a_failed_smoke_test_are_marked(tmp_path: Path) -> None:
    printed, _ = started(["-c", DRIVER, "smoke,works"], tmp_path, 0.5).communicate(timeout=100)
    marked = {row["row"]: row.get("unverified", False) for row in rows_in(tmp_path) if "status" not in row}
    assert marked == {"all": False, "before it raises": False, "works": True}
    assert "## works\n\n**Unverified" in printed


def test_the_command_itself_imports_no_torch() -> None:
    check = "import sys, gpu_session; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=BENCHMARKS, check=True)


def test_only_stages_of_the_part_can_be_chosen() -> None:
    assert list(gpu_session.chosen_stages(1, "core,probe")) == ["probe", "core"]
    with pytest.raises(ValueError, match="part 1 has no stage quality: it has probe, smoke,"):
        gpu_session.chosen_stages(1, "quality,core")


def test_a_line_that_was_cut_off_is_left_out_of_the_summary() -> None:
    lines = [
        '{"stage": "core", "row": "a|b", "ms": 1234.5}',
        '{"stage": "core", "row": "c", "text": "x"}',
        '{"stage": ',
    ]
    text = summary.render("\n".join(lines))
    assert "| row | ms |\n|---|---:|\n| a/b | 1,234 |" in text
    assert "c:\n\n```\nx\n```" in text


def test_rows_of_one_process_share_their_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(core, "PAIRS", 2)
    monkeypatch.setitem(core.PEERS, "absent", replace(core.PEERS["flashoptim"], distribution="no-such-distribution"))
    built: list[str] = []
    build = core.build
    monkeypatch.setattr(core, "build", lambda name, model: (built.append(name), build(name, model))[1])
    session = Session(tmp_path, tmp_path, "cpu", "tiny", None, "core")
    core.run(session, names=("signum_8bit", "absent", "no_such_name", "coap_adamw_8bit"))
    signum, absent, unknown, coap = rows_in(tmp_path)
    assert built == ["adamw_fused", "adamw_fused", "signum_8bit", "no_such_name", "coap_adamw_8bit"]
    for baseline in ("bf16", "fp32"):
        assert signum[f"to_{baseline}"] > 0
        assert signum[f"clipped_to_{baseline}"] > 0
    assert absent == {"stage": "core", "row": "absent", "remark": "not installed"}
    assert unknown["remark"].startswith("ValueError")
    assert coap["amortised_ratio"] > 0
    assert "clipped_ms" not in coap


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_session.PARTS)
def test_every_stage_runs_on_a_cpu(part: int, tmp_path: Path) -> None:
    """The tests run beside others, for which the minute that it takes on an idle machine is too short."""
    command = [sys.executable, str(BENCHMARKS / "gpu_session.py"), "--part", str(part), "--minutes", "5"]
    command += ["--device", "cpu", "--preset", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = [(row["stage"], row["row"], row["status"]) for row in rows_in(tmp_path) if "status" in row]
    assert {status for *_, status in ended} == {"done"}, (ended, (tmp_path / "log.txt").read_text()[-3000:])
    assert {stage for stage, *_ in ended} == set(gpu_session.PARTS[part])
    remarks = {row["remark"] for row in rows_in(tmp_path) if "remark" in row}
    assert not [remark for remark in remarks if "Error" in remark]
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert all(file.is_file() and file.stat().st_size < 16 * 2**20 for file in files)


@pytest.mark.slow
def test_neither_trl_nor_datasets_nor_git_is_needed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules |= {'trl': None, 'datasets': None}\n")
    script, out = str(BENCHMARKS / "gpu_session.py"), tmp_path / "out"
    printed, _ = started([script, "--stages", "train-8b"], out, 4, PYTHONPATH=str(tmp_path), PATH="").communicate()
    assert endings(out) == {"train-8b": "done"}, printed
    assert {row["trainer"] for row in rows_in(out) if "trainer" in row} == {"Trainer"}
