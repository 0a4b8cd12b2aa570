"""Steps of COAP's optimizers, and what their state holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.optimizer import LowMemOptimizer

BOTH = pytest.mark.parametrize("cls", [CoapAdamW, CoapAdafactor])
SOON = {"update_interval": 3, "reproject_factor": 2}  # init at call 1, Eq. 5 at 4 and 10, recomputed at 7 and 13
EACH = {"update_interval": 3, "reproject_factor": 1}  # recomputed at 4, 7, 10 and 13
RIGHT, LEFT = (24, 16), (16, 24)
CONV, CONV_1 = (40, 30, 3, 3), (64, 50, 3, 1)  # two ranks and one


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    return [random(*shape, seed=step + 1) for step in range(steps)]


def build(cls: type, start: Tensor, **options: Any) -> tuple[nn.Parameter, LowMemOptimizer]:
    param = nn.Parameter(start.clone(memory_format=torch.preserve_format))
    return param, cls([param], **{"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, **options})


def train(param: nn.Parameter, optimizer: LowMemOptimizer, grads: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """Take the steps; yields the live state after each."""
    for grad in grads:
        param.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
        yield optimizer.state[param]


def run(cls: type, start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param, optimizer = build(cls, start, **options)
    for _ in train(param, optimizer, grads):
        pass
    return param.detach(), optimizer.state[param]


def bases(state: dict[str, Tensor]) -> list[Tensor]:
    return [tensor.float().clone() for name, tensor in state.items() if name in ("proj", "proj_0", "proj_1")]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def moment(optimizer: LowMemOptimizer, param: nn.Parameter, name: str) -> Tensor:
    """A full moment, decoded."""
    plan = optimizer.plan(optimizer.param_groups[0], tuple(param.shape))
    return plan.bind(optimizer.state[param], tuple(param.shape))[name].load().clone()


def projected(optimizer: LowMemOptimizer, param: nn.Parameter, grad: Tensor) -> Tensor:
    plan = optimizer.plan(optimizer.param_groups[0], tuple(param.shape))
    return plan.projection.project(optimizer.state[param], grad)


def assert_orthonormal(rows: Tensor, tolerance: float = 1e-5) -> None:
    assert (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype)).abs().max() < tolerance
