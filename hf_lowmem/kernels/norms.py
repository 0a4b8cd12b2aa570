"""The norm of all gradients, in one pass over them that leaves them as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels import KernelKey, Slot, find_kernel
from hf_lowmem.kernels.gpu import TritonKernel


def total_norm(buckets: Iterable[tuple[KernelKey | None, list[Slot]]], kept: dict[Any, Tensor]) -> Tensor:
    """The 2-norm of the gradients of all slots, 0-D; what their steps can use of the pass goes into `kept`.

    Squares, finite or not, are summed in float32, or in float64 where a gradient is float64, as the norm is then. A
    key is None where no kernel steps.
    """
    squares: list[Tensor] = []
    grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for key, slots in buckets:
        kernel = find_kernel(key) if key else None
        if isinstance(kernel, TritonKernel):
            found, slots = kernel.square_sums(slots, kept)
            squares += found
        for slot in slots:
            grads[slot.grad.device, slot.grad.dtype].append(slot.grad)
    for (_, dtype), same in grads.items():
        norms = torch._foreach_norm(same, 2, torch.promote_types(dtype, torch.float32))
        squares.append(torch.stack(norms).square().sum())
    if not squares:
        return torch.zeros((), dtype=torch.float32)
    widest = torch.float64 if any(square.dtype == torch.float64 for square in squares) else torch.float32
    return torch.stack([moved(square, squares[0].device).to(widest) for square in squares]).sum().sqrt()


def moved(number: Tensor, device: torch.device) -> Tensor:
    """A 0-D tensor on another device, which the host waits for only where it will read it."""
    return number.to(device, non_blocking=device.type != "cpu")
