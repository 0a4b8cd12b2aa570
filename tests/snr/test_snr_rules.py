"""Rules from a CSV of ratios, and the optimizers that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_lowmem
from hf_lowmem.snr import SnrTracker, rules_from_csv
from hf_lowmem.snr.ratios import read_ratios
from hf_lowmem.snr.rules import saved_share, write_rules
from hf_lowmem.state import STEP
from tests.support.model_families import tiny_model

# The second form is that of a data frame without quotes. Means: up (0,) 2.0, (1,) 3.0; down (0,) 0.9, row_col 2.0.
FILES = {
    "authors": """step,key,shape,compress_dims,snr,mean_sqr,var
1,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(0,)",1.0,1e-9,1e-9
1,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(1,)",5.0,1e-9,1e-9
1,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(0, 1)",0.5,1e-9,1e-9
1,_orig_mod.h.0.down.weight,"torch.Size([4, 8])","(0,)",0.9,1e-9,1e-9
1,_orig_mod.h.0.down.weight,"torch.Size([4, 8])","(1,)",,0,0
1,_orig_mod.h.0.down.weight,"torch.Size([4, 8])",row_col,2.0,1e-9,1e-9
1,_orig_mod.h.0.ln_1.weight,torch.Size([8]),"(0,)",9.0,1e-9,1e-9
100,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(0,)",3.0,1e-9,1e-9
100,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(1,)",1.0,1e-9,1e-9
100,_orig_mod.h.0.up.weight,"torch.Size([8, 4])","(0, 1)",None,1e-9,1e-9
100,_orig_mod.h.0.down.weight,"torch.Size([4, 8])","(0,)",nan,1e-9,1e-9
""",
    "unquoted": """,step,key,shape,compress_dims,snr,mean_sqr,var
0,1,h.0.up.weight,(8, 4),(0,),1.0,1e-9,1e-9
1,1.0,h.0.up.weight,(8, 4),(1,),5.0,1e-9,1e-9
2,1,h.0.up.weight,(8, 4),(0, 1),0.5,1e-9,1e-9
3,1,h.0.down.weight,(4, 8),(0,),0.9,1e-9,1e-9
4,1,h.0.down.weight,(4, 8),row_col,2.0,1e-9,1e-9
5,1,h.0.ln_1.weight,torch.Size([8]),(0,),9.0,1e-9,1e-9
6,100,h.0.up.weight,torch.Size([8, 4]),(0,),3.0,1e-9,1e-9
7,100,h.0.up.weight,torch.Size([8, 4]),(1,),1.0,1e-9,1e-9
""",
}
UP, DOWN, NORM = "h.0.up.weight", "h.0.down.weight", "h.0.ln_1.weight"


@pytest.fixture(params=FILES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "snr.csv"
    file.write_text(FILES[request.param])
    return file


def test_the_authors_rule(path: Path) -> None:
    assert rules_from_csv(path, axes_only=True) == {UP: [1], DOWN: None, NORM: None}
    assert rules_from_csv(path, cutoff=0.5, axes_only=True) == {UP: [1], DOWN: [0], NORM: None}
    assert rules_from_csv(path, cutoff=3.0, axes_only=True) == {UP: None, DOWN: None, NORM: None}


def test_the_smallest_ratio_and_the_factored_estimate(path: Path) -> None:
    assert rules_from_csv(path) == {UP: [1], DOWN: "row_col", NORM: None}
    assert rules_from_csv(path, cutoff=0.8) == {UP: [1], DOWN: "row_col", NORM: None}  # the highest ratio
    assert rules_from_csv(path, cutoff=0.95, over="min") == {UP: [0], DOWN: "row_col", NORM: None}
    assert rules_from_csv(path, over="min") == {UP: None, DOWN: "row_col", NORM: None}


def test_a_measurement_of_rank_1_does_not_decide_for_the_factored_estimate(tmp_path: Path) -> None:
    path = tmp_path / "snr.csv"
    rows = {1: (1e14, 0.5), 2: (0.5, 0.7), 3: ("inf", 0.4), 4: (0.6, 0.9)}
    lines = [
        f'{step},w,"(8, 4)",{how},{ratio},1,1'
        for step, found in rows.items()
        for how, ratio in zip(("row_col", "head 16"), found, strict=True)
    ]
    path.write_text("\n".join(["step,key,shape,compress_dims,snr,mean_sqr,var", *lines]))
    assert rules_from_csv(path) == {"w": "row_col"}  # the harmonic mean is 4 / (1 / 0.5 + 1 / 0.6) = 1.09
    assert rules_from_csv(path, cutoff=1.1) == {"w": None}
    assert rules_from_csv(path, over="min", cutoff=0.4) == {"w": "row_col"}
    assert rules_from_csv(path, bytes_budget=4 * 2 / 32) == {"w": "head"}
    assert rules_from_csv(path, axes_only=True) == {"w": None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('1,w,"(8, 4)",both,2', "Line 3 of .* has the compress_dims 'both', expected axes such as"),
        ('1,w,"(8, 4)","(-1,)",2', r"has the compress_dims '\(-1,\)', expected axes such as"),
        ('1,w,8x4,"(1,)",2', r"Line 3 of .* has the shape '8x4', expected sizes such as \(64, 128\)"),
        ('1,w,"(8, 4)",head,2', "has the compress_dims 'head', expected axes such as .* 'head' and its entries"),
        ('inf,w,"(8, 4)","(0,)",2', "Line 3 of .* has the step 'inf', expected a number"),
        ('first,w,"(8, 4)","(0,)",2', "has the step 'first', expected a number"),
        ('1,w,"(8, 4)","(0,)",high', "has the snr 'high', expected a number, or nothing"),
        ('1,w,"(8, 4)"', "Line 3 of .* is '1,w.*', expected the 5 columns step,key,shape,compress_dims,snr"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "snr.csv"
    path.write_text("\n".join(["step,key,shape,compress_dims,snr", 'w,"(8, 4)"'.join(["1,", ',"(1,)",2']), line, ""]))
    with pytest.raises(ValueError, match=message):
        rules_from_csv(path)


def test_files_that_were_edited_or_joined_are_read(tmp_path: Path) -> None:
    path = tmp_path / "snr.csv"
    head = "step,key,shape,compress_dims,snr\n"
    path.write_text(
        "\ufeff" + head + '1,w,"(8, 4)","(0,)",2\n\n' + "\ufeff" + head + '2,w,"(8, 4)","(0, )",4\n3,w,"(8', "utf-8"
    )
    assert read_ratios(path)["w"].ratios == {(0,): {1: 2.0, 2: 4.0}}


def test_a_budget_of_bytes_takes_the_highest_cutoff_that_keeps_it(path: Path) -> None:
    # 72 entries: 8 in the norm, 32 in each matrix; up keeps 8, and down 12.
    for kept, rules in ((72, (None, None)), (48, ([1], None)), (28, ([1], "row_col"))):
        budget = 4 * kept / 72 + 1e-9
        assert tuple(rules_from_csv(path, bytes_budget=budget).values())[:2] == rules
        found = read_ratios(path)
        choices = dict(zip(found, (tuple(r) if isinstance(r, list) else r for r in (*rules, None)), strict=True))
        assert 4 * (1 - saved_share(found, choices)) == pytest.approx(4 * kept / 72)
    # Where the highest ratios keep too much, the reductions with the fewest entries go before them.
    for kept, rules in ((24, ([0], "row_col")), (20, ([0], [0])), (17, ([0, 1], [0]))):
        assert tuple(rules_from_csv(path, bytes_budget=4 * kept / 72 + 1e-9).values())[:2] == rules
    with pytest.raises(ValueError, match=r"bytes_budget=0.9 is too small: .* bytes per parameter are the least .* 8 "):
        rules_from_csv(path, bytes_budget=0.9)
    with pytest.raises(ValueError, match="cutoff=0 must be a number above 0"):
        rules_from_csv(path, cutoff=0)


def test_rules_of_a_measured_model_are_read_by_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = SnrTracker(model, tmp_path / "snr.csv")
    tokens = torch.randint(32, (4, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    tracker.measure(optimizer, 1)
    rules = rules_from_csv(tmp_path / "snr.csv", cutoff=0.01)
    assert rules["transformer.h.0.attn.c_attn.weight"].keys() == {"query", "key", "value"}
    rules["transformer.h.0.attn.c_attn.weight"] = {"query": [0], "key": None, "value": "row_col"}
    write_rules(tmp_path / "rules.json", rules)

    explained = hf_lowmem.explain(model, "slim_adamw", f"rules={tmp_path / 'rules.json'}")
    rows = {row.name: row for row in explained.rows}
    fused = rows["transformer.h.0.attn.c_attn.weight"]
    shapes = {name.removeprefix("exp_avg_sq_"): shape for name, (shape, _) in fused.state.items()}
    # c_attn is (in, out): the mean over fan_in keeps an entry per output.
    assert shapes["query"] == (1, 16)
    assert shapes["key"] == (16, 16)
    assert (shapes["value_row"], shapes["value_col"]) == ((1, 16), (16, 1))
    assert rows["transformer.h.0.ln_1.weight"].nbytes == 2 * 4 * 16 + STEP.nbytes


def test_rules_by_role(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    rules = {
        "exact": {"transformer.wpe.weight": "row_col"},
        "role": {"mlp_up": "row_col", "position_embedding": None, "attention_qkv": {"value": [0]}},
    }
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(rules))
    rows = {row.name: row for row in hf_lowmem.explain(model, "slim_adamw", f"rules={path}").rows}
    assert rows["transformer.h.0.mlp.c_fc.weight"].why == "rules file, by role"
    assert "exp_avg_sq_row" in rows["transformer.h.0.mlp.c_fc.weight"].state
    assert rows["transformer.wpe.weight"].why == "rules file, by name"
    assert rows["transformer.h.0.attn.c_attn.weight"].state["exp_avg_sq_query"][0] == (16, 16)
    for wrong, said in (
        ({"role": {"mlp_upp": None}}, "'mlp_upp' is no role: did you mean mlp_up"),
        ({"role": {"attention_qkv": {"gate": [0]}}}, "'gate' is no part of .*whose parts are query, key, value"),
        ({"role": {"mlp_up": {"gate": [0]}}}, "'gate' is no part of .*not known to be fused"),
        ({"role": {"mlp_up": "both"}}, "'mlp_up' has 'both', expected a list of axes"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=said):
            hf_lowmem.explain(model, "slim_adamw", f"rules={path}")


@pytest.mark.parametrize("optim", ["slim_adamw", "factored_adamw", "adam_mini", "adalayer"])
def test_rules_by_role_reach_the_parts_of_fused_weights(optim: str, tmp_path: Path) -> None:
    path, model = tmp_path / "rules.json", tiny_model("phi3")
    own = {row.name: row for row in hf_lowmem.explain(model, optim).rows}
    path.write_text(json.dumps({"role": {"mlp_up": [0, 1], "attention_key": "head", "attention_value": None}}))
    rows = {row.name: row for row in hf_lowmem.explain(model, optim, f"rules={path}").rows}
    fused, qkv = (f"model.layers.0.{name}.weight" for name in ("mlp.gate_up_proj", "self_attn.qkv_proj"))
    assert {rows[name].why for name in (fused, qkv)} == {"rules file, by role of its parts"}
    assert rows[fused].state["exp_avg_sq_up"][0] == (1, 1)
    assert rows[qkv].state["exp_avg_sq_key"][0] == (2, 1)
    assert rows[qkv].state["exp_avg_sq_value"][0] == (16, 32)

    def part(row: Any, name: str) -> set[Any]:
        return {state for key, state in row.state.items() if key.startswith(f"exp_avg_sq_{name}")}

    assert part(rows[qkv], "query") == part(own[qkv], "query")
    assert part(rows[fused], "gate") == part(own[fused], "gate")
    assert rows["model.layers.0.mlp.down_proj.weight"].state == own["model.layers.0.mlp.down_proj.weight"].state


def test_a_role_that_matches_nothing_is_an_error_and_unknown_is_a_role(tmp_path: Path) -> None:
    path, model = tmp_path / "rules.json", tiny_model("phi3")
    for rules, optim, said in (
        (
            {"role": {"router": None}},
            "slim_adamw",
            "The rule of the role 'router' matches no parameter: the roles here",
        ),
        ({"role": {"mlp_up": 4}}, "coap_adamw", "The rule of the role 'mlp_up' matches no parameter"),
        ({"role": {"mlp_up": "head"}}, "slim_adamw", 'rules file, by role of its parts: "head" does not fit'),
        ({"role": {"mlp_up": {"up": [0]}}}, "slim_adamw", "'up' of model.*gate_up_proj.weight is one part"),
        ({"role": {"unknown": None}, "unknown": [0]}, "slim_adamw", 'a rule for "unknown" twice'),
    ):
        path.write_text(json.dumps(rules))
        with pytest.raises(ValueError, match=said):
            hf_lowmem.explain(model, optim, f"rules={path}")
    for same in ({"role": {"unknown": [1]}}, {"unknown": [1]}):
        path.write_text(json.dumps(same))
        mystery = torch.nn.ModuleDict({"x": torch.nn.Linear(8, 4, False)})
        (row,) = hf_lowmem.explain(mystery, "slim_adamw", f"rules={path}").rows
        assert row.state["exp_avg_sq"][0] == (4, 1)
        hf_lowmem.explain(model, "slim_adamw", f"rules={path}")
