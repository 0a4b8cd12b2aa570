"""Comparisons of the backends that step in passes with the rule."""

from __future__ import annotations

from typing import Any

import torch

from hf_lowmem.algorithms import FAdam, HFac
from hf_lowmem.kernels import forced
from hf_lowmem.optimizer import LowMemOptimizer
from tests.support.kernel_runs import by_rule, run

Case = tuple[type[LowMemOptimizer], dict[str, Any], tuple[int, ...]]
# Several units, rows that are longer than a run, stacks, and weights of other than two axes.
CASES: list[Case] = [
    (FAdam, {}, (90, 1024)),
    (FAdam, {"clip_threshold": 0.5, "mask_decay": False}, (37, 5, 3, 3)),
    (FAdam, {"stacked": True}, (3, 70, 100)),
    (FAdam, {"stacked": True}, (30, 7)),
    (FAdam, {}, (1031,)),
    (HFac, {}, (90, 1024)),
    (HFac, {"momentum_in_correction": "previous", "clip_threshold": 0.5}, (37, 5, 3, 3)),
    (HFac, {"stacked": True}, (3, 70, 300)),
    (HFac, {}, (1031, 3)),
    (HFac, {}, (2, 40_001)),
]


def check(
    backend: str,
    case: Case,
    bits: int,
    dtype: torch.dtype,
    rounding: str,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    clip: float | None = 30.0,
    **options: Any,
) -> None:
    """Check a few steps of a backend against those of the rule."""
    cls, own, shape = case
    options = {**own, **options, "state_bits": bits, "min_8bit_size": 0, "rounding": rounding}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    steps = 2 if bits == 8 else 3  # Triton's codes are not always the nearest
    with forced(backend):
        mine, state = run(cls, options, start, steps, clip=clip)
    theirs, expected = by_rule(cls, options, start, steps, None, clip, (backend,))
    # A code, or a narrow number's neighbour, may fall to either side of a boundary in a few places.
    # One that does changes the root mean square, and with it every entry a little.
    flips = bits < 32 or rounding == "stochastic"
    tolerance = 1e-3 if flips else 2e-6
    for name, value in {"param": mine, **state}.items():
        if name == "kahan_comp" or name.endswith("_absmax"):
            continue  # they are compared with the weight and with the moment that they belong to
        reference = theirs if name == "param" else expected[name]
        off, largest = (value - reference).abs(), float(reference.abs().max())
        close = off <= tolerance * (largest + reference.abs())
        share = float(close.float().mean())
        assert share >= (0.9 if flips else 1.0), (name, share, off.max())
        assert off.max() <= 2.0**-5 * largest, (name, off.max())
