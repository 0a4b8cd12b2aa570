"""Temporaries that live for one optimizer step and are reused from tile to tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Named buffers on one device, grown to the largest request; a fresh temporary per use would cost page faults."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, Sequence[int]], Tensor] = {}

    def get(self, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialized contiguous tensor; its content lasts until the same name is asked for again."""
        view = self._views.get((name, dtype, shape))
        if view is None:
            numel = math.prod(shape)
            buffer = self._buffers.get((name, dtype))
            if buffer is None or buffer.numel() < numel:
                buffer = self._buffers[name, dtype] = torch.empty(numel, dtype=dtype, device=self.device)
            view = self._views[name, dtype, shape] = buffer[:numel].view(shape)
        return view


def known_finite(reduced: Tensor) -> bool:
    """Whether a small tensor surely holds no NaN or Inf; False where asking would make an accelerator wait."""
    return reduced.device.type == "cpu" and math.isfinite(reduced.sum().item())
