"""`hf-lowmem inspect`: roles, rows, all names compared, and folders that hold no model."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lowmem
from hf_lowmem.cli import main
from hf_lowmem.sizes import readable

LLAMA_8B = {
    **dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, hidden_size=4096),
    **dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
}


@pytest.fixture
def shown(capsys, model_folder):
    def show(*options, model=model_folder):
        assert main(["inspect", str(model), *options]) == 0
        return capsys.readouterr().out

    return show


def test_roles_rows_and_json(shown, model_folder):
    by_role = shown("--optim", "slim_adamw_8bit", "--optim-args", "min_8bit_size=64")
    assert "attention_query" in by_role
    assert "unknown" not in by_role
    assert shown("--optim", "adam_mini", model=model_folder / "config.json") != by_role
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = shown("--optim", "slim_adamw", "--rows").splitlines()
    assert all(any(line.startswith(f"{name} ") for line in rows) for name, _ in model.named_parameters())
    kahan = ("--optim", "slim_adamw", "--optim-args", "rounding=kahan", "--json")
    narrow, wide = (json.loads(shown(*kahan, "--dtype", dtype)) for dtype in ("bfloat16", "float32"))
    assert narrow["bytes"] == wide["bytes"] + 2 * wide["parameters"]
    table = json.loads(shown("--optim", "slim_adamw", "--json"))
    assert table == json.loads(json.dumps(hf_lowmem.explain(model, "slim_adamw").to_dict()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optim", ["slim_adamw_8bit", "soap", "adamw_torch", "adamw_torch_fused"])
def test_the_total_is_compared_with_adamw_in_the_same_dtype(optim, dtype, shown, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).to(getattr(torch, dtype))
    weights = sum(param.nbytes for param in model.parameters())
    adamw = 2 * weights + 4 * len(list(model.parameters()))
    out = shown("--optim", optim, "--dtype", dtype)
    assert max(map(len, out.splitlines())) <= 100
    state, total = (next(x for x in out.splitlines() if x.startswith(what)) for what in ("optimizer state", "all "))
    found = hf_lowmem.explain(model, optim)
    assert f"{found.nbytes:,}  {readable(found.nbytes)}  {readable(adamw)}" in " ".join(state.split()).replace(
        f"{found.nbytes:,} {readable(found.nbytes)} ", f"{found.nbytes:,}  {readable(found.nbytes)}  "
    )
    assert readable(2 * weights + found.nbytes) in total
    assert readable(2 * weights + adamw) in total
    assert f"AdamW in {dtype}" in out


def test_all_names_are_compared_without_one(shown, model_folder):
    out = shown("--dtype", "bfloat16")
    assert max(map(len, out.splitlines())) <= 100
    lines = out.splitlines()[-len(hf_lowmem.optim_names()) - 1 :]
    assert {line.split()[0] for line in lines} == {*hf_lowmem.optim_names(), "adamw_torch"}
    model = AutoModelForCausalLM.from_pretrained(model_folder).bfloat16()
    sizes = []
    for line in lines:
        name, each, *rest = line.split()
        found = hf_lowmem.explain(model, name)
        sizes.append(found.nbytes)
        assert each == f"{found.bytes_per_param:.3f}"
        assert " ".join(rest).startswith(readable(found.nbytes))
        assert readable(found.total_bytes) in line
        percent = round(100 * found.nbytes / found.adamw_nbytes - 100)
        assert (f"{percent:+d} %" if percent else "same") in line
    assert sizes == sorted(sizes)
    table = json.loads(shown("--dtype", "bfloat16", "--json"))
    assert [entry["bytes"] for entry in sorted(table.values(), key=lambda entry: entry["bytes"])] == sizes


FOLDERS = {  # folder: files
    "empty": {},
    "adapters": {"adapter_config.json": '{"base_model_name_or_path": "some/base"}', "adapter_model.safetensors": ""},
    "nameless": {"adapter_config.json": "{}"},
    "data": {"train.jsonl": "{}"},
    "torn": {"config.json": '{"model_type": "lla'},
    "binary": {"config.json": "\0\1"},
    "list": {"config.json": "[]"},
    "typeless": {"config.json": '{"_class_name": "UNet2DConditionModel"}'},
    "unknown": {"config.json": '{"model_type": "lama"}'},
    "foreign": {"config.json": '{"model_type": "my_own", "auto_map": {"AutoConfig": "own.Config"}}'},
    "architecture": {"config.json": '{"model_type": "llama", "architectures": ["LlamaForPoetry"]}'},
    "odd": {"config.json": '{"model_type": "llama", "hidden_size": "wide"}'},
    "negative": {"config.json": '{"model_type": "llama", "hidden_size": -4, "num_attention_heads": 2}'},
}


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("./nowhere", "there is no folder or file './nowhere'."),
        ("no/such/folder", "there is no folder or file 'no/such/folder'."),
        ("~/no_such_folder", "there is no folder or file '~/no_such_folder'."),
        ("nowhere/config.json", "there is no folder or file 'nowhere/config.json'."),
        ("nowhere", "'nowhere' is neither a folder here nor a model in the cache or on the hub."),
        ("some/model", "'some/model' is neither a folder here nor a model in the cache or on the hub."),
        ("not a name", "'not a name' is neither a folder here nor a model in the cache or on the hub."),
        ("empty", "the folder 'empty' holds no config.json, so it is not a model's."),
        ("data", "the folder 'data' holds no config.json, so it is not a model's."),
        ("data/train.jsonl", "'data/train.jsonl' has no model_type, so it is not the config of a transformers model."),
        ("adapters", "the folder 'adapters' holds adapters only: inspect the model that they belong to, 'some/base'."),
        ("nameless", "the folder 'nameless' holds adapters only: inspect the model that they belong to."),
        ("torn", "'torn/config.json' is not valid JSON: Unterminated string"),
        ("binary", "'binary/config.json' is not valid JSON: "),
        ("list", "'list/config.json' must hold a JSON object, not list."),
        ("typeless", "'typeless/config.json' has no model_type, so it is not the config of a transformers model."),
        ("unknown", "'unknown/config.json' has the model_type 'lama', which transformers "),
        ("foreign", "'foreign/config.json' has the model_type 'my_own', which transformers "),
        ("architecture", "'architecture/config.json' has the architecture 'LlamaForPoetry', which transformers "),
        ("odd", "transformers cannot build a model from 'odd/config.json': "),
        ("negative", "transformers cannot build a model from 'negative/config.json': "),
    ],
)
def test_what_is_no_model_is_named_in_one_sentence(model, sentence, tmp_path, monkeypatch, capsys):
    for folder, files in FOLDERS.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--optim", "signum"]):
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", model, *options])
        error = capsys.readouterr().err
        assert error.startswith(f"hf-lowmem inspect: {sentence}")
        assert error.count("\n") == 1


def test_illegal_options_are_named(model_folder, capsys):
    for options in (["signum", "--optim-args", "x=1"], ["adamw_torch", "--optim-args", "x=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", str(model_folder), "--optim", *options])
        error = capsys.readouterr().err
        assert error.startswith("hf-lowmem inspect: optim_args ")
        assert error.count("\n") == 1


def test_configs_without_architectures(shown, tmp_path):
    for kind, roles in {"bert": ["token_embedding"], "llama": ["lm_head"], "vit": ["patch_conv"]}.items():
        small = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps({**small, "vocab_size": 64, "intermediate_size": 64}))
        out = shown("--optim", "signum", model=tmp_path)
        assert all(role in out for role in roles)


@pytest.fixture
def llama_8b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


PROCESS = [sys.executable, "-m", "hf_lowmem"]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "statuses"), [("--json", {141}), ("--rows", {0, 141})])
def test_a_closed_pipe_is_quiet(option, statuses, llama_8b):
    """As `| head`. The JSON is more than a pipe holds; of the rows some or all may be written before it is closed."""
    command = [*PROCESS, "inspect", str(llama_8b), "--optim", "soap", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline()
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode in statuses


def test_a_model_of_8b_is_compared_without_its_weights(llama_8b):
    """No weight or state is allocated, and the Trainer, whose import takes seconds, is not imported."""
    code = (
        "import os, resource, sys\n"
        "from hf_lowmem import cli\n"
        "def leave(status):\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "    sys.exit('transformers.trainer' in sys.modules or status)\n"
        "os._exit = leave\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(llama_8b)], capture_output=True, text=True)
    assert done.returncode == 0, "transformers' Trainer was imported"
    kib = int(done.stderr.split()[-1])
    assert kib < 2 << 20, "the weights take 15 GiB, and the imports less than one"


@pytest.mark.parametrize("optim", ["slim_adamw_8bit", "coap_adamw", "adamw_torch"])
def test_what_one_of_several_processes_holds(optim, shown, model_folder):
    alone, shared = (json.loads(shown("--optim", optim, "--json", "--ranks", ranks)) for ranks in ("1", "4"))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    held = sum(-(-param.shape[0] // 4) * param[0].nbytes for param in model.parameters())
    assert shared["weight_bytes"] == shared["gradient_bytes"] == held
    assert shared["parameters"] == alone["parameters"]
    assert shared["bytes"] < 0.3 * alone["bytes"]
    assert (shared["step_bytes"] > 0) == (optim == "coap_adamw")
    assert alone["step_bytes"] == 0
    out = shown("--optim", optim, "--ranks", "4")
    assert f"{shared['bytes']:,} bytes of state for {shared['parameters']:,} trainable parameters" in out
    assert "on each of 4 processes" in out
    assert ("extra during a step" in out) == (optim == "coap_adamw")
    assert max(map(len, out.splitlines())) <= 100
    assert "each of 4 processes" in shown("--ranks", "4")


@pytest.mark.parametrize("ranks", ["0", "-2"])
def test_a_number_of_processes_is_positive(ranks, model_folder, capsys):
    for options in ([], ["--optim", "slim_adamw"]):
        with pytest.raises(SystemExit, match="2"):
            main(["inspect", str(model_folder), "--ranks", ranks, *options])
        assert f"ranks={ranks} must be the number of processes" in capsys.readouterr().err
