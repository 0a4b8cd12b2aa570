"""What the algorithms do with every family, read from the table that users see."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

import hf_lowmem
from hf_lowmem.sizes import readable
from tests.support.model_families import DECODER_LMS, FAMILIES, meta_model, tiny_model
from tests.support.slow import fast_only

IN_8_BITS = [name for name in hf_lowmem.optim_names() if name.endswith("_8bit")]


def table(family: str, optim: str, **options: object) -> dict[str, object]:
    return {row.name: row for row in hf_lowmem.explain(tiny_model(family), optim, options).rows}


def numbers(row) -> int:
    """How many second-moment numbers a parameter has."""
    return sum(math.prod(shape) for name, (shape, _) in row.state.items() if name.startswith("exp_avg_sq"))


@pytest.mark.parametrize("optim", fast_only(hf_lowmem.optim_names(), IN_8_BITS))
def test_every_family_can_be_explained(optim: str) -> None:
    for family in FAMILIES:
        model = meta_model(family)
        explanation = hf_lowmem.explain(model, optim)
        assert explanation.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert len(explanation.rows) == len(list(model.parameters()))
        json.dumps(explanation.to_dict())
        assert all(row.name in str(explanation) for row in explanation.rows)
        assert explanation.by_role().count("\n") >= 3


@pytest.mark.parametrize("family", DECODER_LMS)
def test_no_decoder_has_an_unknown_role(family: str) -> None:
    assert not [row for row in table(family, "slim_adamw").values() if row.role == "unknown"]


@pytest.mark.parametrize("optim", ["slim_adamw", "adam_mini", "adalayer"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4"])
def test_nothing_is_averaged_across_experts(family: str, optim: str) -> None:
    experts = [row for row in table(family, optim).values() if ".experts." in row.name and len(row.shape) >= 2]
    assert experts
    for row in experts:
        for name, (shape, _) in row.state.items():
            if name.startswith("exp_avg_sq"):
                assert shape[0] == row.shape[0], row.name


def test_slim_adam_on_llama() -> None:
    rows, paper = table("llama", "slim_adamw"), table("llama", "slim_adamw", rules="paper")
    layer = "model.layers.0."
    for name, kept in {
        "model.embed_tokens.weight": 0,
        "lm_head.weight": 0,
        layer + "self_attn.q_proj.weight": 0,
        layer + "self_attn.k_proj.weight": 0,
        layer + "self_attn.v_proj.weight": 1,
        layer + "self_attn.o_proj.weight": 1,
        layer + "mlp.gate_proj.weight": 1,
        layer + "mlp.up_proj.weight": 1,
        layer + "mlp.down_proj.weight": 1,
    }.items():
        shape = rows[name].shape
        assert numbers(paper[name]) == shape[kept], name
        assert numbers(rows[name]) == (shape[kept] if "self_attn" in name else sum(shape)), name
    for each in rows, paper:
        assert numbers(each["model.norm.weight"]) == each["model.norm.weight"].numel


def test_gpt2_conv1d_is_averaged_over_its_own_axes() -> None:
    slim, mini = (table("gpt2", optim, rules="paper") for optim in ("slim_adamw", "adam_mini"))
    for name, row in slim.items():
        if name.endswith("mlp.c_fc.weight"):  # (fan_in, fan_out)
            assert row.state["exp_avg_sq"][0] == (row.shape[0], 1)
            assert mini[name].state["exp_avg_sq"][0] == (1, row.shape[1])
        if name.endswith("c_attn.weight"):
            width = row.shape[0]
            assert row.state["exp_avg_sq_query"][0] == (1, width)
            assert row.state["exp_avg_sq_value"][0] == (width, 1)


@pytest.mark.parametrize("optim", ["slim_adamw", "adam_mini", "adalayer"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gpt2", "t5"])
def test_means_that_cost_quality_are_factored_and_the_others_are_the_papers(family: str, optim: str) -> None:
    usual, paper, factored = table(family, optim), table(family, optim, rules="paper"), table(family, "factored_adamw")
    lose = {"token_embedding", "position_embedding", "lm_head"}
    lose |= {"mlp_up", "mlp_gate", "mlp_down", "mlp_gate_up"} if optim != "adalayer" else set()
    found = set()
    for name, row in usual.items():
        where = factored if row.role in lose and numbers(factored[name]) < row.numel else paper
        assert row.state == where[name].state, name
        found.add(where is factored)
    assert found == {True, False}


@pytest.mark.parametrize("optim", ["slim_adamw", "adam_mini", "adalayer"])
def test_the_papers_algorithm_has_no_limit_unless_one_is_given(optim: str) -> None:
    def limits(optim_args: str | None) -> set[float]:
        optimizer = hf_lowmem.build_optimizer(tiny_model("llama"), optim, lr=1e-3, optim_args=optim_args)
        return {group["update_limit"] for group in optimizer.param_groups}

    assert limits(None) == limits("update_limit=auto") == {"auto"}
    assert limits("rules=paper") == {math.inf}
    assert limits("rules=paper,update_limit=0.7") == {0.7}
    if optim == "adalayer":
        assert limits("variant=all") == limits("variant=slim_repo") == {math.inf}


def test_only_what_departs_from_a_paper_can_keep_to_it() -> None:
    with pytest.raises(
        ValueError, match=r"^rules=paper is for slim_adamw, adam_mini and adalayer: factored_adamw dep"
    ):
        hf_lowmem.explain(tiny_model("llama"), "factored_adamw", "rules=paper")


def test_options() -> None:
    conservative = table("llama", "slim_adamw", conservative=True)["model.layers.0.mlp.up_proj.weight"]
    assert numbers(conservative) == conservative.numel
    whole = table("phi3", "slim_adamw", fused="full")["model.layers.0.self_attn.qkv_proj.weight"]
    assert numbers(whole) == whole.numel
    tensor = table("llama", "adam_mini", value="tensor")["model.layers.0.self_attn.v_proj.weight"]
    assert numbers(tensor) == 1
    lora = {row.name: row for row in hf_lowmem.explain(tiny_model("llama_lora"), "slim_adamw").rows}
    reduced = {r.name: r for r in hf_lowmem.explain(tiny_model("llama_lora"), "slim_adamw", {"lora": "fan_in"}).rows}
    factors = [name for name in lora if "lora_A" in name]
    assert factors
    for name in factors:
        assert numbers(lora[name]) == lora[name].numel
        assert numbers(reduced[name]) == lora[name].shape[0]


def test_adalayer_variants() -> None:
    head = table("llama", "adalayer", rules="paper")["lm_head.weight"]
    assert numbers(head) == head.shape[0]
    assert numbers(table("llama", "adalayer", variant="all")["lm_head.weight"]) == 1
    tied = table("gpt2", "adalayer", rules="paper")["transformer.wte.weight"]
    assert numbers(tied) == tied.shape[0]
    full = table("llama", "adalayer", variant="slim_repo")["model.norm.weight"]
    assert numbers(full) == full.numel


def test_embeddings_are_stored_like_the_rest_unless_told_otherwise() -> None:
    model = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(100, 64)})

    def stored(optim: str, **options: object) -> set[str]:
        (row,) = hf_lowmem.explain(model, optim, options).rows
        return {kind for name, (_, kind) in row.state.items() if name in ("exp_avg", "exp_avg_sq")}

    assert stored("lowmem_adamw_8bit") == {"uint8"}
    assert stored("lowmem_adamw_8bit", embedding_bits=32) == {"float32"}
    assert stored("lowmem_adamw", state_bits=16) == {"bfloat16", "float32"}
    assert stored("lowmem_adamw", embedding_bits=8) == {"uint8"}
    assert stored("slim_adamw_8bit", rules="paper") == {"uint8", "float32"}
    assert stored("slim_adamw_8bit", embedding_bits=32) == {"float32"}
    assert stored("signum_8bit") == {"uint8"}
    assert stored("coap_adamw_8bit") == stored("soap_8bit") == {"uint8"}


def test_what_8_bit_adamw_takes_of_a_model_with_embeddings() -> None:
    """Two codes an entry and two scales a row of 64, of the embedding as of the layer."""
    model = torch.nn.ModuleDict({"tokens": torch.nn.Embedding(100, 64), "layer": torch.nn.Linear(64, 128)})
    codes, scales, bias, steps = 2 * (100 + 128) * 64, 2 * 4 * (100 + 128), 8 * 128, 3 * 4
    assert hf_lowmem.explain(model, "lowmem_adamw_8bit").nbytes == codes + scales + bias + steps
    wide = hf_lowmem.explain(model, "lowmem_adamw_8bit", {"embedding_bits": 32})
    assert wide.nbytes == 8 * 100 * 64 + 2 * 128 * 64 + 2 * 4 * 128 + bias + steps


def in_float32(module: torch.nn.Module, optim: str, options: dict[str, object]) -> str:
    """What is said of the one weight of a module, which 8 bits do not hold."""
    (row,) = (row for row in hf_lowmem.explain(module, optim, options).rows if "weight" in row.name)
    assert row.state["exp_avg"][1] == "float32"
    return row.compressed


@pytest.mark.parametrize(
    ("module", "optim", "options", "why"),
    [
        (torch.nn.Linear(8, 128), "signum_8bit", {}, "fewer than 4,096 entries: kept in float32"),
        (
            torch.nn.Linear(128, 128),
            "slim_adamw_8bit",
            {"min_8bit_size": 20000},
            "fewer than 20,000 entries: kept in f",
        ),
        (torch.nn.Conv2d(4, 4, 3), "adam_mini_8bit", {}, "fewer than 4,096 entries: kept in float32"),
        (torch.nn.LayerNorm(64), "coap_adamw_8bit", {}, "fewer than 4,096 entries: kept in float32"),
        (torch.nn.Embedding(96, 64), "slim_adamw_8bit", {"embedding_bits": 32}, "float32 by embedding_bits=32"),
    ],
)
def test_what_8_bit_does_not_hold_is_said_in_words(module, optim, options, why) -> None:
    assert why in in_float32(torch.nn.ModuleDict({"small": module}), optim, options)


@pytest.mark.parametrize("optim", [*fast_only(hf_lowmem.optim_names(), IN_8_BITS), "adamw_torch"])
def test_no_line_by_role_is_wider_than_100_columns(optim: str, tmp_path) -> None:
    pattern = "model.layers.[0-9]+." + "|".join(f"nothing{number}" for number in range(20)) + "|q_proj"
    (tmp_path / "rules.json").write_text(json.dumps({"regex": [[pattern, None]]}))
    ruled = optim.startswith(("slim", "coap", "soap"))
    for family in FAMILIES:
        options = {"rules": str(tmp_path / "rules.json")} if ruled and family == "llama" else None
        shown = hf_lowmem.explain(tiny_model(family), optim, options).by_role()
        assert max(map(len, shown.splitlines())) <= 100, family
        if options:
            assert "nothing19" in "".join(shown.split())  # the pattern is one long word, which is broken


@pytest.mark.parametrize(
    ("dtypes", "each"),
    [
        ((torch.float32,), 8),
        ((torch.bfloat16,), 4),
        ((torch.float16,), 4),
        ((torch.float64,), 16),
        ((torch.float32, torch.bfloat16), 6),
    ],
)
@pytest.mark.parametrize("optim", ["slim_adamw_8bit", "adamw_torch", "adamw_torch_fused"])
def test_adamw_is_counted_in_the_dtype_of_each_weight(dtypes, each, optim: str) -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(64, 64).to(dtype) for dtype in dtypes])
    model.append(torch.nn.Linear(64, 64).requires_grad_(False))
    found = hf_lowmem.explain(model, optim)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained)
    for param in trained:
        param.grad = torch.zeros_like(param)
    adamw.step()
    held = sum(tensor.nbytes for state in adamw.state.values() for tensor in state.values())
    assert found.adamw_nbytes == held
    assert round(held / found.numel, 1) == each
    assert found.gradient_bytes == sum(p.nbytes for p in trained)
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    if optim != "slim_adamw_8bit":
        assert found.nbytes == held
        names = {name for row in found.rows for name in row.state}
        assert names == set(next(iter(adamw.state.values())))


def test_adamw_takes_no_options() -> None:
    with pytest.raises(ValueError, match="mean nothing to 'adamw_torch'"):
        hf_lowmem.explain(torch.nn.Linear(2, 2), "adamw_torch", "rounding=kahan")


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1048575, "1.00 MiB"),
        (8161619212, "7.60 GiB"),
        (2**43, "8.00 TiB"),
    ],
)
def test_bytes_are_shown_in_the_unit_that_fits(nbytes: int, shown: str) -> None:
    assert readable(nbytes) == shown


@pytest.mark.parametrize("optim", ["lowmem_adamw_8bit", "slim_adamw_8bit", "signum_8bit"])
def test_any_size_is_held_in_8_bits(optim: str) -> None:
    layers = {
        "odd": torch.nn.Linear(67, 128),
        "siglip": torch.nn.Linear(4304, 4),
        "kernels": torch.nn.Conv2d(30, 40, 3),
        "depthwise": torch.nn.Conv1d(1030, 1030, 4, groups=1030),
        "thin": torch.nn.Linear(1, 4099),
    }
    for row in hf_lowmem.explain(torch.nn.ModuleDict(layers), optim, {"min_8bit_size": 4096}).rows:
        large = row.numel >= 4096
        assert row.state["exp_avg"] == (row.shape, "uint8" if large else "float32")
        assert ("in 8 bits" in row.compressed) == large
        assert ("fewer than 4,096 entries" in row.compressed) == (not large)
        assert "odd" not in row.compressed


def test_the_summary_is_logged_once_and_unknown_matrices_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_lowmem"):
        hf_lowmem.build_optimizer(torch.nn.ModuleDict({"mystery": torch.nn.Linear(8, 4)}), "slim_adamw", lr=1e-3)
    summaries = [r for r in caplog.records if "state by role" in r.message]
    assert len(summaries) == 1
    assert "unknown" in summaries[0].message
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "mystery.weight" in r.message]


def test_llama_2_7b_saves_what_the_papers_say() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama 2 7B
    assert hf_lowmem.explain(model, "lowmem_adamw").nbytes == pytest.approx(53.907e9, rel=1e-4)
    assert hf_lowmem.explain(model, "slim_adamw", "rules=paper").nbytes == pytest.approx(26.960e9, rel=1e-4)
    assert hf_lowmem.explain(model, "adam_mini", "rules=paper").nbytes == pytest.approx(26.958e9, rel=1e-4)
    assert hf_lowmem.explain(model, "slim_adamw").nbytes == pytest.approx(26.960e9, rel=1e-3)
    assert hf_lowmem.explain(model, "slim_adamw_8bit").bytes_per_param < 1.03


@pytest.mark.parametrize("options", ["state_bits=7", "block_size=100", "embedding_bits=12", "min_8bit_size=-1"])
def test_illegal_storage_options_are_told_without_a_step(options: str) -> None:
    with pytest.raises(ValueError, match=options.split("=")[0]):
        hf_lowmem.explain(torch.nn.Linear(8, 4), "slim_adamw", options)


def test_a_parameter_that_the_plan_does_not_know_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(torch.nn.Linear(8, 4), "slim_adamw", lr=1e-3)
    with caplog.at_level(logging.WARNING, logger="hf_lowmem"):
        cls(torch.nn.Linear(8, 4).parameters(), **kwargs)
    assert "2 parameters are not those of the model" in caplog.text
