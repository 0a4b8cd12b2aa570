"""Flat pieces of weights are refused in one sentence, and other runs are not."""

from __future__ import annotations

import copy
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lowmem
from hf_lowmem.algorithms import SlimAdamW
from hf_lowmem.trainer.build import refuse_sharding
from tests.support.declarations import CLASSES

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))


def fsdp1(use_orig_params, how):
    wrap = {"use_orig_params": use_orig_params, "device_id": CPU}
    made = model()
    if how in ("nested", "inside"):
        made[1] = FullyShardedDataParallel(made[1], **wrap)
    return made if how == "inside" else FullyShardedDataParallel(made, **wrap)


class FlatParameter(nn.Parameter):  # as fairscale and XLA name theirs
    pass


def flat():
    made = model()
    made[0].weight = FlatParameter(torch.zeros(64))
    return made


def zero3():
    made = model()
    for number, param in enumerate(made.parameters()):
        param.ds_id, param.ds_tensor, param.ds_shape = number, param.data.flatten(), param.shape
        param.data = torch.empty(0)
    return made


def dtensor(placement):
    made = model()
    mesh = init_device_mesh("cpu", (1,))
    made[0].weight = nn.Parameter(distribute_tensor(made[0].weight.detach(), mesh, [placement]))
    return made


def fsdp2():
    return fully_shard(model(), mesh=init_device_mesh("cpu", (1,)))


SHARDED = {
    **{
        f"fsdp1 {how} {'original' if original else 'flat'}": lambda original=original, how=how: fsdp1(original, how)
        for how in ("whole", "nested", "inside")
        for original in (True, False)
    },
    "flat parameter": flat,
    "zero 3": zero3,
}
DTENSORS = {
    "sharded": lambda: dtensor(Shard(0)),
    "replicated": lambda: dtensor(Replicate()),
    "fsdp2": fsdp2,
}


@pytest.mark.parametrize("sharding", SHARDED)
def test_a_sharded_model_is_refused(sharding):
    sharded = SHARDED[sharding]()
    for build in (
        lambda: hf_lowmem.build_optimizer(sharded, "slim_adamw_8bit", lr=1e-3),
        lambda: hf_lowmem.optimizer_cls_and_kwargs(sharded, "coap_adamw", lr=1e-3),
    ):
        with pytest.raises(ValueError, match=r"^Flat pieces.*the parameter '.*train with FSDP2") as error:
            build()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("sharding", SHARDED)
def test_the_classes_refuse_its_parameters(sharding, cls):
    if sharding == "zero 3" and cls.takes_flat_pieces:
        cls(zero3().parameters())
        with pytest.raises(ValueError, match=r"^Flat pieces.*train with FSDP2"):
            cls(zero3().parameters(), state_bits=8)
        return
    with pytest.raises(ValueError, match=r"^Flat pieces.*train with FSDP2"):
        cls(SHARDED[sharding]().parameters())


def test_a_frozen_part_may_be_sharded():
    made = fsdp1(False, "inside")
    made[1].requires_grad_(False)
    optimizer = hf_lowmem.build_optimizer(made, "slim_adamw", lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def whole(param):
    return param.full_tensor() if isinstance(param, DTensor) else param


@pytest.mark.parametrize("kind", DTENSORS)
@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_steps_dtensors(kind, cls):
    made = DTENSORS[kind]()
    optimizer = cls(made.parameters(), lr=1e-2)
    before = [whole(param).clone() for param in made.parameters()]
    for _ in range(2):  # the first step of COAP only finds its bases
        for param in made.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param, old in zip(made.parameters(), before, strict=True):
        assert (whole(param) != old).any()
        kept = [value for value in optimizer.state[param].values() if value.ndim]
        assert all(isinstance(value, DTensor) == isinstance(param, DTensor) for value in kept)


def test_parameters_may_be_swapped_for_shards():
    """As accelerate's FSDP2 does, after the optimizer was built."""
    made = model()
    whole = copy.deepcopy(made)
    for each in (made, whole):
        each.optimizer = SlimAdamW(each.parameters(), axes=())
    pieces = iter(fully_shard(made, mesh=init_device_mesh("cpu", (1,))).parameters())
    for group in made.optimizer.param_groups:
        group["params"] = [next(pieces) for _ in group["params"]]
    for each in (made, whole):
        each(torch.ones(2, 8)).sum().backward()
        each.optimizer.step()
    for param, expected in zip(made.parameters(), whole.parameters(), strict=True):
        assert torch.equal(param.full_tensor(), expected)


@pytest.mark.parametrize("option", ["compile", "capturable", "offload_state"])
def test_what_shards_do_not_support_is_said_before_a_step(option):
    made = fsdp2()
    optimizer = hf_lowmem.build_optimizer(made, "slim_adamw", lr=1e-3, optim_args={option: True})
    for param in made.parameters():
        param.grad = torch.ones_like(param)
    before = [param.full_tensor().clone() for param in made.parameters()]
    with pytest.raises(ValueError, match=rf"^{option}=true does not go with sharded weights, such as") as error:
        optimizer.step()
    assert "\n" not in str(error.value)
    assert all(torch.equal(param.full_tensor(), old) for param, old in zip(made.parameters(), before, strict=True))


@pytest.mark.parametrize("between", [False, True])
def test_a_sharded_weight_that_a_group_names_twice_is_refused(between):
    made = fsdp2()
    weight, bias = made[0].weight, made[0].bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        optimizer = SlimAdamW([weight, bias, weight] if between else [weight, weight], axes=())
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    with pytest.raises(ValueError, match="is in its parameter group twice"):
        optimizer.step()


def test_sharded_state_is_not_resized():
    made = fsdp2()
    optimizer = SlimAdamW(made.parameters(), axes=())
    for param in made.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="resize the model before it is sharded"):
        optimizer.resize_state()


# -- DeepSpeed ZeRO ---------------------------------------------------------------------------------------------------


def flat_piece(params, first=0, last=None):
    """Return a part of all entries of some parameters, and of their gradients, as ZeRO puts it into a group."""
    piece = nn.Parameter(torch.cat([param.detach().flatten() for param in params])[first:last])
    piece.grad = torch.cat([param.grad.flatten() for param in params])[first:last]
    return piece


def with_gradients(seed=0):
    torch.manual_seed(seed)
    made = model()
    for param in made.parameters():
        param.grad = torch.randn_like(param)
    return made


@pytest.mark.parametrize("one_by_one", [False, True])  # as ZeRO-3 steps its pieces
@pytest.mark.parametrize("optim", ["lowmem_adamw", "signum"])
@pytest.mark.parametrize("bits", [32, 16])
def test_flat_pieces_are_stepped_as_their_weights(optim, bits, one_by_one):
    build = {"lr": 1e-2, "weight_decay": 0.1, "optim_args": {"state_bits": bits}}
    whole = with_gradients()
    pieces_of = copy.deepcopy(whole)
    expected, optimizer = (hf_lowmem.build_optimizer(each, optim, **build) for each in (whole, pieces_of))
    for group in optimizer.param_groups:
        for param in group["params"]:  # deepcopy leaves gradients out
            param.grad = torch.zeros_like(param)
    pieces = []
    for group, theirs in zip(optimizer.param_groups, expected.param_groups, strict=True):
        pieces.append(
            [flat_piece(theirs["params"], *part) for part in ([(0, 50), (50, None)] if one_by_one else [()])]
        )
        group["params"] = [] if one_by_one else pieces[-1]
    for _ in range(3):
        expected.step()
        if one_by_one:
            for group, mine in zip(optimizer.param_groups, pieces, strict=True):
                for piece in mine:
                    group["params"] = [piece]
                    optimizer.step()
                group["params"] = []
        else:
            optimizer.step()
    for mine, theirs in zip(pieces, expected.param_groups, strict=True):
        entries = torch.cat([param.detach().flatten() for param in theirs["params"]])
        torch.testing.assert_close(torch.cat(mine).detach(), entries, rtol=0, atol=1e-7)


@pytest.mark.parametrize("many", [True, False])  # as a single weight is replaced by a single piece
@pytest.mark.parametrize("optim", ["slim_adamw", "adam_mini", "h_fac", "smmf", "lowmem_adamw_8bit", "signum_8bit"])
def test_flat_pieces_of_structured_weights_are_refused_at_the_step(optim, many):
    made = with_gradients() if many else nn.Linear(8, 8, bias=False)
    for param in made.parameters():
        param.grad = torch.ones_like(param)
    optimizer = hf_lowmem.build_optimizer(made, optim, lr=1e-2)
    for group in optimizer.param_groups:
        group["params"] = [flat_piece(group["params"])] if group["params"] else []
    with pytest.raises(
        RuntimeError, match=r"hold flat pieces of weights, as DeepSpeed ZeRO.*train with FSDP2"
    ) as error:
        optimizer.step()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optim", ["lowmem_adamw", "slim_adamw"])
def test_a_bias_that_is_put_into_a_group_is_no_flat_piece(optim):
    made = with_gradients()
    optimizer = hf_lowmem.build_optimizer(made, optim, lr=1e-2)
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.zeros(4)))
    with pytest.raises(RuntimeError, match=r"add parameters by optimizer\.add_param_group"):
        optimizer.step()


def test_layout_options_of_flat_pieces_are_fixed():
    made = with_gradients()
    optimizer = hf_lowmem.build_optimizer(made, "lowmem_adamw", lr=1e-2)
    for group in optimizer.param_groups:
        group["params"] = [flat_piece(group["params"])]
    optimizer.step()
    optimizer.param_groups[0]["state_bits"] = 16
    with pytest.raises(RuntimeError, match="state_bits of parameter group 0 was changed"):
        optimizer.step()


@pytest.mark.parametrize(
    ("optim", "args", "config", "sentence"),
    [
        ("lowmem_adamw", None, {"zero_optimization": {"stage": 2}}, None),
        ("signum", "state_bits=16", {"zero_optimization": {"stage": 3}}, None),
        ("lowmem_adamw_8bit", None, {}, "does not support DeepSpeed.*train with FSDP2"),
        ("lowmem_adamw", "embedding_bits=8", {}, "does not support DeepSpeed"),
        ("lowmem_adamw", "embedding_bits=16", {}, "does not support DeepSpeed"),
        ("lowmem_adamw", "state_bits=16,embedding_bits=16", {}, None),
        ("slim_adamw", None, {}, r"does not support DeepSpeed.*'lowmem_adamw' and 'signum' go with"),
        ("signum", None, {"optimizer": {"type": "AdamW"}}, "would not be used.*an optimizer of its own"),
        (
            "lowmem_adamw",
            None,
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "would not be used.*set zero_force_ds_cpu_optimizer to false",
        ),
        (
            "lowmem_adamw",
            None,
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            None,
        ),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_what_deepspeed_trains_with_is_known_before_the_run(optim, args, config, sentence, as_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    deepspeed = str(tmp_path / "config.json") if as_file else config or {"zero_optimization": {}}
    given = SimpleNamespace(optim=optim, optim_args=args, fsdp=None, deepspeed=deepspeed)
    if sentence is None:
        refuse_sharding(given)
        return
    with pytest.raises(ValueError, match=sentence) as error:
        refuse_sharding(given)
    assert "\n" not in str(error.value)


# -- what a Trainer's run will do ------------------------------------------------------------------------------------


@pytest.fixture
def variables(monkeypatch):
    """The variables that runs leave behind are put back."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_VERSION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    hf_lowmem.register()
    return monkeypatch


def arguments(tmp_path, **options):
    options = {"optim": "slim_adamw", "max_steps": 1, "save_strategy": "no", **options}
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **options)


def make_trainer(tmp_path, **options):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    return Trainer(LlamaForCausalLM(config), arguments(tmp_path, **options), train_dataset=rows)


@pytest.mark.parametrize("fsdp", [True, "full_shard", "full_shard auto_wrap"])
def test_a_plain_run_follows_one_that_was_refused_fsdp(fsdp, tmp_path, variables):
    with pytest.raises(ValueError, match="only works in distributed training"):  # transformers'
        make_trainer(tmp_path, fsdp=fsdp)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    for optim in ("slim_adamw", "coap_adamw_8bit"):
        trainer = make_trainer(tmp_path, optim=optim)
        trainer.train()
        assert trainer.state.global_step == 1
        assert not trainer.is_fsdp_enabled


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "FSDP_VERSION"])
def test_what_is_left_behind_shards_no_single_process(variable, tmp_path, variables):
    variables.setenv(variable, "true" if "USE" in variable else "2")
    args = arguments(tmp_path)
    Trainer.get_optimizer_cls_and_kwargs(args, model())  # before there is a Trainer


@pytest.mark.parametrize("scheme", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_run_that_flattens_weights_is_refused(scheme, tmp_path, variables):
    """What accelerate has decided counts, and the sentence names what asked for it."""
    trainer = make_trainer(tmp_path)
    variables.setitem(PartialState._shared_state, "distributed_type", DistributedType(scheme))
    with pytest.raises(ValueError, match=rf"(?i)'slim_adamw' does not support {scheme}") as error:
        trainer.create_optimizer()
    assert f"unset ACCELERATE_USE_{scheme}," in str(error.value)
    assert "\n" not in str(error.value)
    make_trainer(tmp_path).train()


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("MULTI_GPU", True), ("MULTI_XPU", True), ("XLA", True), ("MULTI_CPU", False), ("NO", False)],
)
def test_before_there_is_a_trainer_the_kind_of_process_decides(kind, refused, tmp_path, variables):
    """accelerate shards launched processes that have an accelerator each."""
    args = arguments(tmp_path)
    variables.setenv("ACCELERATE_USE_FSDP", "true")
    variables.setitem(PartialState._shared_state, "distributed_type", DistributedType(kind))
    if refused:
        with pytest.raises(ValueError, match=r"does not support FSDP1.*unset ACCELERATE_USE_FSDP.*FSDP2"):
            Trainer.get_optimizer_cls_and_kwargs(args, model())
        variables.setenv("FSDP_VERSION", "2")
        Trainer.get_optimizer_cls_and_kwargs(args, model())
        args.fsdp, args.fsdp_config = True, {"version": 1}
        with pytest.raises(ValueError, match=r"does not support FSDP1.*leave fsdp out"):
            Trainer.get_optimizer_cls_and_kwargs(args, model())
        args.fsdp_config = {}
        Trainer.get_optimizer_cls_and_kwargs(args, model())  # transformers' default is 2
    else:
        Trainer.get_optimizer_cls_and_kwargs(args, model())


@pytest.mark.parametrize(
    ("options", "environment", "refused"),
    [
        ({"fsdp": "full_shard"}, {}, False),  # by FSDP2
        ({"fsdp": "full_shard", "fsdp_config": '{"fsdp_version": 1}'}, {}, True),
        ({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, {}, False),
        ({"deepspeed": "config.json"}, {}, True),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, False),  # left behind: this process was not launched
        ({}, {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0"}, True),  # `accelerate launch --use_fsdp`
        ({}, {"ACCELERATE_USE_FSDP": "true", "LOCAL_RANK": "0", "FSDP_VERSION": "2"}, False),
        ({}, {"LOCAL_RANK": "0"}, False),
    ],
)
def test_a_command_line_is_judged_before_its_run(options, environment, refused, variables):
    for name, value in environment.items():
        variables.setenv(name, value)
    given = SimpleNamespace(**{"optim": "slim_adamw", "optim_args": None, "fsdp": None, "deepspeed": None, **options})
    if refused:
        with pytest.raises(ValueError, match=r"does not support (FSDP1|DeepSpeed)"):
            refuse_sharding(given)
    else:
        refuse_sharding(given)


def test_accelerates_decision_outlasts_the_variable(tmp_path, variables):
    trainer = make_trainer(tmp_path)
    variables.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # later than the Trainer
    trainer.create_optimizer()


def test_a_trainer_that_would_save_the_state_of_one_process_is_refused(tmp_path, variables):
    """It does where transformers has sharded the weights as it loaded them."""
    for options in (
        {"save_strategy": "no"},
        {"save_strategy": "steps", "save_only_model": True},
        {"save_strategy": "steps"},
    ):
        trainer = make_trainer(tmp_path, **options)
        mesh = init_device_mesh("cpu", (1,))
        weight = trainer.model.lm_head.weight.detach()
        trainer.model.lm_head.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        if options == {"save_strategy": "steps"}:
            with pytest.raises(ValueError, match=r"such as 'lm_head.weight', were sharded as they were loaded.*alone"):
                trainer.create_optimizer()
        else:
            trainer.create_optimizer()
