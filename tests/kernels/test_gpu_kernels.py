"""The Triton kernels on CUDA, and on the CPU in Triton's interpreter, in a process that `test_triton.py` starts.

The interpreter cuts the bits off that bfloat16 does not hold, where a GPU rounds to the nearest: here both round.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, CoapAdamW, FactoredAdamW, FAdam, LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.codecs import Float32
from hf_lowmem.codecs.dynamic_map import boundaries, decode_table
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.in_place.updates import add as add_in_place
from hf_lowmem.kernels.triton import launch
from hf_lowmem.kernels.triton.codes import decoded, encoded
from hf_lowmem.kernels.triton.launch import Launch
from hf_lowmem.kernels.triton.tuning import KINDS, Tile, current_arch, tile_for, tuned
from hf_lowmem.state import Rounding, StatePlan
from tests.support import micro_adam_runs, passes_runs, smmf_runs
from tests.support.backend_steps import PLANS, check_reduce_then_apply
from tests.support.declarations import FULL_SPACE, each_variant
from tests.support.kernel_runs import CASES, RAGGED, VARIANTS, WEIGHTS, by_rule, check_gpu_kernel, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else pytest.mark.gpu
convert_float = interpreter._convert_float


def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.array(data).view(np.uint16).astype(np.uint32) << 16
    return convert_float(data, source, target, mode)


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert triton.knobs.runtime.interpret == INTERPRETED
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    with forced("triton", "in_place"):
        yield


@triton.jit
def through_the_map(x, codes, values, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    at = tl.arange(0, SIZE)
    code = encoded(tl.load(x + at), SIGNED)
    tl.store(codes + at, code)
    tl.store(values + at, decoded(code, SIGNED))


def mapped(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    size = 1 << (x.numel() - 1).bit_length()
    padded = torch.cat([x, torch.zeros(size - x.numel())]).to(DEVICE)
    codes, values = torch.empty_like(padded, dtype=torch.int32), torch.empty_like(padded)
    through_the_map[(1,)](padded, codes, values, SIZE=size, SIGNED=signed)
    return codes[: x.numel()].cpu(), values[: x.numel()].cpu()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_round_trips_every_code(signed: bool) -> None:
    values = decode_table(signed, torch.device("cpu"))
    # A block's scale times its reciprocal may miss 1 by a float or two.
    for factor in (1.0, 1 - 2.0**-23, 1 + 2.0**-23):
        codes, decoded_values = mapped(values * factor, signed)
        assert torch.equal(codes, torch.arange(256, dtype=torch.int32))
        torch.testing.assert_close(decoded_values, values, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_one_code_from_nearest_at_most(signed: bool) -> None:
    """At every boundary between two codes, the floats beside it, and a sweep of all that lies between."""
    edges = boundaries(signed)
    beside = [torch.nextafter(edges, torch.full_like(edges, to)) for to in (-2.0, 2.0)]
    sweep = torch.logspace(-9, 0, 1 << 15, dtype=torch.float64).float()
    x = torch.cat([edges, *beside, sweep, -sweep, torch.zeros(1)])
    x = x.clamp(-1, 1) if signed else x.abs().clamp(max=1)
    codes, _ = mapped(x, signed)
    nearest = torch.bucketize(x, edges, right=True)
    assert (codes - nearest).abs().max() <= 1


@pytest.mark.parametrize(("spread", "limit"), [(0.0, 1.0065), (2.0, 1.0215)], ids=["gaussian", "lognormal"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_map_costs_little_accuracy(signed: bool, spread: float, limit: float) -> None:
    """The rms error of blocks of 256 against that of the nearest codes, as the kernels' docstring states it."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1 << 8, 256, generator=generator)
    value *= torch.exp(spread * torch.randn(value.shape, generator=generator))
    value = value if signed else value.abs()
    x = (value / value.abs().amax(1, keepdim=True)).flatten()
    _, values = mapped(x, signed)
    nearest = decode_table(signed, torch.device("cpu"))[torch.bucketize(x, boundaries(signed), right=True)]
    ratio = float((values - x).norm() / (nearest - x).norm())
    assert 1 <= ratio < limit


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(("case", "dtype", "rounding"), VARIANTS)
def test_kernels_follow_the_rules(case: tuple, dtype: torch.dtype, rounding: str, bits: int) -> None:
    check_gpu_kernel(case, bits, dtype, rounding, DEVICE.type)


@pytest.mark.parametrize("means", ["loop", "before"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("case", [c for c in CASES + RAGGED if "axes" in c[1]], ids=lambda c: f"{c[1]}-{c[2]}")
def test_large_groups_follow_the_rules(case: tuple, bits: int, means: str) -> None:
    """Groups larger than a tile, and than what one program takes."""
    tile = Tile(512, one_tile=256, one_program=1 << 20 if means == "loop" else 0, partial_sum=1024)
    with tuned(dict.fromkeys(KINDS, tile)):
        check_gpu_kernel(case, bits, torch.bfloat16, "kahan", DEVICE.type)


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}".replace(" ", ""))
def test_rows_that_end_in_a_short_block_follow_the_rules(case: tuple) -> None:
    check_gpu_kernel(case, 8, torch.float32, "nearest", DEVICE.type, clip=0.5)
    check_gpu_kernel(case, 8, torch.bfloat16, "kahan", DEVICE.type)


@each_variant([d for d in FULL_SPACE if d.cls is FactoredAdamW], geometries=True, storages=("32-bit", "8-bit"))
def test_factored_weights_of_every_layout_follow_the_rules(cls: type, options: dict, shape: tuple) -> None:
    bits = options.get("state_bits", 32)
    check_gpu_kernel((cls, options, shape), bits, torch.float32, "nearest", DEVICE.type, clip=0.5)


@pytest.mark.parametrize("rank", [8, 33, 96])
def test_projected_rows_of_any_size_follow_the_rules(rank: int) -> None:
    check_gpu_kernel((CoapAdamW, {"rank": rank}, (160, 128)), 8, torch.bfloat16, "stochastic", DEVICE.type)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
def test_projected_steps_follow_the_rules(dtype: torch.dtype, rounding: str, bits: int) -> None:
    check_gpu_kernel((CoapAdamW, {"rank": 16, "transposed": True}, (48, 64)), bits, dtype, rounding, DEVICE.type)


@pytest.mark.parametrize("decay", [0.9, torch.tensor([[[0.5]], [[0.7]], [[0.9]]])], ids=["one", "per matrix"])
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
def test_an_update_is_added_as_in_tiles(dtype: torch.dtype, rounding: str, decay: float | Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    start, update = (torch.randn(3, 40, 50, generator=generator).to(DEVICE) for _ in range(2))
    decay = decay.to(DEVICE) if isinstance(decay, Tensor) else decay
    plan, found = StatePlan({}, Float32(), rounding=Rounding.of(rounding, dtype)), []
    for add in (launch.add, add_in_place):
        state = {name: spec.zeros(DEVICE) for name, spec in plan.rounding.specs(tuple(start.shape)).items()}
        step = ParamStep(start.to(dtype), start, state, plan, 1, 12345)
        with forced("in_place"):
            for _ in range(2):
                add(step, update, -1e-3, decay)
        found.append((step.param, step.weight().load()))
    (narrow, mine), (expected, theirs) = found
    if rounding == "kahan" or dtype == torch.float32:
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    else:  # a float32 on the boundary of two may fall to either side
        assert (narrow == expected).float().mean() > 0.99
        torch.testing.assert_close(mine, theirs, rtol=torch.finfo(dtype).eps, atol=0)


ODD = [
    (LowMemAdamW, {}, (3, 7, 11)),
    (LowMemAdamW, {}, ()),
    (SlimAdamW, {"axes": (1,)}, (5, 33)),
    (SlimAdamW, {"axes": (0,)}, (33, 5)),
    (AdamMini, {"axes": (0, 2)}, (3, 5, 7)),
    (AdamMini, {"axes": (0,), "rows_per_block": 2}, (6, 4)),
    (AdamMini, {"axes": (1,)}, (2, 3, 5)),
    (FactoredAdamW, {"axes": (1,), "cross_axes": (2,)}, (3, 7, 11)),
]


@pytest.mark.parametrize("case", ODD, ids=lambda case: f"{case[1]}-{case[2]}".replace(" ", ""))
def test_odd_sizes_follow_the_rules(case: tuple) -> None:
    check_gpu_kernel(case, 32, torch.float32, "nearest", DEVICE.type)
    check_gpu_kernel(case, 16, torch.bfloat16, "stochastic", DEVICE.type)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_projected_update_is_not_rounded(rounding: str) -> None:
    start = 0.01 * torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    options = {"rank": 8, "rounding": rounding}
    mine, _ = run(CoapAdamW, options, start)
    theirs, _ = by_rule(CoapAdamW, options, start)
    assert (mine - theirs).abs().gt(1e-6).float().mean() < 0.005


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("cls", [LowMemAdamW, SlimAdamW])
def test_a_bad_gradient_stays_with_its_entry(cls: type, bits: int, bad: float) -> None:
    options = {
        "state_bits": bits,
        **({"axes": (1,)} if cls is SlimAdamW else {}),
        **({"min_8bit_size": 0} if bits == 8 else {}),
    }
    for columns in (256, 300):  # the bad entry of the latter is in a short block
        weight, _ = run(cls, options, torch.zeros(4, columns, device=DEVICE), bad=bad)
        broken = ~weight.isfinite()
        assert broken.sum() <= 1
        assert weight.view(-1)[: 2 * columns].abs().min() > 0


@pytest.mark.parametrize("columns", [64, 300, 1024])
def test_rows_that_share_a_tile_are_stepped_as_if_each_were_alone(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(5, columns, generator=generator).to(DEVICE) for _ in range(2))
    together, *alone = (nn.Parameter(part.clone()) for part in (start, *start.split(1)))
    optimizer = SlimAdamW([together, *alone], lr=1e-2, axes=(1,), state_bits=8, min_8bit_size=0)
    for param, part in zip((together, *alone), (grad, *grad.split(1)), strict=True):
        param.grad = part.clone()
    optimizer.step()
    assert torch.equal(together, torch.cat(alone))
    for name, value in optimizer.state[together].items():
        if isinstance(value, Tensor) and value.ndim:
            assert torch.equal(value, torch.cat([optimizer.state[param][name] for param in alone])), name


def test_programs_of_columns_walk_along_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two of them step the first lines of all 512 columns, so that they read what lies side by side."""
    tables_of = Launch.tables
    two_tiles = lambda *args: (tables := tables_of(*args))._replace(tiles=tables.tiles[:2])  # noqa: E731
    monkeypatch.setattr(Launch, "tables", two_tiles)
    param = nn.Parameter(torch.ones(64, 512, device=DEVICE))
    param.grad = torch.ones_like(param)
    with tuned({"column": Tile(4096)}):
        SlimAdamW([param], lr=1e-2, axes=(0,)).step()
    assert param[:16].max() < 1
    assert param[16:].min() == 1


def test_tiles_are_other_ones_for_a_while() -> None:
    before, other = tile_for("group", current_arch()), Tile(512, per_thread=16)
    with tuned({"group": other}):
        assert tile_for("group", current_arch()) is other
    assert tile_for("group", current_arch()) is before
    with pytest.raises(ValueError, match=r"kinds of launch are none, .*, not rows"), tuned({"rows": other}):
        pass


def test_many_weights_take_few_launches_and_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, uploads = list[Any](), list[Any]()
    step, upload = Launch.step, Launch._uploaded
    monkeypatch.setattr(Launch, "step", lambda self, *args: (launched.append(self.variant), step(self, *args)))
    monkeypatch.setattr(Launch, "_uploaded", lambda *args: (uploads.append(args), upload(*args))[1])
    layers = nn.ModuleList(nn.Linear(64, 32 if i % 2 else 48, device=DEVICE) for i in range(12))
    optimizer = hf_lowmem.build_optimizer(layers, "slim_adamw", lr=1e-3)
    for param in layers.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert sum(map(len, (group["params"] for group in optimizer.param_groups))) == 24
    assert len(launched) == len(set(launched)) <= 3
    tables = len(uploads)
    assert tables == len(launched)
    optimizer.step()
    assert len(uploads) == tables
    layers[0].weight.grad = torch.ones_like(layers[0].weight)
    optimizer.step()
    assert len(uploads) == tables + 1


@pytest.mark.parametrize("means", ["as they come", "before"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}".replace(" ", ""))
def test_a_clipped_step_follows_the_rule(case: tuple, means: str) -> None:
    tiles = dict.fromkeys(KINDS, Tile(512, one_tile=256, one_program=0, partial_sum=1024)) if means == "before" else {}
    with tuned(tiles):
        check_gpu_kernel(case, 32, torch.float32, "nearest", DEVICE.type, clip=0.5)
        check_gpu_kernel(case, 8, torch.bfloat16, "kahan", DEVICE.type, clip=0.5)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", PLANS, ids=lambda case: case[0])
def test_reduce_and_apply_are_a_step(case: tuple, clip: float | None) -> None:
    check_reduce_then_apply("triton", *case[1:], clip, DEVICE)


@pytest.mark.parametrize(
    ("cls", "name"), [(SlimAdamW, "exp_avg_sq"), (FactoredAdamW, "exp_avg_sq_row"), (FactoredAdamW, "exp_avg_sq_col")]
)
def test_a_step_takes_the_sums_that_its_clipping_has_found(cls, name, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    partial_sums = Launch.partial_sums
    counted = lambda *args, **kwargs: (found.append(args), partial_sums(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(Launch, "partial_sums", counted)
    param = nn.Parameter(torch.zeros(48, 64, device=DEVICE))
    optimizer = cls([param], lr=1e-2, axes=(0,), **({} if cls is SlimAdamW else {"cross_axes": (1,)}))
    param.grad = torch.ones_like(param)
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(48**0.5 * 8, rel=1e-6)
    optimizer.step()
    assert len(found) == 1
    once = optimizer.state[param][name].clone()
    optimizer.clip_grad_norm_(1.0)
    param.grad.mul_(2)  # the sums are of other gradients now
    optimizer.step()
    assert len(found) == 3
    change = optimizer.state[param][name] - 0.999 * once
    torch.testing.assert_close(change, 4 * once, rtol=1e-4, atol=0)


class Tape(TorchDispatchMode):
    """What `torch.cuda.graph` is on CUDA: torch's operations and the kernels' launches, to be done again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        modules = launch.triton_kernels()
        self.launchers = {
            name: self.launcher(getattr(modules, name))
            for name in ("step", "combine", "mean_of_rows", "sum_squares", "write_grads")
        }
        recorded = SimpleNamespace(**{**vars(modules), **self.launchers})
        monkeypatch.setattr(launch, "triton_kernels", lambda: recorded)

    def launcher(self, kernel: Any) -> Any:
        tape = self

        class Launcher:
            def __getitem__(self, grid: Any) -> Any:
                def launched(*args: Any, **kwargs: Any) -> None:
                    tape.done.append((kernel[grid], args, kwargs, None))
                    with _disable_current_modes():
                        kernel[grid](*args, **kwargs)

                return launched

        return Launcher()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the step reads a number of the device"
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            if isinstance(out, Tensor) and any(out is arg for arg in args):
                continue  # in place
            for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def captured(function: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`function`, whose effects are not there yet, to be replayed."""
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph
    tape = Tape(monkeypatch)
    monkeypatch.setattr(launch, "uploaded", lambda *args: pytest.fail("numbers are uploaded during the capture"))
    with tape:
        function()
    return tape


GRAPHS = [
    (LowMemAdamW, {}, "nearest"),
    (SlimAdamW, {"axes": (0,)}, "stochastic"),
    (SlimAdamW, {"axes": (1,)}, "kahan"),
    (FactoredAdamW, {"axes": (1,), "cross_axes": (0,)}, "kahan"),
    (AdamMini, {"axes": (1,), "rows_per_block": 8}, "stochastic"),
    (Signum, {}, "nearest"),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}".replace(" ", ""))
def test_a_captured_step_is_replayed(case: tuple, clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other gradients, the next step's numbers and another learning rate, as steps that are not captured."""
    cls, options, rounding = case
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(16, 256, generator=generator).bfloat16(), torch.randn(256, generator=generator).bfloat16()]
    grads = [[torch.randn(p.shape, generator=generator).bfloat16().to(DEVICE) for p in start] for _ in range(5)]
    rates = [1e-2, 1e-2, 2e-2, 5e-3, 1e-2]

    def build(lr: Any, **more: Any) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(p.clone().to(DEVICE)) for p in start]
        shared = {"state_bits": 8, "min_8bit_size": 0, "rounding": rounding, "weight_decay": 0.1, **more}
        return params, cls([{"params": params[:1], **options}, {"params": params[1:]}], lr=lr, **shared)

    def step(optimizer: Any) -> None:
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()

    expected, plain = build(rates[0])
    for rate, given in zip(rates, grads, strict=True):
        for group in plain.param_groups:
            group["lr"] = rate
        for param, grad in zip(expected, given, strict=True):
            param.grad = grad.clone()
        step(plain)

    lr = torch.tensor(rates[0], dtype=torch.float64, device=DEVICE)
    params, optimizer = build(lr, capturable=True)
    for given in grads[:2]:  # the warm-up
        for param, grad in zip(params, given, strict=True):
            param.grad = grad.clone()
        step(optimizer)
    for param in params:  # where the graph will look
        param.grad = torch.zeros_like(param)
    before = copy.deepcopy([[p.detach() for p in params], list(optimizer.state.values())])
    graph = captured(lambda: step(optimizer), monkeypatch)
    for param, value, state in zip(params, *before, strict=True):  # the tape, unlike a graph, has taken the step
        param.data.copy_(value)
        for name, tensor in state.items():
            optimizer.state[param][name].copy_(tensor)
    for rate, given in zip(rates[2:], grads[2:], strict=True):
        lr.fill_(rate)
        for param, grad in zip(params, given, strict=True):
            param.grad.copy_(grad)
        graph.replay()

    for param, other in zip(params, expected, strict=True):
        assert optimizer.state[param]["step"].item() == 5
        torch.testing.assert_close(param, other, rtol=0, atol=1e-6)
        for name, tensor in optimizer.state[param].items():
            torch.testing.assert_close(tensor.cpu(), plain.state[other][name].cpu(), rtol=1e-6, atol=1e-9)


def test_a_capture_without_a_step_before_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(4, 256, device=DEVICE))
    optimizer = SlimAdamW([param], lr=1e-2, axes=(1,), capturable=True)
    param.grad = torch.ones_like(param)
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    monkeypatch.setattr(launch, "_LASTING", {})
    launch.part_numbers.cache_clear()
    with pytest.raises(RuntimeError, match="take at least one step of the same parameters before the capture"):
        optimizer.step()


def test_a_clipping_outside_of_the_graph_of_its_step_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(4, 256, device=DEVICE))
    optimizer = SlimAdamW([param], lr=1e-2, axes=(1,), capturable=True)
    param.grad = torch.ones_like(param)
    optimizer.clip_grad_norm_(1.0)
    monkeypatch.setattr("hf_lowmem.clipping.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="capture both in one"):
        optimizer.step()


@pytest.mark.parametrize("number", range(len(smmf_runs.CASES)))
@pytest.mark.parametrize("capturable", [False, True])
def test_smmf_steps_as_the_rule(capturable: bool, number: int) -> None:
    """Each case with another weight, and with float32."""
    options, shape = smmf_runs.CASES[number]
    dtype, rounding = smmf_runs.WEIGHTS[number % len(smmf_runs.WEIGHTS) if capturable else 0]
    clip = 0.5 if number % 2 else None
    smmf_runs.check("triton_passes", {**options, "capturable": capturable}, shape, dtype, rounding, DEVICE, clip)


# Several tiles, of which one is not full; stacks; and the flags.
FADAM = [
    ({}, (9, 768)),
    ({"clip_threshold": 0.5, "mask_decay": False}, (7, 5, 64)),
    ({"stacked": True}, (3, 10, 256)),
    ({"stacked": True, "mask_decay": False}, (5, 192)),
]


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("number", range(len(FADAM)))
def test_fadam_steps_as_the_rule(number: int, bits: int) -> None:
    """Each case with another weight, and with float32."""
    other, clip = smmf_runs.WEIGHTS[1 + (number + bits // 8) % 4], 30.0 if number % 2 else None
    for dtype, rounding in (smmf_runs.WEIGHTS[0], other):
        case = (FAdam, *FADAM[number])
        passes_runs.check("triton_passes", case, bits, dtype, rounding, DEVICE, clip, capturable=bits == 16)


@pytest.mark.parametrize("number", range(len(micro_adam_runs.CASES)))
def test_micro_adam_steps_as_the_rule(number: int) -> None:
    """Each case with another weight."""
    options, shape = micro_adam_runs.CASES[number]
    dtype, rounding = micro_adam_runs.WEIGHTS[number % len(micro_adam_runs.WEIGHTS)]
    micro_adam_runs.check("triton_passes", options, shape, dtype, rounding, DEVICE)
