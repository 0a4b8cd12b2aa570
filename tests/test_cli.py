"""`hf-lowmem`: quick answers, scripts run with our names, and TRL's SFT on the user's model and data."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.cli import TRL_TASKS, main

NAMES = hf_lowmem.optim_names()
DTYPES = ("bfloat16", "float32")


@pytest.mark.parametrize("option", [["--help"], ["optims"]])
def test_help_and_optims_answer_at_once(option):
    code = (
        "import sys; from hf_lowmem.cli import TRL_TASKS, main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *option], capture_output=True, text=True)
    assert done.returncode == 0, "torch, transformers or trl was imported"
    for word in ["run", *TRL_TASKS, "inspect", "optims", "demo"] if option == ["--help"] else NAMES:
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
        (["grpo", "--config", "missing.yaml"], "hf-lowmem grpo: there is no config file 'missing.yaml'."),
        (["inspect", "m", "--optim", "slim_adam"], "hf-lowmem inspect: Unknown optim name 'slim_adam'; the nearest"),
        (["sft", "--optim", "slim_adam"], "hf-lowmem sft: Unknown optim name 'slim_adam'; the nearest names: slim_ad"),
        (["dpo", "--optim", "slim_adam"], "hf-lowmem dpo: Unknown optim name 'slim_adam'; the nearest names: slim_ad"),
        (["sft", "--optim=adamw_torhc"], "hf-lowmem sft: Unknown optim name 'adamw_torhc'; the nearest names: adamw_"),
        (["sft", "--config", "bad.yaml"], "hf-lowmem sft: Unknown optim name 'adammini'; the nearest names: adam_min"),
        (["sft", "--config=bad.yaml"], "hf-lowmem sft: Unknown optim name 'adammini'; the nearest names: adam_min"),
        (["dpo", "--config=missing.yaml"], "hf-lowmem dpo: there is no config file 'missing.yaml'."),
        (["dpo", "--config"], "hf-lowmem dpo: --config needs the name of a YAML file."),
        (
            ["dpo", "--config", "broken.yaml"],
            "hf-lowmem dpo: the config file is not valid YAML: mapping values are no",
        ),
        (["dpo", "--config", "typo.yaml"], "hf-lowmem dpo: Unknown config key 'lerning_rate'; the nearest names: lea"),
        (["dpo", "--lerning_rate", "1"], "hf-lowmem dpo: Unknown option '--lerning_rate'; the nearest names: --learn"),
        (["dpo", "--learning_rate", "x"], "hf-lowmem dpo: argument --learning_rate/--learning-rate: invalid float va"),
        (["dpo"], "hf-lowmem dpo: No data is given: add --dataset_name with a data file, a local folder or a hub id."),
    ],
)
def test_mistakes_are_answered_in_one_sentence(argv, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.yaml").write_text("optim: adammini\nlearning_rate: 1e-3\n")
    (tmp_path / "broken.yaml").write_text("optim: adam_mini\n max_steps: 1: 2\n")
    (tmp_path / "typo.yaml").write_text("num_processes: 2\nlerning_rate: 1e-3\n")
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
    kahan = ("--optim", "slim_adamw", "--optim-args", "rounding=kahan")
    narrow, wide = (json.loads(shown(str(model_folder), *kahan, "--dtype", dtype, "--json")) for dtype in DTYPES)
    assert narrow["bytes"] == wide["bytes"] + 2 * wide["parameters"]
    table = json.loads(shown(str(model_folder), "--optim", "slim_adamw", "--json"))
    assert table == json.loads(json.dumps(hf_lowmem.explain(model, "slim_adamw").to_dict()))


def test_inspect_names_what_is_wrong(tmp_path, model_folder, capsys):
    for argv in ([str(tmp_path)], [str(model_folder), "--optim-args", "x=1"]):
        with pytest.raises(SystemExit):
            main(["inspect", *argv, "--optim", "signum"])
        assert capsys.readouterr().err.startswith("hf-lowmem inspect: ")
