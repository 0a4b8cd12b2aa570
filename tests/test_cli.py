"""`hf-lowmem`: quick answers, scripts run with our names, and TRL's SFT on the user's model and data."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.cli import TRL_TASKS, main

NAMES = hf_lowmem.optim_names()


@pytest.mark.parametrize("option", [["--help"], ["optims"], ["--version"]])
def test_help_and_optims_answer_at_once(option):
    code = (
        "import sys; from hf_lowmem.cli import TRL_TASKS, main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *option], capture_output=True, text=True)
    assert done.returncode == 0, "torch, transformers or trl was imported"
    commands = ["run", *TRL_TASKS, "inspect", "optims", "doctor", "demo", "--version"]
    said = {"--help": commands, "optims": NAMES, "--version": [f"hf-lowmem {version('hf_lowmem')}"]}
    assert all(word in done.stdout for word in said[option[0]])


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
        (["inpsect", "m"], "hf-lowmem: there is no command 'inpsect' (did you mean 'inspect'?)."),
        (["insp"], "hf-lowmem: there is no command 'insp' (did you mean 'inspect'?)."),
        (["docter"], "hf-lowmem: there is no command 'docter' (did you mean 'doctor'?)."),
        (["distil", "--help"], "hf-lowmem: there is no command 'distil' (did you mean 'distillation'?)."),
        (["optim"], "hf-lowmem: there is no command 'optim' (did you mean 'optims'?)."),
        (["version"], "hf-lowmem: there is no command 'version' (did you mean '--version'?)."),
        (["xyzzy"], "hf-lowmem: there is no command 'xyzzy'; the commands: run, sft, reward, "),
        (["--verison"], "hf-lowmem: Unexpected '--verison' (did you mean '--version'?)."),
        (["inspect"], "hf-lowmem inspect: the following arguments are required: model."),
        (["inspect", "m", "--otpim", "soap"], "hf-lowmem inspect: Unexpected '--otpim' (did you mean '--optim'?)."),
        (["inspect", "m", "--dtype", "bf16"], "hf-lowmem inspect: argument --dtype: invalid choice: 'bf16' "),
        (["inspect", "m", "--rows"], "hf-lowmem inspect: --rows needs --optim NAME: see `hf-lowmem optims`."),
        (["inspect", "m", "--optim-args", "x=1"], "hf-lowmem inspect: --optim-args needs --optim NAME: see "),
        (["inspect", "m", "--optim", "adamw_trch"], "hf-lowmem inspect: Unknown optim name 'adamw_trch'; the nearest"),
        (["optims", "extra"], "hf-lowmem optims: Unexpected 'extra'; hf-lowmem optims --help lists what it takes."),
        (["doctor", "--jsn"], "hf-lowmem doctor: Unexpected '--jsn' (did you mean '--json'?)."),
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
