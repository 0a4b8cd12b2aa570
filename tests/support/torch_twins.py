"""What the tests of agreement with torch.optim.AdamW share."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem.algorithms import (
    CoapAdamW,
    LowMemAdamW,
)
from tests.support.declarations import CLASSES

every_class = pytest.mark.parametrize("cls", CLASSES)
# For what the classes share; COAP's two add groups in a way of their own.
two_classes = pytest.mark.parametrize("cls", [LowMemAdamW, CoapAdamW])
Named = namedtuple("Named", "name param")


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    """A parameter with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    param.grad = torch.randn(shape, generator=generator).to(dtype)
    return param


def outcome(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call returns, or the type and the text of what it raises."""
    try:
        return "returned", call()
    except Exception as error:
        return type(error), str(error)


def settings(optimizer: torch.optim.Optimizer) -> list[tuple[int, Any]]:
    """Of each group: the number of its parameters, and their names."""
    return [(len(group["params"]), group.get("param_names")) for group in optimizer.param_groups]


# -- state dicts ----------------------------------------------------------------------------------------------------


def trained(cls: type, params: Any, steps: int = 2, **options: Any) -> torch.optim.Optimizer:
    optimizer = cls(params, **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    return optimizer
