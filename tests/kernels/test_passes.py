"""Steps in passes: each backend against the rule, and shards of a weight against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowmem.algorithms import FAdam, HFac
from hf_lowmem.kernels import BACKENDS, forced
from hf_lowmem.optimizer import LowMemOptimizer
from tests.support.kernel_runs import by_rule, run

built = pytest.mark.skipif(not BACKENDS["cpu_passes"].available(), reason="the compiled kernels are missing")
BACKENDS_HERE = ["in_place", pytest.param("cpu_passes", marks=built)]

Case = tuple[type[LowMemOptimizer], dict[str, Any], tuple[int, ...]]
# What is cut into several tiles and units, rows that are longer than a run, stacks, and weights of other than two axes.
CASES: list[Case] = [
    (FAdam, {}, (300, 1024)),
    (FAdam, {"clip_threshold": 0.5, "mask_decay": False}, (37, 5, 3, 3)),
    (FAdam, {"stacked": True}, (3, 70, 1024)),
    (FAdam, {"stacked": True}, (300, 7)),
    (FAdam, {}, (1031,)),
    (HFac, {}, (300, 1024)),
    (HFac, {"momentum_in_correction": "previous", "clip_threshold": 0.5}, (37, 5, 3, 3)),
    (HFac, {"stacked": True}, (3, 70, 1024)),
    (HFac, {}, (1031, 3)),
    (HFac, {}, (2, 70_001)),
]
WEIGHTS = [
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "kahan"),
    (torch.float16, "nearest"),
]
# A case that keeps no full moments has nothing to store in 16 or 8 bits.
STORED = [(case, bits) for case in CASES for bits in ((32, 16, 8) if case[0] is FAdam else (32,))]


def named(value: Any) -> str:
    cls, options, shape = value if isinstance(value, tuple) and len(value) == 3 else (None, None, value)
    return f"{cls.__name__}{options}{shape}".replace(" ", "") if cls else str(shape)


@pytest.mark.parametrize(("dtype", "rounding"), WEIGHTS)
@pytest.mark.parametrize(("case", "bits"), STORED, ids=named)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_each_backend_follows_the_rule(backend: str, case: Case, bits: int, dtype: torch.dtype, rounding: str) -> None:
    cls, options, shape = case
    if backend == "cpu_passes" and dtype == torch.float16:
        pytest.skip("the compiled kernels do not know float16")
    options = {**options, "state_bits": bits, "min_8bit_size": 0, "rounding": rounding}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with forced(backend):
        mine, state = run(cls, options, start)
    theirs, expected = by_rule(cls, options, start)
    # A code, or a narrow number's neighbour, may fall to either side of a boundary in a few places.
    flips = bits < 32 or rounding == "stochastic" or (rounding == "nearest" and dtype != torch.float32)
    for name, value in {"param": mine, **state}.items():
        if name == "kahan_comp":
            continue  # in units of the weight's last place: compared with the weight
        reference = theirs if name == "param" else expected[name]
        off, largest = (value - reference).abs(), float(reference.abs().max())
        exact = off <= 2e-6 * largest + 2e-6 * reference.abs()
        assert flips or exact.all(), (name, off.max())
        assert exact.sum() >= (0.99 if bits == 32 else 0.95) * exact.numel() - (bits == 8), (
            name,
            exact.float().mean(),
        )
        assert off.max() <= 2.0**-5 * largest, (name, off.max())
