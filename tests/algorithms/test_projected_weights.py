"""Which weights of real models COAP projects, on which side, and how a user says otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import hf_lowmem
from hf_lowmem.planner import Explanation
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.model_families import _GQA, FAMILIES, tiny_model

RANK = 4
BODY_ROLES = {"attention_query", "attention_key", "attention_value", "attention_output", "attention_qkv"}
BODY_ROLES |= {"mlp_gate", "mlp_up", "mlp_gate_up", "mlp_down"}

# Of the first layer of each family: (shape of proj, shape of exp_avg). Hidden 32, intermediate 48, 4 heads of which 2
# are keys' and values'; gpt_oss has heads of 16, the mixtures of experts have 4.
LAYERS: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (32, 4)),  # square: the inputs' side
        "model.layers.0.self_attn.k_proj.weight": ((4, 16), (4, 32)),  # (16, 32): the outputs' side
        "model.layers.0.self_attn.v_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.gate_proj.weight": ((4, 32), (48, 4)),
        "model.layers.0.mlp.up_proj.weight": ((4, 32), (48, 4)),
        "model.layers.0.mlp.down_proj.weight": ((4, 32), (4, 48)),
    },
    "gpt2": {  # stored (inputs, outputs)
        "transformer.h.0.attn.c_attn.weight": ((4, 32), (96, 4)),
        "transformer.h.0.attn.c_proj.weight": ((4, 32), (32, 4)),
        "transformer.h.0.mlp.c_fc.weight": ((4, 32), (128, 4)),
        "transformer.h.0.mlp.c_proj.weight": ((4, 32), (4, 128)),
    },
    "mixtral": {
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.k_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.v_proj.weight": ((4, 16), (4, 32)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 4, 32), (4, 96, 4)),
        "model.layers.0.mlp.experts.down_proj": ((4, 4, 32), (4, 4, 48)),
    },
    "gpt_oss": {  # experts stored (expert, inputs, outputs)
        "model.layers.0.self_attn.q_proj.weight": ((4, 32), (64, 4)),
        "model.layers.0.self_attn.k_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.v_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (4, 64)),
        "model.layers.0.mlp.experts.gate_up_proj": ((4, 4, 32), (4, 96, 4)),
        "model.layers.0.mlp.experts.down_proj": ((4, 4, 32), (4, 4, 48)),
    },
    "phi3": {  # fused weights are one matrix
        "model.layers.0.self_attn.qkv_proj.weight": ((4, 32), (64, 4)),
        "model.layers.0.self_attn.o_proj.weight": ((4, 32), (32, 4)),
        "model.layers.0.mlp.gate_up_proj.weight": ((4, 32), (96, 4)),
        "model.layers.0.mlp.down_proj.weight": ((4, 32), (4, 48)),
    },
    "vit": {
        "vit.layers.0.attention.q_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.k_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.v_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.attention.o_proj.weight": ((4, 32), (32, 4)),
        "vit.layers.0.mlp.fc1.weight": ((4, 32), (48, 4)),
        "vit.layers.0.mlp.fc2.weight": ((4, 32), (4, 48)),
    },
}
LAYERS["llama_tied"] = LAYERS["llama"]
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


def projected(explanation: Explanation) -> set[str]:
    return {row.name for row in explanation.rows if any(name.startswith("proj") for name in row.state)}


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


# -- target modules and rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "mlp.up_proj"], {"self_attn.q_proj.weight", "mlp.up_proj.weight"}),
        ([r"model\.layers\.\d+\.mlp\.down_proj"], {"mlp.down_proj.weight"}),
        (r".*\.(k|v)_proj", {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}),
        (r".*mlp.*", {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ("all-linear", {name.removeprefix("model.layers.0.") for name in LAYERS["llama"]}),
        ("all_linear", {name.removeprefix("model.layers.0.") for name in LAYERS["llama"]}),
    ],
)
def test_target_modules(targets: Any, expected: set[str]) -> None:
    explanation = hf_lowmem.explain(tiny_model("llama"), "coap_adamw", {"target_modules": targets})
    assert {name.removeprefix("model.layers.0.") for name in projected(explanation) if ".0." in name} == expected
    assert len(projected(explanation)) == 2 * len(expected)
    others = {row.why for row in explanation.rows if row.role in BODY_ROLES and row.name not in projected(explanation)}
    assert others <= {"not in target_modules"}
    recipe = recipe_for("coap_adamw", None, targets)
    assert recipe == recipe_for("coap_adamw", {"target_modules": targets})


def test_target_modules_may_name_a_head_but_no_embedding() -> None:
    assert projected(hf_lowmem.explain(tiny_model("llama"), "coap_adamw", {"target_modules": ["lm_head"]})) == {
        "lm_head.weight"
    }
    both = {"target_modules": ["embed_tokens", "q_proj"]}
    assert "model.embed_tokens.weight" not in projected(hf_lowmem.explain(tiny_model("llama"), "coap_adamw", both))


@pytest.mark.parametrize("targets", ["q_proj", ["query"], [], ["embed_tokens"], ["norm"]])
def test_target_modules_that_name_nothing(targets: Any) -> None:
    """A string is a regular expression of the whole name, as in transformers."""
    with pytest.raises(
        ValueError, match=r"target_modules=.* names no trained weight .*: names look like model\.layers\.0"
    ):
        hf_lowmem.explain(tiny_model("llama"), "coap_adamw", {"target_modules": targets})


def trainer(tmp_path: Path, optim: str, **arguments: Any) -> Trainer:
    hf_lowmem.register()
    tf.set_seed(0)
    ids = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(0))
    defaults: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    args = TrainingArguments(
        output_dir=str(tmp_path), optim=optim, disable_tqdm=True, save_strategy="no", **defaults, **arguments
    )
    return Trainer(model=tiny_model("llama"), args=args, train_dataset=[{"input_ids": i, "labels": i} for i in ids])


@pytest.mark.parametrize(
    ("targets", "count"), [(["q_proj"], 2), (r".*\.mlp\..*", 6), ("all-linear", 14), (None, 14), ("q_proj|", None)]
)
def test_the_trainers_target_modules(targets: Any, count: int | None, tmp_path: Path) -> None:
    mine = trainer(tmp_path, "coap_adamw", optim_target_modules=targets, optim_args="rank=4,update_interval=1")
    if count is None:
        with pytest.raises(ValueError, match="names no trained weight"):
            mine.create_optimizer()
        return
    mine.train()
    states = mine.optimizer.optimizer.state
    assert sum("proj" in state for state in states.values()) == count
    assert all(state["step"] == 2 for state in states.values())
    assert all(param.isfinite().all() for param in mine.model.parameters())


def test_target_modules_given_twice_must_agree(tmp_path: Path) -> None:
    options = json.dumps({"target_modules": ["k_proj"]})
    with pytest.raises(ValueError, match="differ: give one of them"):
        trainer(tmp_path, "coap_adamw", optim_target_modules=["q_proj"], optim_args=options).create_optimizer()
    trainer(tmp_path, "coap_adamw", optim_target_modules=["k_proj"], optim_args=options).create_optimizer()


@pytest.mark.parametrize("optim", ["slim_adamw", "lowmem_adamw_8bit"])
def test_target_modules_mean_nothing_to_other_names(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"optim_target_modules=\['q_proj'\] means nothing to '{optim}'"):
        trainer(tmp_path, optim, optim_target_modules=["q_proj"]).create_optimizer()
    with pytest.raises(ValueError, match="no key 'target_modules'"):
        recipe_for(optim, {"target_modules": ["q_proj"]})


def with_rules(tmp_path: Path, rules: dict[str, Any], **options: Any) -> Explanation:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules))
    return hf_lowmem.explain(tiny_model("llama"), "coap_adamw", {"rules": str(path), **options})


def test_rules(tmp_path: Path) -> None:
    exact = {
        "lm_head.weight": True,
        "model.embed_tokens.weight": 3,
        "model.layers.0.self_attn.q_proj.weight": False,
        "model.layers.1.self_attn.q_proj.weight": None,
        "model.layers.0.self_attn.k_proj.weight": 5,
        "model.layers.0.self_attn.v_proj.weight": False,
    }
    explanation = with_rules(tmp_path, {"exact": exact, "regex": [[r"mlp\.down", 7], ["mlp", "full"]]})
    rows = {row.name: row for row in explanation.rows}
    ranks = {name: rows[name].state["proj"][0][-2] for name in projected(explanation)}
    assert ranks == {
        "lm_head.weight": 8,
        "model.embed_tokens.weight": 3,
        "model.layers.0.self_attn.k_proj.weight": 5,
        "model.layers.1.self_attn.k_proj.weight": 4,
        "model.layers.1.self_attn.v_proj.weight": 4,
        "model.layers.0.self_attn.o_proj.weight": 8,
        "model.layers.1.self_attn.o_proj.weight": 8,
        "model.layers.0.mlp.down_proj.weight": 7,
        "model.layers.1.mlp.down_proj.weight": 7,
    }
    assert rows["lm_head.weight"].why == "rules file, by name"
    assert rows["model.layers.1.mlp.up_proj.weight"].why == r"rules file, 'mlp'"
    assert with_rules(tmp_path, {"lm_head.weight": 2}, rank=4), "a flat file"


def test_a_rank_by_name_goes_before_the_ratio_of_the_run(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    explanation = with_rules(tmp_path, {name: 5}, rank_ratio=2.0)
    ranks = {row.name: row.state["proj"][0][-2] for row in explanation.rows if "proj" in row.state}
    assert ranks.pop(name) == 5
    assert set(ranks.values()) == {8, 16}
    options = {"rules": str(tmp_path / "rules.json"), "rank_ratio": 2.0}
    model = tiny_model("llama")
    optimizer = hf_lowmem.build_optimizer(model, "coap_adamw", lr=1e-3, optim_args=options)
    plan = optimizer.plan_of(model.get_parameter(name))
    assert plan.specs((32, 32))["proj"].shape == (5, 32)


def test_rules_go_before_target_modules(tmp_path: Path) -> None:
    rules = {"lm_head.weight": True, "model.layers.0.self_attn.q_proj.weight": False}
    explanation = with_rules(tmp_path, rules, target_modules=["q_proj"], rank=4)
    assert projected(explanation) == {"lm_head.weight", "model.layers.1.self_attn.q_proj.weight"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"lm_head.weight": "half"}, "'lm_head.weight' has 'half', expected true, false"),
        ({"lm_head.weight": 0}, "has 0, expected true, false"),
        ({"lm_head.weight": 4.0}, "has 4.0, expected true, false"),
        ({"lm_head.weight": [0]}, r"has \[0\], expected true, false"),
        ({"lm_head.weight": 33}, r"of shape \(96, 32\) cannot be projected with rank 33: use a rank below 32"),
        ({"regex": [["_proj", 20]]}, r"k_proj.*cannot be projected with rank 20: use a rank below 16"),
        ({"model.norm.weight": True}, r"model\.norm\.weight of shape \(32,\) has no output and input axes to project"),
        ({"lm_heads.weight": True}, "matches no parameter: did you mean lm_head.weight"),
        ({"regex": [["attentions", False]]}, "'attentions' matches no parameter"),
        ({"regex": [["(", False]]}, "is not a regular expression"),
    ],
)
def test_rules_that_do_not_fit(rules: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        with_rules(tmp_path, rules)


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


def test_target_modules_that_the_rank_is_too_large_for() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 8)})
    block = nn.ModuleDict({"attn": model})
    options: dict[str, Any] = {"target_modules": ["k_proj"], "rank": 16}
    said = r"can be projected: attn\.k_proj\.weight, its smaller side is 8: rank 16 would keep all of it\.$"
    with pytest.raises(ValueError, match=said):
        hf_lowmem.build_optimizer(block, "coap_adamw", lr=1e-3, optim_args=options)
    assert projected(hf_lowmem.explain(block, "coap_adamw", {**options, "target_modules": ["_proj"]})) == {
        "attn.q_proj.weight"
    }
    model["k_proj"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"names no trained weight .*: names look like attn\.q_proj"):
        hf_lowmem.build_optimizer(block, "coap_adamw", lr=1e-3, optim_args=options)


def test_a_rule_that_says_true_takes_the_runs_rank_where_it_fits(tmp_path: Path) -> None:
    explanation = with_rules(tmp_path, {"regex": [["self_attn|embed_tokens", True], ["", False]]}, rank=20)
    names = {name.removeprefix("model.").removeprefix("layers.0.self_attn.") for name in projected(explanation)}
    assert names >= {"q_proj.weight", "o_proj.weight", "embed_tokens.weight"}
    assert len(names) == 5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"conv.weight": 16}, "a convolution takes no rank by rule"),
        ({"small.weight": True}, "cannot be projected: a small convolution"),
        ({"attn.weight": 8}, "cannot be projected with rank 8: use a rank below 8"),
        ({"norm.weight": True}, "has no output and input axes"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_an_error(rule: dict[str, Any], message: str, tmp_path: Path) -> None:
    layers = {"conv": nn.Conv2d(64, 64, 3), "small": nn.Conv2d(8, 8, 3), "attn": nn.Linear(8, 8)}
    model = nn.ModuleDict({**layers, "norm": nn.LayerNorm(8)})
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rule))
    with pytest.raises(ValueError, match=f"rules file, by name: .*{message}"):
        hf_lowmem.explain(model, "coap_adamw", {"rules": str(path)})


@pytest.mark.parametrize("targets", ["(attn", ["*proj"]])
def test_target_modules_that_are_no_regular_expression(targets: Any) -> None:
    with pytest.raises(ValueError, match="is not a regular expression"):
        hf_lowmem.explain(nn.Linear(4, 4), "coap_adamw", {"target_modules": targets})


def test_projecting_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    hf_lowmem.build_optimizer(nn.Sequential(nn.Linear(8, 8)), "coap_adamw", lr=1e-3)
    assert "coap_adamw projects no weight of this model" in caplog.text
