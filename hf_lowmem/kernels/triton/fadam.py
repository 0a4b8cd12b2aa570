"""FAdam by Triton kernels: a launch for each pass over a weight, of which none waits for the host."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.codecs import BLOCK_SIZES, BFloat16, Float32, Int8Blockwise
from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.in_place.fadam import has_fisher_moments, in_passes
from hf_lowmem.kernels.in_place.updates import entries_of_matrix, matrix_dims
from hf_lowmem.kernels.passes import RulePasses
from hf_lowmem.kernels.triton.launch import numbers_on_device
from hf_lowmem.kernels.triton.variants import BLOCK, WEIGHTS
from hf_lowmem.update_rules import unbiased_decay

TILE = 1 << 11  # entries of a program
WARPS = 4


@cache
def fadam_kernels() -> Any:
    """Return the module of the kernels, which imports Triton."""
    from hf_lowmem.kernels.triton import fadam_kernels

    return fadam_kernels


def covers(step: ParamStep) -> bool:
    """Return whether the kernels step a parameter: a gradient of its dtype, and whole 8-bit blocks."""
    param, grad, codec = step.param, step.grad, step.plan.codec
    if param.dtype not in WEIGHTS or grad.dtype != param.dtype or not has_fisher_moments(step):
        return False
    if not (param.is_contiguous() and grad.is_contiguous()):
        return False
    if isinstance(codec, Int8Blockwise):
        whole_blocks = codec.block_size in BLOCK_SIZES and codec.ragged_row(tuple(param.shape)) is None
        return whole_blocks and (not step.plan.stacked or codec.row_axes < param.ndim)
    return type(codec) in (Float32, BFloat16)


class InKernels:
    """The sweeps as launches."""

    def __init__(self, step: ParamStep, hyper: Hyper) -> None:
        weight, state, shape, device = step.weight(), step.state, tuple(step.param.shape), step.param.device
        self.device, self.count = device, shape[0] if step.plan.stacked else 1
        self.entries = math.prod(shape[1:] if step.plan.stacked else shape)
        block = step.plan.codec.block_size if isinstance(step.plan.codec, Int8Blockwise) else BLOCK
        sizes = {"BLOCKS": TILE // block, "BLOCK": block}
        self.options: dict[str, Any] = {"CLIP": step.clip is not None, **sizes}
        self.options |= {"num_warps": WARPS, "enable_fp_fusion": True}
        rounding = "nearest" if step.param.dtype == torch.float32 else step.plan.rounding.kind
        flags = {"ROUNDING": rounding, "DECAYS": hyper.weight_decay > 0, "MASK_DECAY": hyper.flags["mask_decay"]}
        self.more_options = self.options | flags
        number = step.step.double() if isinstance(step.step, Tensor) else step.step
        keep = unbiased_decay(hyper.beta2, number)
        self.numbers = numbers_on_device(
            (
                *(hyper.lr, hyper.lr * hyper.weight_decay, 1 - hyper.beta1, keep, 1 - keep, hyper.eps),
                *(
                    hyper.flags["clip_threshold"],
                    entries_of_matrix(step),
                    0 if weight.noise_key is None else weight.noise_key,
                ),
            ),
            device,
        )
        fims, averages = state["fim"], state["exp_avg"]
        self.grads = (step.grad, self.numbers if step.clip is None else step.clip.scale)  # not read without clipping
        self.weights = (weight.data, weight.data if weight.kahan_comp is None else weight.kahan_comp)
        self.fims = (fims, state.get("fim_absmax", fims))
        self.averages = (averages, state.get("exp_avg_absmax", averages))
        self.shape = [1 if axis in matrix_dims(step) else size for axis, size in enumerate(shape)]
        self.sums: list[Tensor] = []

    def sum_gradient(self) -> Tensor:
        parts = self._parts(1)
        self._launch("sum_gradient", *self.grads, *parts, **self.options)
        return self._added_up(parts)[0]

    def sum_quotients(self) -> list[Tensor]:
        decays = self.more_options["DECAYS"]
        parts = self._parts(2 if decays else 1)
        pair = parts if decays else parts * 2
        addresses = (*self.weights, *self.grads, *self.fims, self.numbers, *self.sums, *pair)
        self._launch("sum_quotients", *addresses, **self.more_options)
        return self._added_up(parts)

    def update(self) -> None:
        energies, natural, *decay = self.sums
        sums = (energies, natural, *(decay or [natural]))  # the last is not read without weight decay
        addresses = (*self.weights, *self.grads, *self.fims, *self.averages, self.numbers, *sums)
        self._launch("update", *addresses, **self.more_options)

    def _launch(self, kernel: str, *arguments: Tensor, **options: Any) -> None:
        grid = (-(-self.entries // TILE), self.count)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            getattr(fadam_kernels(), kernel)[grid](*arguments, self.entries, **options)

    def _parts(self, number: int) -> list[Tensor]:
        """Return room for partial sums, one for each program."""
        programs = (self.count, -(-self.entries // TILE))
        return [torch.empty(programs, dtype=torch.float32, device=self.device) for _ in range(number)]

    def _added_up(self, parts: list[Tensor]) -> list[Tensor]:
        """Keep and return the sums of the partial ones, of the shape of one number per weight of the stack."""
        found = [part.sum(1).view(self.shape) for part in parts]
        self.sums += found
        return found


FADAM = RulePasses(covers, in_passes(InKernels))
