"""The RLHF demo: its preference pairs and reward, and all stages in a short run through the demo's own path."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hf_lowmem.demo import main
from hf_lowmem.demo.settings import SCALES, RlhfSettings, StageSettings, parse_args, rlhf_settings

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

import rlhf_seeds

from hf_lowmem.demo.data import build_pairs
from hf_lowmem.demo.preferences import (
    ANOTHER,
    KINDS,
    SHUFFLED,
    answer_overlap,
    overlap,
    preference_pairs,
    short_answers,
    text,
)
from hf_lowmem.demo.rlhf import run_rlhf_demo

TINY_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def examples():
    train, held_out = build_pairs()
    answers = short_answers(held_out)
    return short_answers(train, unlike=answers), answers


def texts(split, column):
    return {text(row[column]) for row in split}


def test_no_answer_or_question_is_in_both_splits(examples):
    train, held_out = examples
    assert len(train) > 2000
    assert len(held_out) > 200
    for column in ("prompt", "completion"):
        assert not texts(train, column) & texts(held_out, column)


def test_rejected_answers_come_from_the_same_split(examples):
    for split in examples:
        answers = texts(split, "completion")
        for pair in preference_pairs(split):
            chosen, rejected = text(pair["chosen"]), text(pair["rejected"])
            assert chosen in answers
            assert rejected != chosen
            if pair["kind"] == ANOTHER:
                assert rejected in answers
            else:
                assert pair["kind"] == SHUFFLED
                assert sorted(rejected.split()) == sorted(chosen.split())


def test_pairs_are_the_same_every_time_and_as_many_of_each_kind(examples):
    train, held_out = examples
    pairs = preference_pairs(train)
    assert pairs == preference_pairs(short_answers(build_pairs()[0], unlike=held_out))
    assert [pair["kind"] for pair in pairs] == [*KINDS] * len(train)


def test_each_round_rejects_other_answers(examples):
    _, held_out = examples
    pairs = preference_pairs(held_out, rounds=3)
    assert len(pairs) == 3 * len(preference_pairs(held_out))
    assert len({(text(pair["chosen"]), text(pair["rejected"])) for pair in pairs}) == len(pairs)


def test_questions_keep_the_name_and_answers_their_first_words(examples):
    train, _ = examples
    by_question = {text(row["prompt"]): row for row in train}
    example = by_question["what does copy deepcopy do"]
    assert text(example["completion"]) == example["answer"] == "deep copy operation on arbitrary python objects"
    assert max(len(row["answer"].split()) for row in train) == 20


@pytest.mark.parametrize(
    ("given", "right", "share"),
    [
        ("close the shelf", "close the shelf", 1),
        ("the shelf the shelf", "the shelf is closed", 2 * 2 / (2 + 4)),
        ("Closed, the file.", "open a shelf", 0),
        ("", "open a shelf", 0),
    ],
)
def test_overlap(given, right, share):
    assert overlap(given, right) == pytest.approx(share)


def test_reward_function_takes_conversations():
    completions = [[{"role": "assistant", "content": "open it"}]] * 2
    answer = ["it open", "open a shelf"]
    assert answer_overlap(prompts=[], completions=completions, answer=answer, trainer_state=None) == [1, 0.4]


def test_scale_is_that_of_the_machine_unless_asked_for():
    args = parse_args(["--rlhf", "--seed", "3", "--optims", "adamw_torch, adam_mini_8bit"])
    assert rlhf_settings(args, has_gpu=True) == replace(
        SCALES["base"], seed=3, optims=("adamw_torch", "adam_mini_8bit")
    )
    assert rlhf_settings(args, has_gpu=False).scale == "small"
    assert rlhf_settings(parse_args(["--rlhf", "--scale", "small"]), has_gpu=True).scale == "small"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--scale", "large"], "large"),
        (["--optims", " , "], "--optims"),
        (["--optims", "adamw_torch,slim_adam_8bit"], "slim_adamw_8bit"),
        (["--steps", "3"], "--steps"),
    ],
)
def test_a_wrong_option_is_refused_before_training(argv, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--rlhf", *argv, "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_stage_runs_with_two_optimizers(tmp_path, capsys, monkeypatch):
    train, held_out = build_pairs()
    monkeypatch.setattr("hf_lowmem.demo.rlhf.build_pairs", lambda: (train[:300], held_out[:60]))
    stage = StageSettings(steps=2, batch_size=4, learning_rate=1e-3)
    settings = RlhfSettings(
        output_dir=tmp_path / "0",
        model=TINY_MODEL,
        vocab_size=512,
        max_length=96,
        held_out=8,
        sft=stage,
        reward=stage,
        grpo=replace(stage, batch_size=8),
        dpo=stage,
        generations=4,
        completion_tokens=4,
        average_steps=1,
    )
    run_rlhf_demo(settings)

    shown = capsys.readouterr().out
    for word in ("adamw_torch", "slim_adamw_8bit", "reward model", "GRPO", "DPO", "MiB", "seconds"):
        assert word in shown
    assert (tmp_path / "0" / "rlhf_demo.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "0").iterdir()} == {"rlhf_demo.png", "rlhf_demo.json"}

    report = json.loads((tmp_path / "0" / "rlhf_demo.json").read_text())
    assert {"settings", "device", "platform", "versions", "seconds", "pipelines"} <= set(report)
    adamw, slim = (pipeline["stages"] for pipeline in report["pipelines"])
    assert list(adamw) == list(slim) == ["SFT", "reward model", "GRPO", "DPO"]
    for name, stage_report in adamw.items():
        assert stage_report["state_bytes_per_parameter"] == pytest.approx(8, abs=0.001)
        assert slim[name]["state_bytes_per_parameter_outside_embeddings"] < 1.1
        assert slim[name]["parameters"] == stage_report["parameters"]
        assert stage_report["seconds"] > 0
    for stages in (adamw, slim):
        assert stages["SFT"]["figures"]["held-out loss"] == stages["SFT"]["curves"]["eval_loss"][-1][1]
        for name in ("reward model", "DPO"):
            figures = stages[name]["figures"]
            kinds = [figures[f"held-out accuracy, {kind}"] for kind in KINDS]
            assert figures["held-out accuracy"] == pytest.approx(sum(kinds) / 2)
        mentioned = [value for _, value in stages["GRPO"]["curves"]["rewards/answer_overlap/mean"]]
        assert stages["GRPO"]["figures"]["answer overlap, start"] == mentioned[0]
        assert stages["GRPO"]["figures"]["answer overlap, end"] == mentioned[-1]
        assert "eval_rewards/reward_model/mean" in stages["GRPO"]["curves"]
    # The same weights and the same first batch.
    assert adamw["SFT"]["curves"]["loss"][0] == slim["SFT"]["curves"]["loss"][0]

    first, second = tmp_path / "0" / "rlhf_demo.json", tmp_path / "1.json"
    with pytest.raises(SystemExit, match=r"seeds \[0, 0\]"):
        rlhf_seeds.merge([first, first], commit="abc")
    report["settings"] |= {"seed": 1, "vocab_size": 513}
    second.write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="more than its seed"):
        rlhf_seeds.merge([first, second], commit="abc")
    report["settings"]["vocab_size"] = 512
    second.write_text(json.dumps(report))
    merged = rlhf_seeds.merge([second, first], commit="abc")
    assert merged["seeds"] == [0, 1]
    assert [row["optim"] for row in merged["rows"]] == ["adamw_torch", "slim_adamw_8bit"] * 4
    assert "held-out accuracy, another" in rlhf_seeds.render(merged)
