"""Pins what we touch inside transformers, TRL and accelerate, so that a new release fails here and says where."""

import importlib
import importlib.util
import inspect
import os
from enum import Enum

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments, trainer, trainer_optimizer, training_args
from transformers.trainer_utils import get_last_checkpoint

from hf_lowmem.cli import TRL_TASKS
from hf_lowmem.trainer import clipping, registration


def test_optimizer_names_is_an_enum_of_strings_with_the_tables_that_a_member_is_added_to():
    names = training_args.OptimizerNames
    assert issubclass(names, str)
    assert issubclass(names, Enum)
    member = names("adamw_torch")
    assert names._value2member_map_["adamw_torch"] is names._member_map_["ADAMW_TORCH"] is member
    assert "ADAMW_TORCH" in names._member_names_
    added = registration.optim_member("slim_adamw")
    assert vars(member).keys() <= vars(added).keys()


def test_the_trainer_reads_the_handler_table_that_we_add_to():
    assert trainer._OPTIMIZER_HANDLERS is trainer_optimizer._OPTIMIZER_HANDLERS
    assert training_args.OptimizerNames("adamw_torch") in trainer_optimizer._OPTIMIZER_HANDLERS
    used = inspect.unwrap(Trainer.get_optimizer_cls_and_kwargs).__code__.co_names
    assert {"_OPTIMIZER_HANDLERS", "_parse_optim_args"} <= set(used)


def test_the_context_that_a_handler_gets(monkeypatch, tmp_path):
    contexts = []
    member = training_args.OptimizerNames("adamw_torch")
    monkeypatch.setitem(trainer._OPTIMIZER_HANDLERS, member, lambda context: (contexts.append(context), {}))
    args = TrainingArguments(str(tmp_path), optim="adamw_torch", optim_args="a=1", learning_rate=0.1, adam_beta1=0.5)
    model = torch.nn.Linear(2, 2)
    Trainer.get_optimizer_cls_and_kwargs(args, model)
    (context,) = contexts
    assert context.args is args
    assert context.model is model
    assert context.optimizer_kwargs == {"lr": 0.1}
    assert context.adam_kwargs == {"betas": (0.5, 0.999), "eps": 1e-8}


def test_transformers_parser_splits_at_commas_and_fails_on_the_rest():
    parse = trainer_optimizer._parse_optim_args
    assert parse("a=1, b=x") == {"a": "1", "b": "x"}
    assert parse(None) == {}
    for refused in ('{"a": 1}', "a", "a=b=c"):
        with pytest.raises(ValueError, match="values to unpack"):
            parse(refused)


def test_train_asks_get_last_checkpoint_when_resume_is_true(tmp_path):
    used = inspect.unwrap(Trainer.train).__code__.co_names
    assert "get_last_checkpoint" in used
    assert list(inspect.signature(get_last_checkpoint).parameters) == ["folder"]
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def test_train_takes_the_checkpoint_first(tmp_path):
    assert list(inspect.signature(Trainer.train).parameters)[:2] == ["self", "resume_from_checkpoint"]
    assert inspect.unwrap(registration._train) is inspect.unwrap(Trainer.train)


def test_accelerate_says_what_it_shards(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert args.distributed_state.distributed_type == DistributedType.NO
    assert not is_initialized()
    Trainer(torch.nn.Linear(2, 2), args)
    assert is_initialized()
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    assert args.distributed_state.distributed_type == "FSDP"
    assert {"DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "NO", "MULTI_CPU"} <= set(DistributedType.__members__)


def test_a_trainer_leaves_the_variable_of_fsdp_set(tmp_path, monkeypatch):
    """What `refuse_sharding` sees through; once this fails, it need not."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # so that it is restored
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    args = TrainingArguments(str(tmp_path), fsdp=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="only works in distributed training"):
        Trainer(torch.nn.Linear(2, 2), args)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_the_optimizer_and_the_scheduler_are_loaded_together(tmp_path):
    """Without either file the Trainer loads neither and says nothing; `checkpoints.py` does."""
    trainer_ = Trainer(torch.nn.Linear(2, 2), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer_.create_optimizer_and_scheduler(1)
    torch.save(trainer_.optimizer.state_dict(), tmp_path / "optimizer.pt")
    trainer_.optimizer.load_state_dict = trainer_.lr_scheduler.load_state_dict = None  # not called
    trainer_._load_optimizer_and_scheduler(str(tmp_path))


def test_a_trainer_starts_from_the_default_callbacks_and_hands_them_the_optimizer(tmp_path):
    assert {"DEFAULT_CALLBACKS"} <= set(inspect.unwrap(Trainer.__init__).__code__.co_names)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(("pre", [p.grad is not None for g in optimizer.param_groups for p in g["params"]]))

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(("post", [p.grad is not None for g in optimizer.param_groups for p in g["params"]]))

        def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
            seen.append(("log", state.log_history[-1]["step"]))

    class Model(torch.nn.Linear):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x).sum()}

    args = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to="none")
    data = [{"x": torch.ones(2)}] * 4
    Trainer(Model(2, 2), args, train_dataset=data, callbacks=[Watch()]).train()
    assert seen[:3] == [("pre", [True, True]), ("post", [True, True]), ("log", 1)]


def test_a_trainer_clips_by_its_accelerator(tmp_path, monkeypatch):
    clipped = []

    def clip(self, parameters, max_norm, norm_type=2):
        clipped.append((len(list(parameters)), max_norm, len(self._optimizers)))
        return torch.zeros(())

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)

    class Model(torch.nn.Linear):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x).sum()}

    args = TrainingArguments(str(tmp_path), max_steps=1, max_grad_norm=0.5, use_cpu=True, report_to="none")
    Trainer(Model(2, 2), args, train_dataset=[{"x": torch.ones(2)}] * 4).train()
    assert clipped == [(2, 0.5, 1)]
    assert {"parameters", "max_norm", "norm_type"} <= set(inspect.signature(registration.clip_grad_norm_).parameters)


def test_a_trainer_computes_gradients_by_its_accelerator(tmp_path, monkeypatch):
    losses = []

    def backward(self, loss, **kwargs):
        losses.append((loss.ndim, len(self._optimizers)))
        clipping._backward(self, loss, **kwargs, retain_graph=True)
        clipping._backward(self, loss, **kwargs)

    monkeypatch.setattr(Accelerator, "backward", backward)

    class Model(torch.nn.Linear):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x).sum()}

    args = TrainingArguments(str(tmp_path), max_steps=1, max_grad_norm=0.0, use_cpu=True, report_to="none")
    trainer = Trainer(Model(2, 2), args, train_dataset=[{"x": torch.ones(2)}] * 4)
    trainer.train()
    assert losses == [(0, 1)]
    assert trainer.state.log_history[-1]["train_loss"] != 0


def test_the_decay_rule_needs_no_trainer():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert Trainer.get_decay_parameter_names(None, model) == ["0.weight"]


@pytest.mark.parametrize(
    ("module", "internal"),
    [
        (training_args, "OptimizerNames"),
        (trainer_optimizer, "_OPTIMIZER_HANDLERS"),
        (trainer, "_parse_optim_args"),
        (trainer, "get_last_checkpoint"),
        (trainer, "DEFAULT_CALLBACKS"),
        (trainer, "Trainer.train"),
    ],
)
def test_an_unknown_layout_fails_at_import_and_names_what_is_missing(module, internal, monkeypatch):
    owner, _, name = internal.rpartition(".")
    monkeypatch.delattr(getattr(module, owner) if owner else module, name)
    spec = importlib.util.spec_from_file_location("hf_lowmem.trainer.second_registration", registration.__file__)
    expected = f"transformers {transformers.__version__}, which has no {module.__name__}.{internal}"
    with pytest.raises(ImportError, match=expected.replace(".", r"\.")):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_trl_takes_a_launch_function_and_separates_the_launchers_arguments():
    pytest.importorskip("trl")
    from trl.cli.accelerate_config import resolve_accelerate_config_argument
    from trl.cli.accelerate_launcher import launch_training_script
    from trl.cli.commands.training import _subtract_subsequence
    from trl.scripts.utils import DatasetConfig, TrlParser

    assert {"script_name", "launch_args", "training_script_args", "launch_command_fn"} <= set(
        inspect.signature(launch_training_script).parameters
    )
    assert "separate_remaining_strings" in inspect.signature(TrlParser.parse_args_and_config).parameters
    assert {"path", "data_files"} <= set(inspect.signature(DatasetConfig).parameters)
    assert resolve_accelerate_config_argument(["--num_processes", "2"]) == ["--num_processes", "2"]
    assert _subtract_subsequence(["--a", "1", "--b", "2"], ["--b", "2"]) == ["--a", "1"]
    launched = []
    launch_training_script("dpo.py", ["--num_processes", "1"], ["--x", "y"], launch_command_fn=launched.append)
    assert not launched[0].module
    assert {"cpu", "multi_gpu", "num_processes"} <= vars(launched[0]).keys()
    assert launched[0].training_script.endswith("dpo.py")
    assert launched[0].training_script_args == ["--x", "y"]


@pytest.mark.parametrize("task", TRL_TASKS)
def test_trls_scripts_have_one_parser_and_one_main_each(task):
    pytest.importorskip("trl")
    script = importlib.import_module(f"trl.scripts.{task}")
    assert "prog" in inspect.signature(script.make_parser).parameters
    assert list(inspect.signature(script.main).parameters) == [
        "script_args",
        "training_args",
        "model_args",
        "dataset_args",
    ]
    parser = script.make_parser()
    assert len(parser.dataclass_types) == 4
    known = {action.dest for action in parser._actions}
    assert {"dataset_name", "dataset_streaming", "test_split_size", "eval_strategy", "resume_from_checkpoint"} <= known
    assert ({"reward_funcs", "reward_model_name_or_path"} <= known) == (task in ("grpo", "rloo"))


def test_without_dataclasses_trls_parser_gives_plain_values():
    pytest.importorskip("trl")
    from trl.scripts import grpo

    parser = grpo.make_parser()
    parser.dataclass_types = []
    given, config_rest, rest = parser.parse_args_and_config(
        ["--num_generations", "3", "--per_device_train_batch_size", "1", "--num_processes", "3"],
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert (given.num_generations, given.eval_strategy) == (3, "no")
    assert (config_rest, rest) == ([], ["--num_processes", "3"])
