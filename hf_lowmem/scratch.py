"""Temporaries that live for one optimizer step and are reused by every tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Named buffers on one device, which grow to the largest request. New temporaries would cost page faults."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, Sequence[int]], Tensor] = {}

    def get(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialized contiguous tensor, whose content lasts until the same name is requested again."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            numel = math.prod(shape)
            buffer = self._buffers.get((name, dtype))
            if buffer is None or buffer.numel() < numel:
                buffer = self._buffers[name, dtype] = torch.empty(numel, dtype=dtype, device=self.device)
            view = self._views[name, dtype, shape] = buffer[:numel].view(shape)
        return view


def known_finite(reduced: Tensor) -> bool:
    """Return whether a small tensor is known to be finite; False on an accelerator, where reading it would block."""
    return reduced.device.type == "cpu" and math.isfinite(reduced.sum().item())
