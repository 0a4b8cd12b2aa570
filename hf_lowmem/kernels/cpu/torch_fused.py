"""AdamW in float32 on the CPU, stepped by torch's own fused kernel."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from hf_lowmem.codecs import Float32
from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.parts import second_moment
from hf_lowmem.kernels.registry import Backend, find_backend
from hf_lowmem.kernels.scalars import SCALARS


class TorchFused(Backend):
    """AdamW where weight, gradient and both whole moments are contiguous float32; clipped steps go to the next one."""

    name = "torch_fused"
    devices = ("cpu",)

    def covers(self, rule: str, step: ParamStep) -> bool:
        if second_moment(rule, step.plan) != "full" or type(step.plan.codec) is not Float32:
            return False
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in (step.param, step.grad))
        return plain and not isinstance(step.step, Tensor)

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        self.step(bucket, hyper)

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        if bucket.clip is not None:
            backend = find_backend(bucket.rule, next(iter(bucket)), after=self.name)
            backend.step(bucket, hyper)
            return
        by_step: dict[float, list[ParamStep]] = defaultdict(list)
        for each in bucket:
            by_step[each.step].append(each)
        for number, steps in by_step.items():
            fused(bucket.rule, steps, number, hyper)


def fused(rule: str, steps: list[ParamStep], number: float, hyper: Hyper) -> None:
    """Step parameters that are at the same step.

    The hyperparameters of `transformers_adamw` are converted to those of torch's AdamW.
    """
    scalars, root = SCALARS[rule](number, hyper), math.sqrt(1 - hyper.beta2**number)
    lr, weight_decay, eps = hyper.lr, hyper.weight_decay, hyper.eps
    if rule != "adamw":
        lr = scalars.step_size * (1 - hyper.beta1**number) / root
        weight_decay = (1 - scalars.decay) / lr if lr else 0.0
        eps = scalars.eps / root
    count = torch.tensor(number, dtype=torch.float32, device="cpu")
    torch._fused_adamw_(
        [step.param for step in steps],
        [step.grad for step in steps],
        [step.state["exp_avg"] for step in steps],
        [step.state["exp_avg_sq"] for step in steps],
        [],
        [count] * len(steps),
        amsgrad=False,
        maximize=False,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )


TORCH_FUSED = TorchFused()
