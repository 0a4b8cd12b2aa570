"""benchmarks/step_time.py: what it counts, plans and shows."""

import argparse
import math
from types import SimpleNamespace

import machine
import measure
import peers
import presets
import pytest
import step_time
import step_time_report
import torch
import train
from torch.testing._internal.two_tensor import TwoTensor

import hf_lowmem

MACHINE = {"gpu": None, "cpu": "a CPU", "cores": 2, "system": "Linux", "python": "3.11", "versions": {"torch": "2.13"}}
MACHINE |= {"commit": "abc", "command": "python benchmarks/step_time.py"}


@pytest.fixture
def tiny(monkeypatch):
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(measure.COPY_BYTES, device, 2**20)
    return "tiny"


def row(tiny, name, dtype="fp32", **changes):
    settings = {"preset": tiny, "dtype": dtype, "baseline_dtype": dtype, "threads": torch.get_num_threads()}
    return measure.measure(name, **settings | {"device": "cpu", "pairs": 3, "limit": 90} | changes)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("100m", (100_092_672, 110)),
        ("1b", (1_235_814_400, 146)),
        ("8b", (8_030_261_248, 291)),
        ("8b-8layers", (2_795_573_248, 75)),
        ("mixtral", (1_453_371_392, 12)),
    ],
)
def test_the_presets_have_the_sizes_of_their_models(preset, expected):
    assert presets.size(preset) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_has_weights_of_its_own_and_shares_gradients_of_its_dtype(tiny, dtype):
    model = presets.build_model(presets.PRESETS[tiny], torch.float32, "cpu")
    copied = presets.copy_of(model, dtype)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        for mine, theirs in ((a, b), (a.grad, b.grad)):
            assert torch.equal(mine.to(dtype), theirs)
        assert a.data_ptr() != b.data_ptr()
        assert (a.grad is b.grad) == (dtype == torch.float32)
        assert a.grad.std() > 0.5


def test_one_layer_has_the_widths_of_its_preset(tiny):
    shapes = {p.shape[-1] for p in presets.meta_model(presets.PRESETS["8b"]).parameters()}
    small = presets.meta_model(presets.one_layer("8b"))
    assert {p.shape[-1] for p in small.parameters()} == shapes
    assert sum(p.numel() for p in small.parameters()) < 0.25e9
    assert presets.PRESETS["8b"].num_hidden_layers == 32


def test_every_storage_counts_once_and_in_full():
    whole = torch.zeros(100)
    projector = SimpleNamespace(ortho_matrix=whole[:10], rank=4)  # a view keeps all of its storage
    pair = TwoTensor(torch.zeros(8), torch.zeros(8))
    nest = {"step": 3, "a": [whole, whole[5:]], "projector": projector, "pair": pair, "none": None}
    assert sum(dict(measure.storages(nest)).values()) == 400 + 64


@pytest.mark.parametrize("name", ["slim_adamw_8bit", "coap_adamw"])
def test_measured_state_is_the_declared_state(tiny, name):
    model = presets.build_model(presets.PRESETS[tiny], torch.float32, "cpu")
    optimizer = peers.build(name, model)
    optimizer.step()
    state, bases = measure.state_bytes(optimizer)
    assert state == hf_lowmem.explain(model, name).nbytes
    table = hf_lowmem.explain(model, name).rows
    shapes = [shape for r in table for key, (shape, _) in r.state.items() if key == "proj"]
    counts = sum("proj_count" in r.state for r in table)
    assert bases == 4 * (sum(torch.Size(shape).numel() for shape in shapes) + counts)
    assert (bases > 0) == (name == "coap_adamw")


@pytest.mark.parametrize(
    ("weights", "state", "bases", "moved"),
    [(4, 8, 0, 28), (2, 4, 0, 14), (2, 2.03125, 0, 10.0625), (4, 2.75, 0.75, 16.75)],
)
def test_bytes_that_a_step_must_move(weights, state, bases, moved):
    assert measure.bytes_moved(weights, state, bases) == moved


def test_extra_memory_is_the_peak_of_the_step():
    mib = 2**20
    held = []
    if measure.extra_bytes(lambda: None, "cpu") is None:
        pytest.skip("the system does not tell")
    assert 60 * mib < measure.extra_bytes(lambda: torch.ones(64 * mib, dtype=torch.uint8), "cpu") < 80 * mib
    assert measure.extra_bytes(lambda: held.append(1), "cpu") < 4 * mib


def test_a_row_has_what_the_tables_show(tiny, monkeypatch):
    monkeypatch.setattr(measure, "SLOW", math.inf)  # of so small a model any step may be that slow
    found = row(tiny, "slim_adamw_8bit min_8bit_size=0", dtype="bf16", baseline_dtype="fp32")
    assert found["pairs"] == 3
    assert found["cpu_ratio"] > 0
    assert found["state_bytes_per_parameter"] < 1.3
    expected = 3 * 2 + 2 * found["state_bytes_per_parameter"]
    assert found["moved_bytes_per_parameter"] == pytest.approx(expected)
    assert found["copy_share"] > 0
    assert found["clipped"]["pairs"] == 3
    assert found["clipped"]["cpu_ratio"] > 0
    assert "amortised" not in found


@pytest.mark.parametrize("own", [False, True], ids=["torch's clipping", "the optimizer's"])
def test_a_clipped_step_clips_to_half_the_norm_each_time(own):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    asked = []
    if own:
        optimizer.clip_grad_norm_ = asked.append
    step = measure.clipped_step(optimizer)
    step()
    step()
    assert asked == ([3.0, 3.0] if own else [])
    assert weight.grad[0] == pytest.approx(3.0 if own else 1.5)
    assert weight[0].item() == pytest.approx(-6.0 if own else -3.0)


def test_a_slow_row_gets_few_pairs():
    fast, slow = (lambda: None), (lambda: sum(range(100_000)))
    settings = {"device": "cpu", "pairs": 5, "ends": float("inf")}
    assert [len(times) for times in measure.timed_pairs(slow, fast, **settings)] == [measure.FEWEST_PAIRS] * 2
    assert [len(times) for times in measure.timed_pairs(fast, slow, **settings)] == [5, 5]


def test_few_pairs_where_the_time_is_short(tiny):
    assert row(tiny, "signum", limit=0)["pairs"] == measure.FEWEST_PAIRS


def test_changes_of_basis_are_timed(tiny):
    found = row(tiny, "coap_adamw update_interval=4")
    assert found["changes"] == {"correct": 40, "recompute": 9}
    assert found["amortised"]["cpu"] > 0
    assert "clipped" not in found


@pytest.mark.parametrize("name", [name for name in peers.PEERS if not name.startswith("torchao")])  # compiles long
def test_installed_peers_step(tiny, name):
    if not peers.PEERS[name].installed:
        pytest.skip("not installed")
    if name == "flashoptim" and not torch.cuda.is_available():
        pytest.skip("has no CPU path")
    found = row(tiny, name, pairs=2)
    assert found["cpu_ratio"] > 0
    assert 0.5 < found["state_bytes_per_parameter"] < 8.01


def test_low_rank_peers_get_every_weight_once(tiny):
    model = presets.build_model(presets.PRESETS[tiny], torch.float32, "cpu")
    rest, *projected = peers.low_rank_groups(model, {"scale": 1})
    given = [p for group in (rest, *projected) for p in group["params"]]
    assert len(given) == len({id(p) for p in given}) == len(list(model.parameters()))
    assert {group["rank"] for group in projected} == {8, 16}
    assert any(p is model.lm_head.weight for p in rest["params"])


def test_the_rows_of_a_run():
    args = argparse.Namespace(device="cpu", dtype="fp32,bf16", threads="1,2", optims="")
    rows = step_time.planned_rows(args)
    assert {name for dtype, threads, name in rows if (dtype, threads) == ("fp32", 1)} >= set(hf_lowmem.optim_names())
    assert [name for dtype, threads, name in rows if (dtype, threads) == ("bf16", 2)] == list(step_time.MAIN)
    args.optims = "soap,flashoptim"
    assert step_time.planned_rows(args)[:2] == [("fp32", 1, "soap"), ("fp32", 1, "flashoptim")]
    assert len(step_time.planned_rows(args)) == 8


def test_what_fails_or_is_too_slow_is_a_row(tiny):
    settings = {"name": "soap", "preset": "none", "dtype": "fp32", "baseline_dtype": "fp32", "threads": 1}
    settings |= {"device": "cpu", "pairs": 2}
    row = {"optim": "soap", "dtype": "fp32", "threads": 1}
    failed = step_time.measure_in_new_process(90, **settings)
    assert failed == row | {"error": "failed: KeyError: 'none'"}
    stopped = step_time.measure_in_new_process(0.2, **settings | {"preset": "100m"})  # it draws weights for longer
    assert stopped == row | {"error": "stopped after 0 s"}


def test_the_report_and_its_chart(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(tiny, name, threads=1) for name in (peers.BASELINE, "coap_adamw")]
    rows.append({"optim": "flashoptim", "dtype": "fp32", "threads": 1, "error": "failed: a | b"})
    size = {"name": "tiny", "parameters": 1234, "tensors": 5}
    report = {"machine": MACHINE, "preset": size, "not_installed": ["gefen-x"], "rows": rows}
    text = step_time_report.render(report)
    assert "1,234 parameters in 5 tensors" in text
    assert "not installed: gefen-x" in text
    assert "## fp32, 1 thread\n" in text
    assert "| flashoptim FlashAdamW | failed: a / b |" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {line.count("|") for line in lines}
    assert heads == {13 if rows[0]["extra_bytes"] is None else 14, 8}  # where the system tells
    step_time_report.save_png(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_host_and_a_graph_are_timed_on_cuda(tiny):
    fused, mine = row(tiny, peers.BASELINE, device="cuda"), row(tiny, "slim_adamw", device="cuda")
    assert fused["host_ms"] > 0
    assert fused["graph_ms"] > 0
    assert mine["host_ms"] > 0
    assert "graph_ms" not in mine


def test_the_report_of_a_gpu_has_the_times_of_host_and_graph(tiny):
    rows = [row(tiny, name, threads=1) for name in (peers.BASELINE, "signum")]
    assert not any(name in found for found in rows for name in ("host_ms", "graph_ms"))
    rows[0] |= {"host_ms": 0.25, "graph_ms": 0.125}
    rows[1] |= {"host_ms": 0.5}
    size = {"name": "tiny", "parameters": 1234, "tensors": 5}
    report = {"machine": MACHINE | {"gpu": "a GPU"}, "preset": size, "not_installed": [], "rows": rows}
    head, _, fused, signum = (line for line in step_time_report.render(report).splitlines() if line.startswith("|"))
    assert "| host ms | graph ms |" in head
    assert "| 0.25 | 0.12 |" in fused
    assert "| 0.50 |  |" in signum


def test_columns_that_no_row_fills_are_left_out():
    rows = [{"optim": "signum", "cpu_ms": 1.5}, {"optim": "soap", "cpu_ms": None}]
    figure = step_time_report.figure
    lines = step_time_report.table(rows, {"ms": figure("cpu_ms", ".1f"), "MiB": figure("extra_bytes", ".0f")})
    assert lines == ["| optimizer | ms |", "|---|---:|", "| `signum` | 1.5 |", "| `soap` |  |"]


def test_on_cuda_the_device_is_busy_while_the_host_launches(monkeypatch):
    """Or the device's time would have the host's work before the first kernel in it."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.name = f"event {len([each for each in order if each.startswith('event')])}"
            order.append(self.name)

        def record(self):
            order.append(f"record {self.name[-1]}")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(f"sleep {cycles}"))
    monkeypatch.setattr(measure, "cycles_per_second", lambda: 1e9)
    assert measure.timed(lambda: order.append("step"), "cuda", host_s=0.002) == (2.0, 2.0)
    assert order[2:] == ["synchronize", "sleep 3000000", "record 0", "step", "record 1", "synchronize"]


def test_a_first_step_takes_no_time_of_the_pairs(tiny, monkeypatch):
    clock = [0.0]
    build = measure.build

    def build_slow_first_step(name, model):
        optimizer = build(name, model)
        step = optimizer.step
        optimizer.step = lambda: (clock.__setitem__(0, clock[0] + 20 * (not optimizer.state)), step())
        return optimizer

    monkeypatch.setattr(measure, "build", build_slow_first_step)
    monkeypatch.setattr(measure, "SLOW", math.inf)
    real = measure.time.perf_counter
    monkeypatch.setattr(measure.time, "perf_counter", lambda: real() + clock[0])
    assert row(tiny, "signum", limit=40, pairs=4)["pairs"] == 4


def test_the_commit_is_told_or_unknown_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.describe_machine("cpu")["commit"] == "unknown"
    assert machine.describe_machine("cpu", "abc")["commit"] == "abc"


def test_a_training_that_is_too_slow_is_a_row():
    settings = {"preset": "100m", "device": "cpu", "steps": 2, "batch_size": 1, "length": 8}
    stopped = train.measure_in_new_process(0.2, name="adamw_torch", **settings)
    assert stopped == {"optim": "adamw_torch", "error": "stopped after 0 s"}
