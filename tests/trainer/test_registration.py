"""Every optim name works wherever transformers and TRL take an optim, and builds the same optimizer everywhere."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lowmem
from hf_lowmem.trainer.names import OPTIM_NAMES, OptimName

NAMES = hf_lowmem.optim_names()


@pytest.fixture(autouse=True)
def _registered():
    hf_lowmem.register()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_bias=True,
        )
    )


def arguments(tmp_path, **kwargs):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **kwargs)


def described(optimizer):
    """The class, the groups and the layouts of an optimizer, parameters by identity."""
    groups = [{**group, "params": [id(param) for param in group["params"]]} for group in optimizer.param_groups]
    return type(optimizer), groups, optimizer.state_dict()["layouts"]


@pytest.mark.parametrize("name", NAMES)
def test_training_arguments_take_the_name(name, tmp_path):
    args = arguments(tmp_path, optim=name)
    member = args.optim
    assert isinstance(member, OptimizerNames)
    assert member == name
    assert member is OptimizerNames(name) is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper())
    assert list(OptimizerNames).count(member) == 1
    assert arguments(tmp_path).set_optimizer(name).optim is member
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == name
    assert copy.deepcopy(args).optim is copy.copy(member) is pickle.loads(pickle.dumps(args)).optim is member


def test_registering_again_changes_nothing():
    before = list(OptimizerNames)
    hf_lowmem.register()
    assert list(OptimizerNames) == before


def test_transformers_own_names_are_kept(monkeypatch, caplog, tmp_path, model):
    monkeypatch.setitem(OPTIM_NAMES, "adafactor", OptimName("slim_adamw", None, 4.0, ""))
    hf_lowmem.register()
    assert "has its own optim 'adafactor'" in caplog.text
    optimizer_cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="adafactor"), model)
    assert optimizer_cls.__name__ == "Adafactor"


def test_command_line_takes_the_names(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    for name in NAMES:
        (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
        assert args.optim is OptimizerNames(name)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "slim_adam"])
    assert "slim_adamw_8bit" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["SFTConfig", "DPOConfig", "RewardConfig", "GRPOConfig", "RLOOConfig", "KTOConfig"])
def test_every_trl_config_and_its_parser_take_the_names(config, tmp_path):
    trl = pytest.importorskip("trl")
    config_cls = getattr(trl, config)
    assert config_cls(output_dir=str(tmp_path), optim="slim_adamw_8bit", bf16=False).optim == "slim_adamw_8bit"
    (tmp_path / "config.yaml").write_text(
        f"output_dir: {tmp_path}\noptim: adam_mini_8bit\nbf16: false\noptim_args: '{{\"state_bits\": 8}}'\n"
    )
    parser = trl.TrlParser(config_cls)
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
    assert args.optim is OptimizerNames("adam_mini_8bit")
    assert json.loads(args.optim_args) == {"state_bits": 8}
    (args,) = parser.parse_args_and_config(["--config", str(tmp_path / "config.yaml"), "--optim", "signum"])
    assert args.optim is OptimizerNames("signum")


@pytest.mark.slow
def test_training_args_bin_loads_where_nothing_is_registered(tmp_path):
    torch.save([arguments(tmp_path, optim=name) for name in NAMES], tmp_path / "training_args.bin")
    code = (
        f"import sys, torch; loaded = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False); "
        "print(*(args.optim.value for args in loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == NAMES, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_builds_what_build_optimizer_builds(name, model, tmp_path):
    args = arguments(
        tmp_path, optim=name, learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    options = {"lr": 3e-4, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = described(hf_lowmem.build_optimizer(model, name, **options, weight_decay=0.1))
    assert described(Trainer(model, args).create_optimizer()) == expected
    patch_free = hf_lowmem.optimizer_cls_and_kwargs(model, name, **options)
    args.set_optimizer("adamw_torch", weight_decay=0.1)
    assert described(Trainer(model, args, optimizer_cls_and_kwargs=patch_free).create_optimizer()) == expected


def test_weight_decay_spares_biases_and_norms(model):
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3, weight_decay=0.1)
    decay = {id(param): group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        assert decay.pop(id(param)) == (0.0 if "norm" in name or "bias" in name else 0.1), name
    assert not decay


def test_a_users_decay_rule_is_kept(model, tmp_path):
    class OnlyHead(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return ["lm_head.weight"]

    optimizer = OnlyHead(model, arguments(tmp_path, optim="slim_adamw_8bit", weight_decay=0.1)).create_optimizer()
    decayed = [param for group in optimizer.param_groups if group["weight_decay"] for param in group["params"]]
    assert [id(param) for param in decayed] == [id(model.lm_head.weight)]


@pytest.mark.parametrize("optim_args", ["state_bits=16", '{"state_bits": 16}', {"state_bits": 16}])
def test_the_trainer_passes_optim_args_on(optim_args, model, tmp_path):
    trainer = Trainer(model, arguments(tmp_path, optim="slim_adamw", optim_args=optim_args))
    expected = hf_lowmem.build_optimizer(model, "slim_adamw", lr=5e-5, optim_args="state_bits=16")
    assert described(trainer.create_optimizer()) == described(expected)
    assert described(expected) != described(hf_lowmem.build_optimizer(model, "slim_adamw", lr=5e-5))


@pytest.mark.parametrize("optim_args", ["state_bits", "rulez=a.json", '{"state_bits": true}', '{"state_bits"'])
def test_the_trainer_refuses_illegal_optim_args(optim_args, model, tmp_path):
    with pytest.raises(ValueError, match=r"^optim_args "):
        Trainer(model, arguments(tmp_path, optim="slim_adamw", optim_args=optim_args)).create_optimizer()


def test_other_optimizers_see_their_optim_args_as_before(model, tmp_path):
    args = arguments(tmp_path, optim="adamw_anyprecision", optim_args="use_kahan_summation=True, eps=1")
    from transformers import trainer

    assert trainer._parse_optim_args(args.optim_args) == {"use_kahan_summation": "True", "eps": "1"}


def test_without_a_model_the_shapes_decide(model, tmp_path, caplog):
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="slim_adamw_8bit"))
    assert "No model was given for optim 'slim_adamw_8bit'" in caplog.text
    optimizer = optimizer_cls(model.parameters(), **kwargs)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_unknown_name_is_answered_with_the_nearest(model):
    with pytest.raises(ValueError, match=r"^Unknown optim name 'slim_adam'; .*slim_adamw, slim_adamw_8bit"):
        hf_lowmem.build_optimizer(model, "slim_adam", lr=1e-3)
    with pytest.raises(ValueError, match=r"^Unknown optim name 'adamw_torch'"):
        hf_lowmem.optimizer_cls_and_kwargs(model, "adamw_torch", lr=1e-3)
