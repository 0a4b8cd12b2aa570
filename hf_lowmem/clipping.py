"""Clipping by the step: gradients are read once for their norm, and scaled as the step reads them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Clip
from hf_lowmem.kernels.triton.launch import capturing
from hf_lowmem.log import get_logger
from hf_lowmem.sharding import Groups, add_up

logger = get_logger(__name__)

Spreads = Mapping[Groups, Tensor]  # the same in the same order on all processes; each with a zero to begin a sum with


class Clipping:
    """The clipping that the next step applies."""

    def __init__(self) -> None:
        self._asked = self._captured = False
        self.forget()

    def forget(self) -> None:
        """Forget a clipping whose step was taken, or will not be."""
        self._clips: dict[tuple[torch.device, torch.dtype], Clip] = {}  # by device and arithmetic
        self._gradients: dict[int, weakref.ref[Tensor]] = {}  # by the parameter's id

    def find(self, buckets: Sequence[Bucket], spreads: Spreads, max_norm: float) -> Tensor:
        """Return the 2-norm of all gradients, 0-D; with a finite `max_norm` the next step clips them to it.

        Squares, finite or not, are summed in float32, or in float64 where a gradient is float64, as the norm is then.

        Args:
            spreads: the process groups that parameters are cut over.
        """
        self._asked = True
        kept: dict[Any, Any] = {}
        squares: dict[Groups, list[Tensor]] = {groups: [] for groups in ((), *spreads)}
        for bucket in buckets:
            squares[bucket.spread] += bucket.backend.square_norms(bucket, kept)
        norm = total([*squares[()], *summed_over_shards(squares, spreads)])
        if max_norm < float("inf"):
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            kinds = {(bucket.device, bucket.arithmetic) for bucket in buckets}
            self._clips = {
                kind: Clip(moved(scale, kind[0]).to(torch.promote_types(torch.float32, kind[1])), kept)
                for kind in kinds
            }
            params = [param for bucket in buckets for param in bucket.owners]
            self._gradients = {id(param): weakref.ref(param.grad) for param in params if param.grad is not None}
            self._captured = any(capturing(device) for device, _ in self._clips)
        return norm

    def applied(self, bucket: Bucket) -> Iterator[Bucket]:
        """Set how a bucket is clipped, and return it; or its parts, where some of its gradients have been replaced."""
        clip = self._clips.get((bucket.device, bucket.arithmetic))
        bucket.clip = None
        mine = [self._clips_gradient(param) for param in bucket.owners] if clip else [False]
        if all(mine) or not any(mine):
            bucket.clip = clip if any(mine) else None
            yield bucket
            return
        for wanted in (True, False):
            part = bucket.part([number for number, clipped in enumerate(mine) if clipped is wanted])
            part.clip = clip if wanted else None
            yield part

    def _clips_gradient(self, param: Tensor) -> bool:
        found = self._gradients.get(id(param))
        return found is not None and found() is param.grad

    def check_capture(self) -> None:
        """Refuse a CUDA graph that captures a step but not its clipping, or the other way round.

        Raises:
            RuntimeError: it does.
        """
        if self._clips and any(capturing(device) for device, _ in self._clips) != self._captured:
            raise RuntimeError(
                "clip_grad_norm_ was called outside of the CUDA graph that captures its step: capture both in one."
            )

    def warn_if_missed(self, groups: Sequence[dict[str, Any]]) -> None:
        """Warn once if `fused_clip` is set but nothing has asked for clipping.

        A step without a learning rate changes nothing: torch takes one to make the state that a checkpoint is read
        into.
        """
        if self._asked or not any(group["fused_clip"] for group in groups):
            return
        if any(float(group["lr"]) for group in groups):
            self._asked = True
            logger.warning(
                "fused_clip=true, but the optimizer was not asked to clip: hf_lowmem.register() lets a Trainer's "
                "max_grad_norm do so, or call optimizer.clip_grad_norm_(max_norm) before each step."
            )


def summed_over_shards(squares: Mapping[Groups, Sequence[Tensor]], spreads: Spreads) -> list[Tensor]:
    """Return the sums of the squares of all shards, of which those here may be none."""
    sums = []
    for groups, zero in spreads.items():
        found = [moved(square, zero.device).to(zero.dtype) for square in squares[groups]]
        sums.append(torch.stack([zero, *found]).sum())
    add_up(zip(sums, spreads, strict=True))
    return sums


def total(squares: Sequence[Tensor]) -> Tensor:
    """Return the root of the sum of 0-D tensors, on the device of the first, in the widest of their dtypes."""
    if not squares:
        return torch.zeros((), dtype=torch.float32)
    widest = torch.float64 if any(square.dtype == torch.float64 for square in squares) else torch.float32
    return torch.stack([moved(square, squares[0].device).to(widest) for square in squares]).sum().sqrt()


def moved(number: Tensor, device: torch.device) -> Tensor:
    """Return a 0-D tensor on another device, which the host waits for only where it will read it."""
    return number.to(device, non_blocking=device.type != "cpu")
