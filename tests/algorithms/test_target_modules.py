"""How a user says which weights COAP projects: target modules, and rules files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lowmem
from hf_lowmem.planner import Explanation
from hf_lowmem.trainer.optim_args import recipe_for
from tests.support.model_families import tiny_model
from tests.support.projected_layers import BODY_ROLES, LAYERS, projected


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
