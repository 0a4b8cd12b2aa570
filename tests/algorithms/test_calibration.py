"""`rules=auto`: second moments that are measured in full and folded during the run."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import hf_lowmem
from hf_lowmem.algorithms import FactoredAdamW, LowMemAdamW, SlimAdamW
from hf_lowmem.algorithms.calibration import SNR_COUNT, SNR_SUM
from hf_lowmem.algorithms.candidates import candidates_option, chosen, parts_of
from hf_lowmem.roles import ParamRole, assign_roles
from hf_lowmem.snr import snr_of
from hf_lowmem.snr.choice import term
from tests.support.model_families import VOCAB_SIZE, tiny_model
from tests.support.slow import slow

AUTO = {"rules": "auto", "calibration_steps": 3, "snr_cutoff": 0.2, "min_8bit_size": 0}
ROLE = ParamRole("up_proj.weight", (8, 64), "mlp_up", fan_out=0, fan_in=(1,))
QUERY = ParamRole("q_proj.weight", (8, 64), "attention_query", fan_out=0, fan_in=(1,), head_dim=4)


def built(family: str, optim: str, optim_args: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = tiny_model(family)
    return model, hf_lowmem.build_optimizer(model, optim, lr=1e-2, optim_args=optim_args)


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    ids = torch.randint(0, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(number))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def nbytes(optimizer: Any) -> int:
    return sum(t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values())


def assert_same(model: nn.Module, optimizer: Any, other: nn.Module, theirs: Any) -> None:
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == theirs.state[b].keys()
        assert all(torch.equal(optimizer.state[a][name], theirs.state[b][name]) for name in optimizer.state[a])


def weight_and(cls: Any, role: ParamRole = ROLE, **options: Any) -> tuple[nn.Parameter, Any]:
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    weight = nn.Parameter(torch.randn(role.shape, dtype=dtype))
    return weight, cls([weight], lr=1e-2, candidates=candidates_option(role), **options)


def grads(seed: int, weight: Tensor, columns: float = 0.1) -> Tensor:
    """Gradients whose columns differ in size, so that a mean over fan_out stands for them well."""
    generator = torch.Generator().manual_seed(seed)
    size = 1 + torch.arange(weight.shape[1]) * columns
    return (torch.randn(weight.shape, generator=generator) * size).to(weight.dtype)


def force(state: dict[str, Tensor], parts: Any, kept: Any) -> Tensor:
    """Make the sums say that only the candidates in `kept` are good, one of each part in their order, if any."""
    sums, at = state[SNR_SUM], 0
    for number, part in enumerate(parts):
        for each in part.candidates:
            good = bool(kept) and each == kept[number]
            sums[at] = float(good != (each.name == "row_col")) * 1e6  # of row_col, the inverse is summed
            at += 1
    return sums


@pytest.mark.parametrize(("family", "optim"), [("llama", "slim_adamw_8bit"), ("phi3", "factored_adamw")])
def test_a_folded_run_goes_on_as_one_with_the_rules_it_chose(family: str, optim: str, tmp_path: Path) -> None:
    model, optimizer = built(family, optim, AUTO)
    for number in range(3):
        assert number == 0 or nbytes(optimizer) == hf_lowmem.explain(model, optim, AUTO).nbytes
        step(model, optimizer, number)
    rules = optimizer.chosen_rules()
    assert {"full", "row_col"} <= {rule for rule in rules.values() if isinstance(rule, str)}
    assert any(isinstance(rule, dict) for rule in rules.values()) == (family == "phi3")
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    fixed = {"rules": str(tmp_path / "rules.json"), "min_8bit_size": 0}
    assert nbytes(optimizer) == hf_lowmem.explain(model, optim, fixed).nbytes
    assert nbytes(optimizer) < hf_lowmem.explain(model, optim, AUTO).nbytes

    other, theirs = built(family, optim, fixed)
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    for number in range(3, 5):
        step(model, optimizer, number)
        step(other, theirs, number)
    assert_same(model, optimizer, other, theirs)

    again = built(family, optim, AUTO)[1]  # goes on with the checkpoint of a run that went on with what auto chose
    again.load_state_dict(theirs.state_dict())
    assert again.chosen_rules() == rules


@pytest.mark.parametrize("role", [ROLE, QUERY])
@pytest.mark.parametrize("cls", [SlimAdamW, FactoredAdamW])
@pytest.mark.parametrize("kind", ["fan_in", "fan_out", "head", "both", "row_col", "full"])
def test_the_means_of_the_full_second_moment_take_its_place(cls: Any, kind: str, role: ParamRole) -> None:
    weight, optimizer = weight_and(cls, role, calibration_steps=2)
    twin = nn.Parameter(weight.detach().clone())
    adamw = LowMemAdamW([twin], lr=1e-2)
    parts = parts_of(candidates_option(role))
    kept = next((each for each in parts[0].candidates if each.name == kind), None)
    for seed in range(2):
        weight.grad, twin.grad = grads(seed, weight), grads(seed, twin)
        if seed and kept:  # the choice itself is another test's
            force(optimizer.state[weight], parts, [kept])
        elif seed:
            force(optimizer.state[weight], parts, [])
        optimizer.step()
        adamw.step()
    assert torch.equal(weight, twin)
    v, state = adamw.state[twin]["exp_avg_sq"], optimizer.state[weight]
    if kept is None:
        assert torch.equal(state["exp_avg_sq"], v)
        return
    segment = parts[0].segment(kept, role.shape)
    for mean in segment.means:
        stored = state[f"exp_avg_sq_{mean.name}" if mean.name else "exp_avg_sq"]
        expected = mean.view(v.double()).mean(mean.mean_dims).float()
        assert stored.dtype == torch.float32
        assert torch.equal(stored.flatten(), expected.flatten())
    assert SNR_SUM not in state
    assert "exp_avg_sq" not in state or state["exp_avg_sq"].numel() < v.numel()


def test_the_candidate_with_the_highest_mean_ratio_above_the_cutoff_is_chosen() -> None:
    parts = parts_of(candidates_option(ROLE))
    names = [each.name for each in parts[0].candidates]
    assert names == ["fan_in", "fan_out", "both", "row_col"]
    for ratios, best in (
        ([1.5, 2.0, 1.1, 1.9], "fan_out"),
        ([math.nan, 0.9, 1.1, 1.0], "both"),
        ([1.5, 2.0, math.nan, 2.1], "row_col"),
        ([1.5, 2.0, math.nan, math.inf], "row_col"),
        ([0.5, 1.0, math.nan, 1.0], None),
        ([math.nan] * 4, None),
    ):
        counts = torch.tensor([0.0 if math.isnan(ratio) else 5.0 for ratio in ratios])
        sums = 5 * torch.tensor([*ratios[:3], 1 / ratios[3]], dtype=torch.float64)
        (found,) = chosen(parts, sums, counts, cutoff=1.0)
        assert (found and found.name) == best


def test_one_gradient_of_rank_1_does_not_decide_for_the_factored_estimate() -> None:
    weight, optimizer = weight_and(SlimAdamW, calibration_steps=4, snr_cutoff=10.0)
    for number in range(1, 5):
        token = torch.rand(8, 1) * torch.rand(1, 64)
        weight.grad = token if number == 1 else torch.randn(8, 64)
        optimizer.step()
        if number == 1:  # the ratio is that of float32, about 1e14
            assert optimizer.state[weight][SNR_SUM][-1] < 1e-12
    assert optimizer.state[weight]["exp_avg_sq"].shape == weight.shape


@pytest.mark.parametrize("bits", [32, 8])
def test_ratios_are_summed_over_the_schedule_and_those_that_are_not_finite_do_not_count(bits: int) -> None:
    weight, optimizer = weight_and(SlimAdamW, calibration_steps=60, state_bits=bits, min_8bit_size=0)
    (part,) = parts_of(candidates_option(ROLE))
    segments = {each.name: part.segment(each, ROLE.shape) for each in part.candidates}
    expected = torch.zeros(len(segments), dtype=torch.float64)
    for number in range(1, 8):
        weight.grad = grads(number, weight) if number > 1 else torch.ones_like(weight)
        optimizer.step()
        if number in (3, 6):  # every 60 // 20 steps; at step 1 all entries are equal
            plan = optimizer.plan_of(weight)
            v = plan.bind(optimizer.state[weight], ROLE.shape)["exp_avg_sq"].load()
            expected += torch.stack([term(how, snr_of(v, segment)) for how, segment in segments.items()])
    torch.testing.assert_close(optimizer.state[weight][SNR_SUM], expected, rtol=1e-12, atol=0)
    assert optimizer.state[weight][SNR_COUNT].tolist() == [2.0, 2.0, 2.0, 3.0]  # equal entries are of rank 1


def test_a_weight_counts_by_its_own_steps() -> None:
    torch.manual_seed(0)
    often, seldom = (nn.Parameter(torch.randn(ROLE.shape)) for _ in range(2))
    optimizer = SlimAdamW([often, seldom], candidates=candidates_option(ROLE), calibration_steps=3, snr_cutoff=0.1)
    for number in range(1, 7):
        often.grad = grads(number, often)
        seldom.grad = grads(number, seldom) if number % 2 else None
        optimizer.step()
        assert (SNR_SUM in optimizer.state[often]) == (number < 3)
        assert (SNR_SUM in optimizer.state[seldom]) == (number < 5)
        if number in (1, 2):
            assert optimizer.state[seldom][SNR_COUNT].tolist() == [1.0] * 4
    assert optimizer.state[seldom]["exp_avg_sq"].numel() < seldom.numel()


def test_a_fused_weight_is_folded_part_by_part() -> None:
    model, optimizer = built("gpt2", "slim_adamw", AUTO)
    weight = model.transformer.h[0].attn.c_attn.weight  # (fan_in, fan_out) = (32, 3 * 32)
    parts = parts_of(candidates_option(dict(assign_roles(model))[weight]))
    wanted = {"query": "fan_in", "key": "row_col", "value": "fan_out"}
    kept = [each for part in parts for each in part.candidates if each.name == wanted[part.place[0]]]
    for number in range(3):
        if number == 2:
            force(optimizer.state[weight], parts, kept)
        step(model, optimizer, number)
    rule = optimizer.chosen_rules()["transformer.h.0.attn.c_attn.weight"]
    assert rule == {"query": [0], "key": "row_col", "value": [1]}
    shapes = {name.removeprefix("exp_avg_sq_"): tuple(mean.shape) for name, mean in optimizer.state[weight].items()}
    assert shapes.items() >= {"query": (1, 32), "key_row": (1, 32), "key_col": (32, 1), "value": (32, 1)}.items()


def test_a_fused_weight_keeps_its_8_bit_codes_where_the_averaged_parts_save_nothing() -> None:
    role = dict(assign_roles(tiny_model("gpt2")))
    qkv = next(each for each in role.values() if each.role == "attention_qkv")
    weight, optimizer = weight_and(SlimAdamW, qkv, state_bits=8, min_8bit_size=0, calibration_steps=2)
    for seed in range(2):
        weight.grad = grads(seed, weight)
        if seed:  # of query, key and value, only the query's fan_in stands out
            force(optimizer.state[weight], parts_of(candidates_option(qkv)), [])[0] = 1e6
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.chosen_rules() == {}  # it has no name
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"}


# -- checkpoints --------------------------------------------------------------------------------------------------


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, VOCAB_SIZE, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, **arguments: Any) -> Trainer:
    hf_lowmem.register()
    set_seed(0)
    given = TrainingArguments(
        output_dir=str(folder),
        optim="slim_adamw_8bit",
        optim_args="rules=auto,calibration_steps=6,snr_cutoff=0.2,min_8bit_size=0",
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        **arguments,
    )
    return Trainer(tiny_model("phi3"), given, train_dataset=Tokens())


def test_a_trainer_resumes_before_at_and_after_the_fold(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=1)
    whole.train()
    saved = [torch.load(tmp_path / f"checkpoint-{n}" / "optimizer.pt", weights_only=True) for n in (5, 6)]
    assert [any(SNR_SUM in state for state in each["state"].values()) for each in saved] == [True, False]
    for at in (4, 6, 7):
        resumed = trainer(tmp_path, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        assert resumed.state.global_step == 8
        assert_same(whole.model, whole.optimizer.optimizer, resumed.model, resumed.optimizer.optimizer)


def test_checkpoints_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model, optimizer = built("llama", "slim_adamw", AUTO)
    saved = []
    for number in range(3):
        step(model, optimizer, number)
        saved.append(copy.deepcopy(optimizer.state_dict()))
    _, paper = built("llama", "slim_adamw", {"min_8bit_size": 0})
    with pytest.raises(ValueError, match=r"while rules=auto calibrated 'model\..*resume with rules=auto"):
        paper.load_state_dict(saved[0])
    with pytest.raises(ValueError, match=r"has (cross_)?axes=\(.*\), expected"):
        paper.load_state_dict(saved[2])

    never = copy.deepcopy(paper.state_dict())
    _, fresh = built("llama", "slim_adamw", AUTO)
    with pytest.raises(
        ValueError, match=r"^The checkpoint was written without rules=auto, so .* of 'model\..*in full"
    ):
        fresh.load_state_dict(never)
    _, factored = built("llama", "factored_adamw", {"min_8bit_size": 0})
    for theirs in saved[0], saved[2]:
        with pytest.raises(ValueError, match=r"^The checkpoint's optimizer state was written by slim_adamw, not by"):
            factored.load_state_dict(theirs)
    wrong = copy.deepcopy(saved[2])
    wrong["layouts"][0][0]["state_bits"] = 8
    before = fresh.state_dict()["layouts"]
    with pytest.raises(ValueError, match="state_bits=8, expected 32"):
        fresh.load_state_dict(wrong)
    assert fresh.state_dict()["layouts"] == before


@pytest.mark.parametrize("limit", [0.3, math.inf])
def test_updates_are_limited_from_the_fold_on(limit: float) -> None:
    model, optimizer = built("llama", "factored_adamw", {**AUTO, "update_limit": limit})
    theirs = copy.deepcopy(model)
    plain = hf_lowmem.build_optimizer(theirs, "lowmem_adamw", lr=1e-2)
    for number in range(3):
        step(model, optimizer, number)
        step(theirs, plain, number)
        assert all(map(torch.equal, model.parameters(), theirs.parameters()))
    before = [param.detach().clone() for param in model.parameters()]
    step(model, optimizer, 3)
    most = max(
        (param - old).abs().max() / 1e-2
        for param, old in zip(model.parameters(), before, strict=True)
        if "exp_avg_sq" not in optimizer.state[param] or optimizer.state[param]["exp_avg_sq"].shape != param.shape
    )
    assert (most <= 0.3 * (1 + 1e-4)) == (limit == 0.3)


def test_a_folded_optimizer_can_go_back_to_a_checkpoint_from_before() -> None:
    model, optimizer = built("llama", "factored_adamw", AUTO)
    step(model, optimizer, 0)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for number in (1, 2, 3):
        step(model, optimizer, number)
    other, theirs = built("llama", "factored_adamw", AUTO)
    other.load_state_dict(model.state_dict())
    theirs.load_state_dict(optimizer.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    for number in (1, 2, 3):
        step(model, optimizer, number)
    assert_same(model, optimizer, other, theirs)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_checkpoint_becomes_one_of_torchs_adamw(steps: int) -> None:
    model, optimizer = built("llama", "slim_adamw", AUTO)
    for number in range(steps):
        step(model, optimizer, number)
    converted = hf_lowmem.to_adamw(optimizer.state_dict(), model, "slim_adamw", AUTO)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in converted["state"].values())
    assert all(state["exp_avg"].shape == state["exp_avg_sq"].shape for state in converted["state"].values())


def test_the_state_of_torchs_adamw_is_measured_once_where_it_is_older_than_the_calibration() -> None:
    weight, optimizer = weight_and(SlimAdamW, calibration_steps=5, snr_cutoff=0.1)
    adamw = torch.optim.AdamW([weight], lr=1e-2)
    for number in range(7):
        weight.grad = grads(number, weight)
        adamw.step()
    optimizer.load_state_dict(adamw.state_dict())
    weight.grad = grads(8, weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].numel() < weight.numel()


# -- options and what surrounds a step ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("slim_adamw", "calibration_steps=5", "calibration_steps=5 is an option of rules=auto"),
        ("slim_adamw", "snr_cutoff=2", "snr_cutoff=2.0 is an option of rules=auto"),
        ("slim_adamw", "rules=auto,calibration_steps=0", "calibration_steps=0 must be a whole number of at least 1"),
        ("slim_adamw", "rules=auto,snr_cutoff=-1", "snr_cutoff=-1.0 must be a finite number above 0"),
        ("slim_adamw", "rules=auto,conservative=true", "conservative=true does not go with rules=auto"),
        ("slim_adamw_8bit", "rules=auto,fused=full", "fused=full does not go with rules=auto"),
        ("factored_adamw", "rules=auto,lora=factored", "lora=factored does not go with rules=auto"),
        ("adam_mini", "rules=auto", "rules=auto is for factored_adamw and slim_adamw alone"),
        ("factored_adamw", "rules=auto,capturable=true", "capturable=true does not go with rules=auto"),
    ],
)
def test_options_that_do_not_go_together(optim: str, optim_args: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf_lowmem.build_optimizer(tiny_model("llama"), optim, lr=1e-3, optim_args=optim_args)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "rounding": "kahan"},
        {"dtype": torch.bfloat16, "rounding": "stochastic", "state_bits": 8, "min_8bit_size": 0},
        {"dtype": torch.float64},
        {"offload_state": True},
        {"state_bits": 16},
        slow({"compile": True}),
    ],
    ids=str,
)
def test_copies_go_on_as_the_original(options: dict[str, Any]) -> None:
    weight, optimizer = weight_and(SlimAdamW, calibration_steps=4, snr_cutoff=0.1, **options)
    for number in range(1, 7):
        if number in (3, 6):  # before and after the fold
            optimizer = copy.deepcopy(pickle.loads(pickle.dumps(optimizer)))
            (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = grads(number, weight)
        optimizer.step()
        optimizer.release_state()
    straight, other = weight_and(SlimAdamW, calibration_steps=4, snr_cutoff=0.1, **options)
    for number in range(1, 7):
        straight.grad = grads(number, straight)
        other.step()
    assert torch.equal(weight, straight)
    assert optimizer.state[weight].keys() == other.state[straight].keys()
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.promote_types(torch.float32, weight.dtype)
    assert optimizer.state[weight]["exp_avg_sq"].numel() < weight.numel()


@pytest.mark.parametrize("resized_after", [1, 4])
def test_a_vocabulary_that_grows_before_or_after_the_fold(resized_after: int) -> None:
    weight, optimizer = weight_and(SlimAdamW, calibration_steps=3, snr_cutoff=0.1)
    for number in range(1, 7):
        weight.grad = grads(number, weight)
        optimizer.step()
        if number == resized_after:
            weight.data = torch.cat([weight.data, torch.ones(3, 64)])
            optimizer.resize_state()
    state = optimizer.state[weight]
    assert state["exp_avg"].shape == (11, 64)
    assert state["exp_avg_sq"].shape == (1, 64)


def test_a_weight_that_its_group_names_twice_is_folded_once() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(ROLE.shape))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SlimAdamW(
            [weight, weight], candidates=candidates_option(ROLE), calibration_steps=3, snr_cutoff=0.1
        )
    for number in range(3):
        weight.grad = grads(number, weight)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].numel() < weight.numel()
    assert all(not each["candidates"] for each in optimizer.state_dict()["layouts"][0])


def test_what_was_chosen_is_logged_by_role(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = built("llama", "slim_adamw", AUTO)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_lowmem"):
        for number in range(4):
            step(model, optimizer, number)
    *roles, total = [line for record in caplog.records if (line := record.getMessage()).startswith("rules=auto")]
    weights = [role.role for _, role in assign_roles(model) if candidates_option(role)]
    assert [line.split()[3].rstrip(":") for line in roles] == list(dict.fromkeys(weights))
    assert f"of {len(weights)} weights from now on and has given back" in total
    assert "optimizer.chosen_rules()" in total


def test_explain_says_what_is_left_at_the_least() -> None:
    explanation = hf_lowmem.explain(tiny_model("llama"), "slim_adamw", AUTO)
    least = explanation.nbytes
    for (_, role), row in zip(assign_roles(tiny_model("llama")), explanation.rows, strict=True):
        for part in parts_of(candidates_option(role)):
            means = part.segment(part.smallest(row.shape), row.shape).means
            least -= 4 * row.numel + 16 * len(part.candidates) - sum(mean.spec(row.shape).nbytes for mean in means)
    assert f"and {least / explanation.numel:.3f} if every weight" in explanation.caution
    assert f"keeps {explanation.bytes_per_param:.3f} bytes" in explanation.caution
