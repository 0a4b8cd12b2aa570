"""Which weights of real models COAP projects, on which side, and what that takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_lowmem
from tests.support.model_families import _GQA, FAMILIES, tiny_model
from tests.support.projected_layers import BODY_ROLES, LAYERS, projected

RANK = 4
# Of each family, matrices that are not projected, with what is said of them.
LEFT_OUT: dict[str, dict[str, tuple[str, str]]] = {
    "llama": {
        "model.embed_tokens.weight": ("token_embedding", "not of the body"),
        "lm_head.weight": ("lm_head", "not of the body"),
        "model.norm.weight": ("norm", "in LlamaRMSNorm"),
    },
    "llama_tied": {"model.embed_tokens.weight": ("token_embedding", "not of the body")},
    "gpt2": {
        "transformer.wte.weight": ("token_embedding", "not of the body"),
        "transformer.wpe.weight": ("position_embedding", "not of the body"),
        "transformer.h.0.attn.c_attn.bias": ("bias", "leaf name"),
    },
    "mixtral": {"model.layers.0.mlp.gate.weight": ("router", "not of the body")},
    "gpt_oss": {
        "model.layers.0.mlp.router.weight": ("router", "not of the body"),
        "model.layers.0.mlp.experts.gate_up_proj_bias": ("bias", "leaf name"),  # a matrix by its shape
        "model.layers.0.self_attn.sinks": ("vector", "at most one axis"),
    },
    "phi3": {"lm_head.weight": ("lm_head", "not of the body")},
    "vit": {
        "vit.embeddings.patch_embeddings.projection.weight": ("patch_conv", "not of the body"),
        "vit.embeddings.position_embeddings": ("unknown", "raw parameter of ViTEmbeddings"),
        "classifier.weight": ("classifier", "not of the body"),
    },
}


def model_of(family: str) -> nn.Module:
    if family == "llama_tied":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**_GQA, tie_word_embeddings=True))
    return tiny_model(family)


@pytest.mark.parametrize("family", LAYERS)
def test_which_weights_are_projected(family: str) -> None:
    explanation = hf_lowmem.explain(model_of(family), "coap_adamw", {"rank": RANK})
    rows = {row.name: row for row in explanation.rows}
    layer = {name for name in projected(explanation) if ".0." in name}
    assert layer == set(LAYERS[family])
    assert {name for name in projected(explanation) if ".1." in name} == {n.replace(".0.", ".1.", 1) for n in layer}
    assert len(projected(explanation)) == 2 * len(layer), "weights outside of the layers"
    for name, (proj, exp_avg) in LAYERS[family].items():
        state = {key: shape for key, (shape, _) in rows[name].state.items()}
        expected = {"step": (), "proj_count": (), "proj": proj, "exp_avg": exp_avg, "exp_avg_sq": exp_avg}
        assert state == expected, name
        experts = f", {proj[0]} experts" if len(proj) == 3 else ""
        side = f"{proj[-1]} {'inputs' if exp_avg[-1] == RANK else 'outputs'}"
        assert rows[name].compressed == f"rank 4 of {side}{experts}"
        assert rows[name].role in BODY_ROLES
        assert rows[name].why == ("a rank for each expert" if experts else "low rank")
    for name, (role, why) in LEFT_OUT[family].items():
        row = rows[name]
        assert (row.role, row.why, row.compressed) == (role, why, "full"), name
        assert row.state["exp_avg"][0] == row.state["exp_avg_sq"][0] == row.shape


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"target_modules": "all_linear"}])
def test_lora_factors_are_not_projected(options: dict[str, Any]) -> None:
    explanation = hf_lowmem.explain(tiny_model("llama_lora"), "coap_adamw", options)
    assert not projected(explanation)
    factors = [row for row in explanation.rows if row.role.startswith("lora_")]
    assert factors
    assert {row.why for row in factors} <= {"not of the body", "not in target_modules"}
    frozen = [row for row in explanation.rows if not row.trainable]
    assert frozen
    assert all(not row.state for row in frozen)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_adafactors_statistics_are_of_the_projected_matrix(family: str) -> None:
    rows = hf_lowmem.explain(model_of(family), "coap_adafactor", {"rank": RANK}).rows
    for row in rows:
        if row.name in LAYERS[family]:
            _, exp_avg = LAYERS[family][row.name]
            assert row.state["exp_avg_sq_row"][0] == exp_avg[:-1]
            assert row.state["exp_avg_sq_col"][0] == (*exp_avg[:-2], exp_avg[-1])


def low_rank_gradient(param: Tensor, seed: int) -> Tensor:
    """A gradient of rank RANK, of each matrix in a stack."""
    generator = torch.Generator().manual_seed(seed)
    *stack, m, n = param.shape
    left, right = (torch.randn(*stack, *size, generator=generator) for size in ((m, RANK), (RANK, n)))
    return left @ right


@pytest.mark.parametrize("optim", ["coap_adamw", "coap_adafactor_8bit"])
@pytest.mark.parametrize("family", LAYERS)
def test_a_basis_captures_a_gradient_of_its_rank(family: str, optim: str) -> None:
    """So it lies on the right side of each weight, and is each expert's own."""
    model = model_of(family)
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-3, optim_args={"rank": RANK, "proj_bits": 32})
    for seed, param in enumerate(model.parameters()):
        param.grad = low_rank_gradient(param, seed) if param.ndim in (2, 3) else torch.randn_like(param)
    optimizer.step()
    names = {id(param): name for name, param in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            state, name = optimizer.state[param], names[id(param)]
            assert param.isfinite().all()
            if name not in LAYERS[family]:
                continue
            seen.add(name)
            basis = state["proj"]
            assert (basis @ basis.mT - torch.eye(RANK)).abs().max() < 1e-5, name
            projection = optimizer.plan_of(param).projection
            small = projection.project(state, param.grad)
            assert tuple(small.shape) == LAYERS[family][name][1]
            torch.testing.assert_close(projection.project_back(state, small), param.grad, rtol=1e-3, atol=1e-3)
            if basis.ndim == 3:
                shares = basis[0] @ basis[1].mT
                assert torch.linalg.matrix_norm(shares, 2) < 0.999, "experts share a basis"
    assert seen == set(LAYERS[family])


@pytest.mark.parametrize("family", [*LAYERS, "llama_lora"])
def test_a_real_gradient_is_stepped(family: str) -> None:
    model = model_of(family)
    optimizer = hf_lowmem.build_optimizer(model, "coap_adamw", lr=1e-3, optim_args={"update_interval": 1})
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        if family == "vit":
            loss = model(torch.randn(2, 3, 16, 16, generator=generator), labels=torch.tensor([0, 1])).loss
        else:
            ids = torch.randint(3, 96, (2, 12), generator=generator)
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        assert param.isfinite().all()
        assert torch.equal(param, before[name]) is not param.requires_grad, name


@pytest.mark.parametrize("optim", ["coap_adamw", "coap_adafactor_8bit"])
@pytest.mark.parametrize("rank", [16, 17, 256])
def test_a_weight_too_small_for_the_rank_is_left_whole(
    rank: int, optim: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    rows = {row.name: row for row in hf_lowmem.explain(model, optim, {"rank": rank}).rows}
    key, query = (rows[f"model.layers.0.self_attn.{which}_proj.weight"] for which in "kq")
    assert key.why == f"its smaller side is 16: rank {rank} would keep all of it"
    assert key.state["exp_avg"][0] == key.shape
    assert ("proj" in query.state) == (rank < 32)
    assert not caplog.records
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-3, optim_args={"rank": rank})
    names = [row.name for row in rows.values() if "would keep all of it" in row.why]
    assert len(names) == (4 if rank < 32 else 14)
    (line,) = [record.message for record in caplog.records if "unprojected" in record.message]
    assert f": {len(names)}, such as {names[0]} (its smaller side is {min(rows[names[0]].shape)}: rank {rank}" in line
    ids = torch.arange(3, 15).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    states = {name: optimizer.state[param] for name, param in model.named_parameters()}
    assert {name for name in names if "proj" in states[name]} == set()


def test_a_stack_too_small_for_the_rank_is_left_whole() -> None:
    rows = {row.name: row for row in hf_lowmem.explain(tiny_model("mixtral"), "coap_adafactor", {"rank": 40}).rows}
    experts = rows["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.why == "its smaller side is 32: rank 40 would keep all of it"
    assert experts.state["exp_avg_sq_row"][0] == experts.shape[:2]  # each expert's own


def test_convolutions() -> None:
    model = nn.ModuleDict(
        {"down": nn.Conv2d(64, 64, 3), "small": nn.Conv2d(8, 8, 3), "odd": nn.Conv2d(64, 64, 3, groups=4)}
    )

    def why(**options: Any) -> dict[str, str]:
        return {row.name: row.why for row in hf_lowmem.explain(model, "coap_adamw", options).rows}

    rows = {row.name: row for row in hf_lowmem.explain(model, "coap_adamw").rows}
    assert rows["down.weight"].compressed == "Tucker 32 of 64 x 32 of 64 channels"
    assert rows["down.weight"].state["exp_avg"][0] == (32, 288)
    assert {name for name, row in rows.items() if "proj_0" in row.state} == {"down.weight"}
    assert why()["small.weight"] == "a small convolution"
    assert why()["odd.weight"] == "grouped convolution"
    assert why(rank=4)["down.weight"] == "a convolution, and rank is given without conv_rank_ratio"
    assert why(rank=4, conv_rank_ratio=2)["down.weight"] == "low rank"


# -- figures of the paper -------------------------------------------------------------------------------------------

MIB = 2**20


def llama(hidden: int, intermediate: int, layers: int) -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=32,
    )
    with torch.device("meta"):
        return tf.LlamaForCausalLM(config)


def test_llama_1b_takes_what_the_authors_print() -> None:
    """README of bytedance/coap: 1988.34 MB, for moments and bases in bfloat16; AdamW in bfloat16: 61 % more."""
    model = llama(2048, 5461, 24)
    explanation = hf_lowmem.explain(model, "coap_adamw", {"rank": 512})
    numbers = sum(
        math.prod(shape)
        for row in explanation.rows
        for name, (shape, _) in row.state.items()
        if name in ("exp_avg", "exp_avg_sq", "proj")
    )
    assert 2 * numbers / MIB == pytest.approx(1988.34, abs=0.005)
    assert 2 * 2 * explanation.numel / MIB == pytest.approx(5108.2, abs=0.05)


def test_llama_7b_in_8_bit_takes_what_the_authors_print() -> None:
    """README of bytedance/coap: 5380.51 MB, which leaves the scales of the 8-bit blocks out."""
    model = llama(4096, 11008, 32)
    options = {"rank": 1024, "embedding_bits": 8, "min_8bit_size": 0, "proj_bits": 16}
    explanation = hf_lowmem.explain(model, "coap_adamw_8bit", options)
    nbytes = sum(
        math.prod(shape) * getattr(torch, kind).itemsize
        for row in explanation.rows
        for name, (shape, kind) in row.state.items()
        if name not in ("step", "proj_count") and not name.endswith("_absmax")
    )
    assert nbytes / MIB == pytest.approx(5380.51, abs=0.005)
    assert 2 * 2 * explanation.numel / MIB == pytest.approx(25705, abs=0.5)


def test_every_family_with_matrices_has_some_projected() -> None:
    for family in FAMILIES:
        assert projected(hf_lowmem.explain(tiny_model(family), "coap_adamw")), family
