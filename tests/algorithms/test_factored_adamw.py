"""Factored AdamW against its equations written out in float64, and the roles that it factors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hf_lowmem
from hf_lowmem.algorithms import FactoredAdamW
from hf_lowmem.roles import assign_roles
from tests.support.model_families import VOCAB_SIZE, tiny_model

LR, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """Return the matrices of a weight of Phi-3, GPT-2 or Mixtral that are factored by themselves, as views."""
    if name.endswith("qkv_proj.weight"):  # 4 heads of queries, 2 of keys and 2 of values, of 8 rows each
        return list(tensor.split([32, 16, 16]))
    if name.endswith("c_attn.weight"):
        return list(tensor.split(32, dim=1))
    if "gate_up_proj" in name:
        return [half for expert in (tensor if tensor.ndim == 3 else [tensor]) for half in expert.chunk(2)]
    return list(tensor) if tensor.ndim == 3 else [tensor]


@pytest.mark.parametrize(
    ("family", "limit"), [("llama", None), ("phi3", None), ("gpt2", 0.3), ("mixtral", None), ("llama", math.inf)]
)
def test_steps_are_those_of_the_equations(family: str, limit: float | None) -> None:
    torch.manual_seed(0)
    model = tiny_model(family)
    optim = hf_lowmem.build_optimizer(
        model,
        "factored_adamw",
        lr=LR,
        betas=(B1, B2),
        eps=EPS,
        weight_decay=DECAY,
        optim_args=None if limit is None else f"update_limit={limit}",
    )
    limit = limit or (1 - B1) / math.sqrt((1 - B2) * (1 - B1 * B1 / B2))
    decay = {id(p): group["weight_decay"] for group in optim.param_groups for p in group["params"]}
    full = {name for name, role in ((r.name, r) for _, r in assign_roles(model)) if role.fan_out is None}
    full |= {role.name for _, role in assign_roles(model) if role.role == "router"}
    weights = {name: param.detach().double().clone() for name, param in model.named_parameters()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    for t in range(1, 4):
        ids = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        for name, param in model.named_parameters():
            g, (m, r, c), w = param.grad.double(), moments[name], weights[name]
            m.lerp_(g, 1 - B1)
            if name in full:
                r.lerp_(g.square(), 1 - B2)
                v = r
            else:
                v = torch.zeros_like(g)
                for square, row, col, part in zip(*(matrices(name, x) for x in (g.square(), r, c, v)), strict=True):
                    row.lerp_(square.mean(1, keepdim=True).expand_as(row), 1 - B2)
                    col.lerp_(square.mean(0, keepdim=True).expand_as(col), 1 - B2)
                    part.copy_(row * col / row.mean().clamp(min=1e-300))
            m_hat, v_hat = m / (1 - B1**t), v / (1 - B2**t)
            if name not in full:
                v_hat = v_hat + (m_hat / limit).square()
            update = m_hat / (v_hat.sqrt() + EPS)
            assert name in full or update.abs().max() <= limit
            w.mul_(1 - LR * decay[id(param)]).sub_(LR * update)
        optim.step()
        optim.zero_grad()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.double(), weights[name], rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_roles_that_are_kept_in_full_and_lora() -> None:
    rows = {row.name: row for row in hf_lowmem.explain(tiny_model("mixtral"), "factored_adamw").rows}
    names = [name for name, row in rows.items() if "exp_avg_sq" in row.state]
    assert names
    assert all("norm" in name or name.endswith("gate.weight") for name in names)


@pytest.mark.parametrize("backend", ["rule", "tiles", "cpu"])
@pytest.mark.parametrize("options", [{}, {"axes": (1,)}, {"axes": (0,)}], ids=str)
@pytest.mark.parametrize("size", [1e18, 1e19])
def test_sums_of_squares_that_overflow_make_nothing_nan(backend: str, options: dict, size: float) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = FactoredAdamW([weight], lr=1e-2, **options)
    for step in range(3):
        weight.grad = torch.randn(64, 128) * (size if step == 1 else 1)
        with hf_lowmem.kernels.forced(backend):
            optimizer.step()
    assert 0.001 < weight.abs().max() < 0.2  # as AdamW's; without the clamp, nothing or everything moves
    assert all(tensor.isfinite().all() for tensor in optimizer.state[weight].values())


@pytest.mark.parametrize("rows", [40, 1000])
def test_rows_keep_their_estimates_where_a_weight_is_resized(rows: int) -> None:
    def estimate(state: dict[str, Tensor]) -> Tensor:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return (row * col / row.mean())[:40]

    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(100, 32))
    optimizer = FactoredAdamW([weight], lr=1e-3)
    for _ in range(5):
        weight.grad = torch.randn(100, 32)
        optimizer.step()
    before = estimate(optimizer.state[weight])
    weight.data = torch.zeros(rows, 32)
    optimizer.resize_state()
    torch.testing.assert_close(estimate(optimizer.state[weight]), before)
