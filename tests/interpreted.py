"""The Triton kernels in Triton's interpreter, on the CPU; `test_triton.py` runs this file in a process of its own.

The interpreter cuts the bits off that bfloat16 does not hold, where a GPU rounds to the nearest: here it rounds too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_runs import CASES, VARIANTS, WEIGHTS, check_gpu_kernel, run
from torch import Tensor, nn
from triton.runtime import interpreter

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, CoapAdamW, LowMemAdamW, SlimAdamW
from hf_lowmem.codecs import Float32
from hf_lowmem.codecs.dynamic_map import boundaries, decode_table
from hf_lowmem.kernels import KERNELS, Slot, eager, gpu
from hf_lowmem.kernels.gpu_kernels import decoded, encoded
from hf_lowmem.state import Rounding, StatePlan

CPU = torch.device("cpu")
convert_float = interpreter._convert_float


def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy()
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.array(data).view(np.uint16).astype(np.uint32) << 16
    return convert_float(data, source, target, mode)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.knobs.runtime.interpret
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@triton.jit
def through_the_map(x, codes, values, SIZE: tl.constexpr, SIGNED: tl.constexpr):
    at = tl.arange(0, SIZE)
    code = encoded(tl.load(x + at), SIGNED)
    tl.store(codes + at, code)
    tl.store(values + at, decoded(code, SIGNED))


def mapped(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    size = 1 << (x.numel() - 1).bit_length()
    padded = torch.cat([x, torch.zeros(size - x.numel())])
    codes, values = torch.empty(size, dtype=torch.int32), torch.empty(size)
    through_the_map[(1,)](padded, codes, values, SIZE=size, SIGNED=signed)
    return codes[: x.numel()], values[: x.numel()]


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_round_trips_every_code(signed: bool) -> None:
    values = decode_table(signed, CPU)
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
    nearest = decode_table(signed, CPU)[torch.bucketize(x, boundaries(signed), right=True)]
    ratio = float((values - x).norm() / (nearest - x).norm())
    assert 1 <= ratio < limit


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(("case", "dtype", "rounding"), VARIANTS)
def test_kernels_follow_the_rules(case: tuple, dtype: torch.dtype, rounding: str, bits: int) -> None:
    check_gpu_kernel(case, bits, dtype, rounding)


@pytest.mark.parametrize("means", ["loop", "before"])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("case", [c for c in CASES if "axes" in c[1]], ids=lambda case: f"{case[1]}-{case[2]}")
def test_large_groups_follow_the_rules(case: tuple, bits: int, means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups larger than a tile, and than what one program takes."""
    for name, value in dict(TILE=512, ONE_TILE=0, ONE_PROGRAM=1 << 20 if means == "loop" else 0, SUM=1024).items():
        monkeypatch.setattr(gpu, name, value)
    gpu.layout_of.cache_clear()
    try:
        check_gpu_kernel(case, bits, torch.bfloat16, "kahan")
    finally:
        gpu.layout_of.cache_clear()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
def test_projected_steps_follow_the_rules(dtype: torch.dtype, rounding: str, bits: int) -> None:
    check_gpu_kernel((CoapAdamW, {"rank": 16, "transposed": True}, (48, 64)), bits, dtype, rounding)


@pytest.mark.parametrize("decay", [0.9, torch.tensor([[[0.5]], [[0.7]], [[0.9]]])], ids=["one", "per matrix"])
@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
def test_an_update_is_added_as_in_tiles(dtype: torch.dtype, rounding: str, decay: float | Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    start, update = (torch.randn(3, 40, 50, generator=generator) for _ in range(2))
    plan, found = StatePlan({}, Float32(), rounding=Rounding.of(rounding, dtype)), []
    for add in (gpu.add, eager.add):
        state = {name: spec.zeros(CPU) for name, spec in plan.rounding.specs(tuple(start.shape)).items()}
        slot = Slot(start.to(dtype), start, state, plan, 1, 12345)
        for _ in range(2):
            add(slot, update, -1e-3, decay)
        found.append((slot.param, slot.weight().load()))
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
]


@pytest.mark.parametrize("case", ODD, ids=lambda case: f"{case[1]}-{case[2]}".replace(" ", ""))
def test_odd_sizes_follow_the_rules(case: tuple) -> None:
    check_gpu_kernel(case, 32, torch.float32, "nearest")
    check_gpu_kernel(case, 16, torch.bfloat16, "stochastic")


@pytest.fixture
def gpu_kernels_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in KERNELS if key.device == "cuda"]:
        monkeypatch.setitem(KERNELS, key._replace(device="cpu"), KERNELS[key])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("cls", [LowMemAdamW, SlimAdamW])
@pytest.mark.usefixtures("gpu_kernels_for_the_cpu")
def test_a_bad_gradient_stays_with_its_entry(cls: type, bits: int, bad: float) -> None:
    options = {
        "state_bits": bits,
        **({"axes": (1,)} if cls is SlimAdamW else {}),
        **({"min_8bit_size": 0} if bits == 8 else {}),
    }
    weight, _ = run(cls, options, torch.zeros(4, 256), bad=bad)
    broken = ~weight.isfinite()
    assert broken.sum() <= 1
    assert weight.view(-1)[: 2 * 256].abs().min() > 0


@pytest.mark.usefixtures("gpu_kernels_for_the_cpu")
def test_many_weights_take_few_launches_and_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda variant, *rest: (launched.append(variant), launch(variant, *rest)))
    layers = nn.ModuleList(nn.Linear(64, 32 if i % 2 else 48) for i in range(12))
    optimizer = hf_lowmem.build_optimizer(layers, "slim_adamw", lr=1e-3)
    for param in layers.parameters():
        param.grad = torch.ones_like(param)
    gpu.numbered.cache_clear()
    optimizer.step()
    assert sum(map(len, (group["params"] for group in optimizer.param_groups))) == 24
    assert len(launched) == len(set(launched)) <= 3
    tables = gpu.numbered.cache_info().misses
    optimizer.step()
    assert gpu.numbered.cache_info().misses == tables
    layers[0].weight.grad = torch.ones_like(layers[0].weight)
    optimizer.step()
    assert gpu.numbered.cache_info().misses == tables + 1
