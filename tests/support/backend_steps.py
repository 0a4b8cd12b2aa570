"""Steps of one parameter by a backend itself, without an optimizer, and the plans that backends are compared on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.codecs import Float32, Int8Blockwise
from hf_lowmem.kernels import BACKENDS
from hf_lowmem.kernels.bucket import Bucket, Clip, Hyper, ParamStep
from hf_lowmem.kernels.means import average
from hf_lowmem.moments import Full, GroupMean, Segment, whole
from hf_lowmem.rounding import noise_key
from hf_lowmem.state import Codec, Moment, StatePlan
from tests.support.declarations import FACTORED_LAST_AXIS, FACTORED_QKV, LAST_AXIS, QKV

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
LIMITED = replace(HYPER, flags={"update_limit": 0.7})
CPU = torch.device("cpu")
FULL = Full(signed=False)


def adamw(codec: Codec = Float32(), second: Moment = FULL, first: Moment = Full(), **more: Moment) -> StatePlan:  # noqa: B008
    return StatePlan({"exp_avg": first, "exp_avg_sq": second, **more}, codec)


def signum(codec: Codec = Float32()) -> StatePlan:  # noqa: B008
    return StatePlan({"exp_avg": Full()}, codec)


def fused(segments: Any) -> GroupMean:
    return GroupMean(tuple(Segment(*fields) for fields in segments))


# (name, rule, plan, shape), with means of every kind.
PLANS: list[tuple[str, str, StatePlan, tuple[int, ...]]] = [
    ("full", "adamw", adamw(Int8Blockwise(64)), (96, 64)),
    ("signum", "signum", signum(), (96, 64)),
    ("rows", "adamw", adamw(second=whole((33, 64), (1,))), (33, 64)),
    ("columns", "adamw", adamw(Int8Blockwise(64), whole((33, 64), (0,))), (33, 64)),
    ("heads", "adamw", adamw(second=whole((32, 64), (1,), 8)), (32, 64)),
    ("whole weight", "adamw", adamw(second=whole((33, 64), (0, 1))), (33, 64)),
    ("fused on axis 0", "adamw", adamw(second=fused(QKV)), (16, 128)),
    ("fused on axis 1", "adamw", adamw(second=fused(LAST_AXIS)), (24, 384)),
    ("rows of experts", "adamw", adamw(second=whole((3, 8, 64), (2,))), (3, 8, 64)),
    ("columns of experts", "adamw", adamw(second=whole((3, 8, 64), (1,))), (3, 8, 64)),
    ("vector", "adamw", adamw(second=whole((700,), (0,))), (700,)),
    ("factored", "adamw", adamw(second=whole((33, 300), (1,), cross_axes=(0,))), (33, 300)),
    ("factored experts", "adamw", adamw(Int8Blockwise(64), whole((3, 8, 64), (1,), cross_axes=(2,))), (3, 8, 64)),
    ("factored and fused on axis 0", "adamw", adamw(second=fused(FACTORED_QKV)), (16, 128)),
    ("factored and fused on axis 1", "adamw", adamw(second=fused(FACTORED_LAST_AXIS)), (24, 192)),
    ("number", "adamw", adamw(second=whole((), (0,))), ()),
    ("limited rows", "limited_adamw", adamw(second=whole((33, 64), (1,))), (33, 64)),
    ("limited columns", "limited_adamw", adamw(Int8Blockwise(64), whole((33, 64), (0,))), (33, 64)),
    ("limited and fused", "limited_adamw", adamw(second=fused(QKV)), (16, 128)),
    ("limited and factored", "limited_adamw", adamw(second=whole((33, 300), (1,), cross_axes=(0,))), (33, 300)),
    ("limited, factored and fused", "limited_adamw", adamw(second=fused(FACTORED_QKV)), (16, 128)),
]


def first_step(
    plan: StatePlan, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> ParamStep:
    """Return the first step of a random weight, by a random gradient."""
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    state = {name: spec.zeros(device) for name, spec in plan.specs(shape).items()}
    return ParamStep(param, grad, state, plan, 1.0)


def stepped(
    backend: str, rule: str, step: ParamStep, clip: float | None = None, apart: bool = False
) -> dict[str, Tensor]:
    """Return weight and state after three steps of a backend; `apart` reduces and applies.

    Args:
        clip: what each gradient is multiplied by.
    """
    generator, chosen = torch.Generator().manual_seed(1), BACKENDS[backend]
    assert chosen.covers(rule, step)
    hyper = LIMITED if rule == "limited_adamw" else HYPER
    for number in (1.0, 2.0, 3.0):
        key = noise_key(0, 0, int(number)) if step.plan.rounding.kind == "stochastic" else 0
        scale = None if clip is None else torch.tensor(clip, dtype=step.plan.arithmetic, device=step.param.device)
        step.grad.copy_(torch.randn(step.grad.shape, generator=generator))
        step = step._replace(step=number, noise_key=key, clip=None if scale is None else Clip(scale, {}))
        bucket = Bucket.of([step], rule, chosen)
        if apart:
            for each, sums in zip(bucket, chosen.reduce(bucket), strict=True):
                average(each, sums, HYPER.beta2)
            chosen.apply(bucket, hyper)
        else:
            chosen.step(bucket, hyper)
    return {"param": step.param, **{name: value for name, value in step.state.items() if name != "step"}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Raise unless all tensors differ by at most `tolerance` times their largest entry, and codes by nothing."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * float(value.abs().max()) if value.is_floating_point() else 0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_reduce_then_apply(
    backend: str, rule: str, plan: StatePlan, shape: tuple[int, ...], clip: float | None, device: torch.device = CPU
) -> None:
    """Check that `reduce`, `average` and `apply` take the step that `step` takes."""
    once, apart = (
        stepped(backend, rule, first_step(plan, shape, device=device), clip, apart) for apart in (False, True)
    )
    assert_same(apart, once, 2e-6)
