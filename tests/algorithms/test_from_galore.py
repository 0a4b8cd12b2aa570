"""What docs/galore.md promises: the same settings take GaLore's steps, and the weight decay is not lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_lowmem
from hf_lowmem.trainer.optim_args import recipe_for

SETTINGS = "rank=4, update_interval=6, reproject_factor=1, scale=0.25"
LR, DECAY, EPS = 1e-2, 0.1, 1e-6


def galore(weight: Tensor, grads: list[Tensor], rank: int, gap: int, scale: float) -> Tensor:
    """GaLore's AdamW as its paper has it: the leading singular vectors of the gradient, Adam on the projection."""
    right = weight.shape[0] >= weight.shape[1]
    m = v = torch.zeros(())
    for k, grad in enumerate(grads):
        if k % gap == 0:
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            basis = vh[:rank] if right else u[:, :rank]
        low = grad @ basis.T if right else basis.T @ grad
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low.square()
        step = LR * math.sqrt(1 - 0.999 ** (k + 1)) / (1 - 0.9 ** (k + 1)) * m / (v.sqrt() + EPS)
        weight = weight - scale * (step @ basis if right else basis @ step)
        weight = weight * (1 - LR * DECAY)
    return weight


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_the_same_settings_take_the_same_steps(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    # Within one gap gradients share a space of rank 4, so that the range finder and the SVD find the same one.
    inner = torch.randn(4, shape[1], generator=generator)
    outer = torch.randn(shape[0], 4, generator=generator)
    weight = torch.randn(shape, generator=generator)
    grads = [outer @ torch.diag(torch.rand(4, generator=generator) + 0.5) @ inner for _ in range(6)]
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(shape[1], shape[0], bias=False)})
    model["attn"].weight.data.copy_(weight)
    recipe = recipe_for("coap_adamw", SETTINGS, target_modules=["attn"])
    assert (recipe.rank, recipe.update_interval, recipe.reproject_factor, recipe.scale) == (4, 6, 1, 0.25)
    optimizer_cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(
        model, "coap_adamw", lr=LR, eps=EPS, weight_decay=DECAY, optim_args=SETTINGS, target_modules=["attn"]
    )
    optimizer = optimizer_cls(model.parameters(), **kwargs)
    for grad in grads:
        model["attn"].weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(model["attn"].weight.detach(), galore(weight, grads, 4, 6, 0.25), rtol=1e-3, atol=1e-4)


def test_the_trainers_weight_decay_is_kept(tmp_path) -> None:
    hf_lowmem.register()
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "norm": torch.nn.LayerNorm(8)})
    args = TrainingArguments(
        str(tmp_path),
        optim="coap_adamw",
        optim_args=SETTINGS,
        optim_target_modules=["attn"],
        weight_decay=DECAY,
        use_cpu=True,
        report_to="none",
    )
    optimizer = Trainer(model=model, args=args).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model["attn"].weight)] == DECAY
    assert decay[id(model["norm"].weight)] == decay[id(model["attn"].bias)] == 0
