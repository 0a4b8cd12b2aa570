"""`hf-lowmem snr` on a tiny script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.cli import main
from hf_lowmem.snr.ratios import Measured
from hf_lowmem.snr.rules import Criterion
from hf_lowmem.snr_report import pattern, stability

SCRIPT = """
import sys
from pathlib import Path
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
tokens = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})
arguments = dict(max_steps=20, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, eval_on_start=True)
args = TrainingArguments("run", optim="slim_adamw_8bit", optim_args="min_8bit_size=0,conservative=true", **arguments)
trainer = Trainer(model, args, train_dataset=tokens)
try:
    trainer.train()
except Exception:
    pass
Path("unreached").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in a process that a command may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    return tmp_path


def test_a_script_is_measured_stopped_and_its_rules_train(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "train.py").write_text(SCRIPT)
    main(["snr", "run", "--steps", "4", "--every", "2", "train.py"])
    assert "trains with lowmem_adamw_8bit in place of slim_adamw_8bit" in caplog.text
    assert f'optim_args="rules={folder / "snr" / "rules.json"}"' in capsys.readouterr().out
    assert not (folder / "unreached").exists()
    assert not list((folder / "run").glob("checkpoint-*"))
    lines = (folder / "snr" / "snr.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == {"1", "2", "4"}
    assert (folder / "snr" / "snr.png").read_bytes().startswith(b"\x89PNG")

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    explained = hf_lowmem.explain(model, "slim_adamw", f"rules={folder / 'snr' / 'rules.json'}")
    assert all(row.why == "rules file, by name" for row in explained.rows)


CSV = """step,key,shape,compress_dims,snr,mean_sqr,var
1,h.0.up.weight,"(8, 4)","(0,)",2.0,1,1
1,h.1.up.weight,"(8, 4)","(0,)",0.5,1,1
2,h.0.up.weight,"(8, 4)","(0,)",4.0,1,1
2,h.1.up.weight,"(8, 4)","(0,)",0.7,1,1
1,norm.weight,"(8,)","(0,)",9.0,1,1
"""


def test_show_and_rules(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("snr.csv").write_text(CSV)
    main(["snr", "show", "snr.csv"])
    said = capsys.readouterr().out.splitlines()
    (row,) = (line for line in said if line.startswith("h.*.up.weight"))
    assert row.split() == ["h.*.up.weight", "2", "1.80", "4", "of", "4", "axis", "0", "x", "1,", "full", "x", "1"]
    # Of 72 entries, one matrix of 32 keeps 4 at cut-off 1.
    (row,) = (line for line in said if line.split()[:1] == ["1"])
    assert row.split() == ["1", "38.89", "%", "2.444", "1", "of", "3"]
    assert Path("snr.png").stat().st_size > 1000

    main(["snr", "rules", "snr.csv", "--cutoff", "0.55", "--smallest", "--output", "my.json"])
    assert json.loads(Path("my.json").read_text()) == {
        "h.0.up.weight": [0],
        "h.1.up.weight": None,
        "norm.weight": None,
    }
    assert 'Train with optim="slim_adamw" (or "slim_adamw_8bit") and optim_args="rules=my' in capsys.readouterr().out
    main(["snr", "rules", "snr.csv", "--bytes-per-param", "1"])
    assert json.loads(Path("rules.json").read_text())["h.1.up.weight"] == [0]
    Path("snr.csv").write_text(CSV + '3,h.1.up.weight,"(8, 4)",row_col,9,1,1\n')
    main(["snr", "rules", "snr.csv"])
    assert 'Train with optim="factored_adamw" (or "factored_adamw_8bit")' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rules", "none.csv"], "'none.csv' is not a readable CSV"),
        (["rules", "snr.csv", "--bytes-per-param", "0.1"], "--bytes-per-param 0.1 is too small: 0.8889 bytes per"),
        (["rules", "snr.csv", "--bytes-per-param", "1", "--cutoff", "2"], "not allowed with argument"),
        (["run", "--cutoff", "nan", "train.py"], "argument --cutoff: 'nan' must be a finite number above 0"),
        (["run", "--bytes-per-param", "0", "train.py"], "argument --bytes-per-param: '0' must be a finite number"),
        (["run", "sgd.py"], "SGD keeps no full second moment of any weight, so"),
        (["run", "adafactor.py"], "Adafactor keeps no full second moment of model.embed_tokens.weight, so"),
        (["run", "resume.py"], "the script resumes from a checkpoint: call Trainer.train without"),
        (["run", "none.py"], "there is no script 'none.py'"),
        (["run", "--steps", "0", "none.py"], "argument --steps: '0' must be a whole number of at least 1"),
        (["run", "empty.py"], "'empty.py' ended before anything was measured"),
        (["shows"], "invalid choice: 'shows'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    argv: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("snr.csv").write_text(CSV)
    Path("empty.py").touch()
    Path("resume.py").write_text(SCRIPT.replace(".train()", ".train(resume_from_checkpoint=True)"))
    for optim in ("sgd", "adafactor"):
        Path(f"{optim}.py").write_text(SCRIPT.replace("slim_adamw_8bit", optim).replace("optim_args=", "run_name="))
    with pytest.raises(SystemExit, match="2"):
        main(["snr", *argv])
    written = capsys.readouterr().err
    assert said in written
    assert "Traceback" not in written
    assert not Path("unreached").exists()


def test_stability_and_patterns() -> None:
    measured = Measured("w", (4, 4), {(0,): {1: 2.0, 2: 0.5}, (1,): {1: 1.5, 2: 0.1}})
    assert stability([(measured, (0,))], Criterion()) == (1, 2)
    assert pattern("model.layers.11.mlp.experts.3.w1.weight[up]") == "model.layers.*.mlp.experts.*.w1.weight[up]"
