"""Rules files and the table that shows what came of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hf_lowmem
from tests.support.model_families import tiny_model


def explained(model: torch.nn.Module, path: Path, rules: dict) -> dict[str, object]:
    path.write_text(json.dumps(rules))
    table = hf_lowmem.explain(model, "slim_adamw", {"rules": str(path)})
    return {row.name: row for row in table.rows}


def second_moment(row) -> tuple[int, ...]:
    return row.state["exp_avg_sq"][0]


def test_exact_goes_before_regex_before_detection(tmp_path: Path) -> None:
    rules = {
        "exact": {"model.layers.0.self_attn.q_proj.weight": None, "lm_head.weight": [0, 1]},
        "regex": [["q_proj", [0]], [r"mlp\.", "full"]],
    }
    rows = explained(tiny_model("llama"), tmp_path / "rules.json", rules)
    first, second = (rows[f"model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 1))
    assert second_moment(first) == first.shape
    assert "by name" in first.why
    assert second_moment(second) == (1, second.shape[1])
    assert second_moment(rows["lm_head.weight"]) == (1, 1)
    assert second_moment(rows["model.layers.1.mlp.up_proj.weight"]) == rows["model.layers.1.mlp.up_proj.weight"].shape
    assert second_moment(rows["model.layers.1.self_attn.k_proj.weight"])[1] == 1


def test_flat_file_of_the_authors(tmp_path: Path) -> None:
    rules = {"_orig_mod.model.layers.0.mlp.down_proj.weight": [1], "model.norm.weight": None}
    rows = explained(tiny_model("llama"), tmp_path / "rules.json", rules)
    row = rows["model.layers.0.mlp.down_proj.weight"]
    assert second_moment(row) == (row.shape[0], 1)


def test_fallback_for_unknown_roles(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"mystery": torch.nn.Linear(8, 4)})
    assert second_moment(explained(model, tmp_path / "a.json", {"exact": {}, "regex": []})["mystery.weight"]) == (4, 8)
    assert second_moment(explained(model, tmp_path / "b.json", {"unknown": [1]})["mystery.weight"]) == (4, 1)


def test_a_number_per_head_and_rules_of_the_parts_of_a_fused_weight(tmp_path: Path) -> None:
    rows = explained(tiny_model("llama"), tmp_path / "llama.json", {"regex": [["q_proj", "head"]]})
    assert second_moment(rows["model.layers.0.self_attn.q_proj.weight"]) == (4, 1)
    name = "model.layers.0.self_attn.qkv_proj.weight"  # 4 heads of queries, 2 of keys and 2 of values, of 8 rows each
    rules = {"exact": {name: {"query": "head", "key": "row_col", "value": "full"}}}
    state = explained(tiny_model("phi3"), tmp_path / "phi3.json", rules)[name].state
    shapes = {key.removeprefix("exp_avg_sq_"): shape for key, (shape, _) in state.items() if "sq" in key}
    assert shapes == {"query": (4, 1), "key_row": (16, 1), "key_col": (1, 32), "value": (16, 32)}
    rules["exact"][name] = dict.fromkeys(("query", "key", "value"), None)
    assert second_moment(explained(tiny_model("phi3"), tmp_path / "full.json", rules)[name]) == (64, 32)


def test_a_tied_weight_answers_to_both_names(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    rows = explained(model, tmp_path / "rules.json", {"exact": {"lm_head.weight": None}})
    assert second_moment(rows["transformer.wte.weight"]) == rows["transformer.wte.weight"].shape


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"exact": {"model.layers.0.self_attn.q_prj.weight": [1]}}, "did you mean .*0.self_attn.q_proj.weight"),
        ({"regex": [[r"mlp\.upproj\.weight$", [1]]]}, r"matches no parameter: names look like .*up_proj"),
        ({"regex": [["(", [1]]]}, "not a regular expression"),
        ({"regex": ["q_proj"]}, "pairs"),
        ({"exact": ["a"]}, "must be an object"),
        ({"regex": None}, "a list"),
        ({"exact": {"lm_head.weight": "rows"}}, "expected a list of axes"),
        ({"exact": {"lm_head.weight": [5]}}, r"axes=\(5,\) does not fit lm_head.weight"),
        (
            {"exact": {"lm_head.weight": "head"}},
            '"head" does not fit lm_head.weight, which is not known to have heads',
        ),
        ({"exact": {"lm_head.weight": {"up": [0]}}}, "'up' is no part of lm_head.weight"),
        ({"exact": {"lm_head.weight": {"up": "rows"}}}, "expected a list of axes"),
    ],
)
def test_wrong_rules_are_told(rules: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=message):
        hf_lowmem.build_optimizer(tiny_model("llama"), "slim_adamw", lr=1e-3, optim_args={"rules": str(path)})


def test_a_missing_or_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ValueError, match=rf"rules=.*{name}.*not a readable JSON file"):
            hf_lowmem.explain(tiny_model("llama"), "slim_adamw", {"rules": str(tmp_path / name)})
