"""`hf-lowmem`: quick answers, scripts run with our names, and TRL's SFT on the user's model and data."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_lowmem
from hf_lowmem.cli import main

NAMES = hf_lowmem.optim_names()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of single characters and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("option", [["--help"], ["optims"]])
def test_help_and_optims_answer_at_once(option):
    code = (
        "import sys; from hf_lowmem.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *option], capture_output=True, text=True)
    assert time.perf_counter() - start < 1
    assert done.returncode == 0, "torch, transformers or trl was imported"
    for word in ["run", "sft", "inspect", "optims", "demo"] if option == ["--help"] else NAMES:
        assert word in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_listed_bytes_per_parameter_are_those_of_llama_2_7b(name, llama_2_7b, capsys):
    main(["optims"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name)
    assert line.split()[1] == f"{hf_lowmem.explain(llama_2_7b, name).bytes_per_param:.3f}"


@pytest.fixture(scope="module")
def llama_2_7b():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008))


@pytest.mark.parametrize("argv", [["run", "script.py", "--x", "-h"], ["script.py", "--x", "-h"]])
def test_run_is_python_with_our_names(argv, tmp_path, monkeypatch, capsys):
    (tmp_path / "neighbour.py").write_text("value = 3")
    (tmp_path / "script.py").write_text(
        "import sys, neighbour\n"
        "from transformers.training_args import OptimizerNames\n"
        "print(__name__, sys.argv, neighbour.value, OptimizerNames('slim_adamw_8bit').value)\n"
        "sys.exit(5)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    with pytest.raises(SystemExit, match="5"):
        main(argv)
    assert capsys.readouterr().out == "__main__ ['script.py', '--x', '-h'] 3 slim_adamw_8bit\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["run", "missing.py"], "hf-lowmem run: there is no script 'missing.py'."),
        (["missing.py"], "hf-lowmem run: there is no script 'missing.py'."),
        (["sft", "--config", "missing.yaml"], "hf-lowmem sft: there is no config file 'missing.yaml'."),
        (["inspect", "m", "--optim", "slim_adam"], "hf-lowmem inspect: Unknown optim name 'slim_adam'; the nearest"),
        (["sft", "--optim", "slim_adam"], "hf-lowmem sft: Unknown optim name 'slim_adam'; the nearest names: slim_ad"),
        (["sft", "--optim=adamw_torhc"], "hf-lowmem sft: Unknown optim name 'adamw_torhc'; the nearest names: adamw_"),
        (["sft", "--config", "bad.yaml"], "hf-lowmem sft: Unknown optim name 'adammini'; the nearest names: adam_min"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(argv, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.yaml").write_text("optim: adammini\nlearning_rate: 1e-3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1


def test_inspect_shows_roles_rows_and_json(model_folder, capsys):
    def shown(*options):
        main(["inspect", *options])
        return capsys.readouterr().out

    by_role = shown(str(model_folder), "--optim", "slim_adamw_8bit", "--optim-args", "min_8bit_size=64")
    assert "attention_query" in by_role
    assert "unknown" not in by_role
    assert shown(str(model_folder / "config.json"), "--optim", "adam_mini") != by_role
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = shown(str(model_folder), "--optim", "slim_adamw", "--rows")
    assert all(name in rows for name, _ in model.named_parameters())
    table = json.loads(shown(str(model_folder), "--optim", "slim_adamw", "--json"))
    assert table == json.loads(json.dumps(hf_lowmem.explain(model, "slim_adamw").to_dict()))


def test_inspect_names_what_is_wrong(tmp_path, model_folder, capsys):
    for argv in ([str(tmp_path)], [str(model_folder), "--optim-args", "x=1"]):
        with pytest.raises(SystemExit):
            main(["inspect", *argv, "--optim", "signum"])
        assert capsys.readouterr().err.startswith("hf-lowmem inspect: ")


def test_sft_help_lists_our_names(capsys):
    pytest.importorskip("trl")
    with pytest.raises(SystemExit, match="0"):
        main(["sft", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: hf-lowmem sft ")
    assert ".jsonl" in shown
    assert "(default: slim_adamw_8bit)" in " ".join(shown.split())
    assert all(name in shown for name in [*NAMES, "adamw_torch"])


@pytest.mark.slow
def test_sft_trains_a_local_model_on_a_jsonl_file(model_folder, tmp_path, monkeypatch, caplog):
    pytest.importorskip("trl")
    rows = [{"prompt": f"What is {n} + 1? ", "completion": str(n + 1)} for n in range(32)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        "num_processes: 1\nmax_steps: 2\nsave_steps: 1\neval_strategy: steps\neval_steps: 1\nreport_to: none\n"
        "bf16: false\nuse_cpu: true\nresume_from_checkpoint: false\noptim_args: embedding_bits=8\n"
    )
    paths = {"model_name_or_path": model_folder, "dataset_name": "data.jsonl", "config": "config.yaml"}
    argv = [word for option, path in paths.items() for word in (f"--{option}", str(tmp_path / path))]
    argv += ["--test_split_size", "0.25", "--output_dir", str(tmp_path / "out")]
    main(["sft", *argv])
    arguments = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.optim == "slim_adamw_8bit"
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert sum("eval_loss" in entry for entry in state["log_history"]) == 2
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_folder, tmp_path / "out"))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name

    # scripts/sft.py does the same, and resumes from the last checkpoint that was not cut short
    os.truncate(tmp_path / "out" / "checkpoint-2" / "optimizer.pt", 100)
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv, "--resume_from_checkpoint", "True", "--max_steps", "3"])
    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "sft.py"), run_name="__main__")
    assert "checkpoint-2: optimizer.pt is cut short" in caplog.text
    steps = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"]
    assert steps == 3


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        (
            "data.tar",
            [],
            r"--dataset_name .*data\.tar is a file that ends in none of \.jsonl, \.json, \.csv, \.parquet\.",
        ),
        ("data.jsonl", ["--eval_strategy", "epoch"], r"--eval_strategy with the data file .* needs --test_split_size"),
    ],
)
def test_sft_says_what_a_data_file_lacks(file, options, sentence, tmp_path, monkeypatch):
    sft = pytest.importorskip("hf_lowmem.trainer.sft")
    (tmp_path / file).touch()
    argv = ["sft.py", "--dataset_name", str(tmp_path / file), "--output_dir", str(tmp_path), "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    with pytest.raises(ValueError, match=sentence):
        sft.main()
