"""The demo: its data, a short run through main's own path, and its errors."""

from __future__ import annotations

import json

import pytest

from hf_lowmem.demo import main
from hf_lowmem.demo.settings import Settings, parse_args

pytest.importorskip("trl")
pytest.importorskip("matplotlib")

from hf_lowmem.demo.data import build_pairs, train_tokenizer
from hf_lowmem.demo.report import headline
from hf_lowmem.demo.train import run_demo

TINY_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def pairs():
    return build_pairs()


def paragraphs(split):
    return {paragraph for pair in split for paragraph in pair["completion"].removeprefix(" ").split("\n\n")}


def test_pairs_are_enough_and_the_same_every_time(pairs):
    train, held_out = pairs
    assert len(train) > 3000
    assert len(held_out) > 300
    assert build_pairs() == pairs


def test_pairs_do_not_depend_on_what_other_packages_replace(pairs, monkeypatch):
    monkeypatch.setattr("abc.abstractmethod.__doc__", "Another package's words, which are long enough to be a pair.")
    monkeypatch.setattr("shutil.copy", lambda source, target: None)
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")  # leaves the docstrings out
    assert build_pairs() == pairs


def test_no_paragraph_is_in_both_splits(pairs):
    train, held_out = pairs
    assert not paragraphs(train) & paragraphs(held_out)


def test_tokenizer_gives_back_every_text(pairs):
    train, held_out = pairs
    tokenizer = train_tokenizer(train[:500], vocab_size=512)
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    for pair in held_out[:50]:
        assert tokenizer.decode(tokenizer(pair["completion"])["input_ids"]) == pair["completion"]


def test_short_run_writes_table_figure_and_numbers(tmp_path, capsys):
    settings = Settings(
        optims=("adamw_torch", "slim_adamw_8bit"),
        steps=3,
        batch_size=2,
        output_dir=tmp_path / "out",
        vocab_size=512,
        max_length=32,
        held_out_pairs=8,
        model=TINY_MODEL,
    )
    run_demo(settings)

    shown = capsys.readouterr().out
    for text in ("adamw_torch", "slim_adamw_8bit", "bytes per", "held-out", "s per"):
        assert text in shown
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert {"settings", "device", "platform", "versions", "baseline", "runs"} <= set(report)
    assert {"python", "torch", "transformers", "trl"} <= set(report["versions"])
    adamw, slim = report["runs"]
    assert adamw["optim"] == "adamw_torch"
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8, abs=0.001)
    assert adamw["held_out_loss_change_percent"] == 0
    assert slim["state_bytes_per_parameter_outside_embeddings"] < 1.1
    assert slim["parameters"] == adamw["parameters"]
    assert [step for step, _ in slim["train_losses"]] == [1, 2, 3]
    assert slim["train_losses"][0] == adamw["train_losses"][0]  # the same weights and the same first batch
    assert slim["held_out_losses"][-1] == [3, slim["held_out_loss"]]
    assert slim["seconds_per_step"] > 0
    change = f"{slim['held_out_loss_change_percent']:+.1f} %"
    less = adamw["state_bytes"] / slim["state_bytes"]
    shown = headline([adamw, slim])
    assert shown == f"slim_adamw_8bit: {less:.1f} times less optimizer state than AdamW, held-out loss {change}"
    assert headline([adamw]) == headline([slim]) == ""


def test_unknown_optim_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--optims", "adamw_torch,slim_adam_8bit", "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "slim_adam_8bit" in message
    assert "slim_adamw_8bit" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--steps", "--batch-size", "--learning-rate"])
def test_options_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        parse_args([option, "0"])
    assert option in capsys.readouterr().err


def test_help_of_both_demos(capsys):
    for argv, shown in ((["--help"], "--rlhf"), (["--rlhf", "--help"], "--scale")):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        assert shown in capsys.readouterr().out
