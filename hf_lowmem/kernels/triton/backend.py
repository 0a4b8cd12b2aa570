"""Steps on a GPU by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.columns import SCALARS
from hf_lowmem.kernels.means import Sums
from hf_lowmem.kernels.registry import Backend, norms_of
from hf_lowmem.kernels.triton.launch import Launch, launches_of, scalars_on_device
from hf_lowmem.kernels.triton.tuning import generation
from hf_lowmem.kernels.triton.variants import ALIGN, is_covered, triton_kernels


class Triton(Backend):
    """Steps by Triton kernels of contiguous weights whose gradients have the weight's dtype.

    Means that one program can find are found by the step itself; those of larger groups take two launches before it.
    """

    name = "triton"
    devices = ("cuda",)
    takes_numbers_on_device = True

    def available(self) -> bool:
        return triton_kernels() is not None

    def covers(self, rule: str, step: ParamStep) -> bool:
        return is_covered(rule, step) and self.available()

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        self._launch(bucket, hyper, averaged=False)

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        self._launch(bucket, hyper, averaged=True)

    def reduce(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        sums = Sums.of(bucket)
        bucket = sums.taking(bucket)
        gradients, device = bucket.gradient_addresses(), bucket.device
        scalars = torch.zeros(len(bucket.params), len(SCALARS), dtype=torch.float64, device=device)
        scalars[:, SCALARS.index("new_2")] = 1.0
        with torch.cuda.device(device if device.type == "cuda" else -1):
            for launch in self._launches(bucket, gradients, averaged=True):
                launch.average(bucket, gradients, scalars)
        return sums.read()

    def _launch(self, bucket: Bucket, hyper: Hyper, averaged: bool) -> None:
        gradients, device = bucket.gradient_addresses(), bucket.device
        with torch.cuda.device(device if device.type == "cuda" else -1):
            scalars = scalars_on_device(bucket, hyper)
            for launch in self._launches(bucket, gradients, averaged):
                launch.step(bucket, gradients, scalars, averaged)

    def square_norms(self, bucket: Bucket, kept: dict[Any, Any]) -> list[Tensor]:
        gradients, device, found = bucket.gradient_addresses(), bucket.device, []
        left = set(range(len(bucket.grads)))
        with torch.cuda.device(device if device.type == "cuda" else -1):
            for launch in self._launches(bucket, gradients, averaged=False):
                if launch.has_whole_weights:
                    found.append(launch.square_norm(bucket, gradients, kept))
                    left -= set(launch.weights.tolist())
        return found + norms_of([bucket.grads[number] for number in sorted(left)])

    @staticmethod
    def _launches(bucket: Bucket, gradients: list[int], averaged: bool) -> list[Launch]:
        """Return the launches of a bucket, planned anew where the alignment of a gradient or the tiles changed."""
        planned_for = (generation(), [address % ALIGN == 0 for address in gradients])
        kept = bucket.kept.get(("launches", averaged))
        if kept is None or kept[0] != planned_for:
            kept = bucket.kept["launches", averaged] = (planned_for, launches_of(bucket, averaged))
        launches: list[Launch] = kept[1]
        return launches


TRITON = Triton()
