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

import gpu_session
import measure
import pytest
import torch
from gpu_stages import core, summary, sweep
from gpu_stages.session import Session

from tests import ROOT

BENCHMARKS = ROOT / "benchmarks"
# Stages of a part that have the faults of session_faults.py, in the place of the real ones.
DRIVER = """
import sys, gpu_session
stages = sys.argv.pop(1).split(",")
gpu_session.PRELOADED[2] = []
for name in stages:
    target, share = f"tests.support.session_faults:{name.replace('smoke', 'raises')}", 0.1 if name == "hangs" else 1
    gpu_session.PARTS[2][name] = (gpu_session.Call(target, 1, on_cpu=share),)
gpu_session.PARTS[2] = {name: gpu_session.PARTS[2][name] for name in stages}
gpu_session.UNTIMED = ()
gpu_session.main()
"""


def started(command: list[str], out: Path, minutes: float, **environment: str) -> subprocess.Popen:
    options = ["--part", "2", "--minutes", str(minutes), "--preset", "tiny", "--out", str(out)]
    options += [] if "--device" in command else ["--device", "cpu"]
    path = os.pathsep.join([str(BENCHMARKS), str(ROOT), environment.pop("PYTHONPATH", "")])
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
    session = started(["-c", DRIVER, "raises,dies,hangs,works"], tmp_path, 0.75)
    printed, _ = session.communicate(
        timeout=60 * 0.75 + 15
    )  # it is never over its time, but for Python's start and end
    assert session.returncode == 1, printed
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
    assert marked == {"settings": False, "before it raises": False, "works": True}
    assert "## works\n\n**Unverified" in printed


def test_the_command_itself_imports_no_torch() -> None:
    check = "import sys, gpu_session; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=BENCHMARKS, check=True)


def test_only_stages_of_the_part_can_be_chosen() -> None:
    assert list(gpu_session.chosen_stages(1, "core,probe")) == ["probe", "core"]
    with pytest.raises(ValueError, match="part 1 has no stage quality: it has probe, smoke,"):
        gpu_session.chosen_stages(1, "quality,core")


def test_a_line_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"stage": "core", "row": "a|b", "ms": 1234.5}\n{"stage": ')
    session = Session(tmp_path, tmp_path, "cpu", None, None, "core")
    session.row("c", text="x")
    session.row("d", remark="not installed")
    text = summary.render(session.rows())
    assert "| row | ms |\n|---|---:|\n| a/b | 1,234 |" in text
    assert "| row | remark |\n|---|---:|\n| d | not installed |" in text
    assert "c:\n\n```\nx\n```" in text
    assert "All that was to be done has been done." in text
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 4, "a line for each row and the half one"
    session.row("all", status="stopped after 3 s", seconds=3.0)
    assert "Not done:\n\n- core, all: stopped after 3 s" in summary.render(session.rows())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--stages", "probe,"], "part 2 has no stage probe: it has train-8b,"),
        (["--stages", ","], "--stages names no stage of train-8b,"),
        (["--out", __file__], "File exists"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--part", "2", "--out", str(tmp_path), *options])
    with pytest.raises(SystemExit, match="2"):
        gpu_session.main()
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    printed, _ = started(["-c", DRIVER, "works", "--device", "cuda"], tmp_path, 2).communicate(timeout=120)
    assert "cuda cannot be used: failed: " in printed
    assert endings(tmp_path) == {}


@pytest.mark.slow
def test_the_server_leaves_cuda_and_bitsandbytes_to_its_children() -> None:
    """Which peft imports, and which then asks CUDA for its devices."""
    check = "import sys, preload; sys.exit('bitsandbytes' in sys.modules or 'transformers' not in sys.modules)"
    for modules in gpu_session.PRELOADED.values():
        environment = os.environ | {"PRELOAD": ",".join(modules), "PYTHONPATH": str(BENCHMARKS)}
        subprocess.run([sys.executable, "-c", check], env=environment, check=True)


@pytest.mark.slow
def test_rows_of_one_process_share_their_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(core, "PAIRS", 2)
    monkeypatch.setattr(core, "FEW", 4)
    monkeypatch.setitem(core.PEERS, "absent", replace(core.PEERS["flashoptim"], distribution="no-such-distribution"))
    built: list[str] = []
    build = core.build
    monkeypatch.setattr(core, "build", lambda name, model: (built.append(name), build(name, model))[1])
    session = Session(tmp_path, tmp_path, "cpu", "tiny", None, "core")
    with pytest.raises(RuntimeError, match="no figures of no_such_name"):
        core.run(session, names=("signum_8bit", "absent", "no_such_name", "coap_adamw_8bit"))
    found = {row["row"]: row for row in rows_in(tmp_path)}
    mine = ["signum_8bit", "signum_8bit", "no_such_name", "coap_adamw_8bit", "coap_adamw_8bit"]  # one layer, then all
    assert built == ["adamw_fused", "adamw_fused", *mine]
    for baseline in ("bf16", "fp32"):
        assert found["signum_8bit"][f"to_{baseline}"] > 0
        assert found["signum_8bit, clipped"][f"to_{baseline}"] > 0
    assert 1 < found["signum_8bit, memory"]["state_bytes_per_parameter"] < 1.5
    assert found["absent"] == {"stage": "core", "row": "absent", "remark": "not installed"}
    assert found["no_such_name"]["remark"].startswith("ValueError")
    assert found["coap_adamw_8bit, changes of basis"]["amortised_ratio"] > 0
    assert "coap_adamw_8bit, clipped" not in found


def test_the_sweep_tells_the_best_tile_of_each_kind() -> None:
    """Where ONE_TILE matters to one of the cases of a kind only, it is chosen by that one."""
    times = {(case, tile): tile.entries / 1e3 + tile.per_thread for case, tile in sweep.cases_and_tiles()}
    for number, best in ((8192, "Tile(2048, 8, 8192)"), (16384, "Tile(2048, 8, 16384)")):
        faster = {key for key in times if key[0].has_large_groups and key[1].one_tile == number}
        found = best_of({key: ms / 2 if key in faster else ms for key, ms in times.items()})
        assert found["group 8-bit"] == best
    found = best_of(times)
    assert set(found) == {case.kind for case in sweep.CASES}
    assert found["column 8-bit"] == "Tile(2048, 8, 8192)"


def best_of(times: dict[Any, float]) -> dict[str, str]:
    return {line.split('"')[1]: line.split(": ")[1].split(",  #")[0] for line in sweep.best_rows(times)}


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
    assert {stage for stage, *_ in ended} - {"compilation"} == set(gpu_session.PARTS[part])
    remarks = {row["remark"] for row in rows_in(tmp_path) if row.get("remark")}
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
