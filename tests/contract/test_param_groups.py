"""Parameter groups are the user's, for every optim name: their number, order, keys and parameters."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.trainer.optim_args import recipe_for

CONFIG = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)
NAMES = hf_lowmem.optim_names()
EACH = pytest.mark.parametrize("optim", NAMES)


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def groups_of(model: nn.Module, named: bool = False) -> list[dict[str, Any]]:
    """Groups as users make them: roles mixed, tags of their own, a group of one parameter, an empty one."""
    entries = list(model.named_parameters()) if named else list(model.parameters())
    empty = [] if named else [{"params": [], "name": "empty"}]  # torch takes a group without names for one
    return [
        {"params": entries[:5], "lr": 1e-3, "name": "first", "layer_id": 0},
        {"params": [entries[5]], "weight_decay": 0.5, "lr_scale": 0.1},
        *empty,
        {"params": entries[6:], "betas": (0.8, 0.9), "tags": ["rest", 1]},
    ]


def build(model: nn.Module, optim: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(model, optim, lr=1e-2, optim_args=options)
    return cls(groups, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    batch = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


def same(mine: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("named", [False, True])
@EACH
def test_groups_are_those_that_came_in(optim: str, named: bool) -> None:
    model = tiny()
    given = groups_of(model, named)
    expected = [{**group, "params": list(group["params"])} for group in given]
    optimizer = build(model, optim, given)
    params = list(model.parameters())
    for _ in range(2):
        assert len(optimizer.param_groups) == len(expected)
        for group, came_in in zip(optimizer.param_groups, expected, strict=True):
            bare = [entry[1] if named else entry for entry in came_in["params"]]
            assert [id(p) for p in group["params"]] == [id(p) for p in bare]
            names = {"param_names"} if named else set()
            assert group.keys() - came_in.keys() == optimizer.defaults.keys() - came_in.keys() | names
            assert {key: group[key] for key in came_in if key != "params"} == {
                key: value for key, value in came_in.items() if key != "params"
            }
            if named:
                assert group["param_names"] == [entry[0] for entry in came_in["params"]]
        train(model, optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in params]


@EACH
def test_the_trainers_groups_are_adamws(optim: str, make_trainer) -> None:
    trainer = make_trainer(optim)
    mine = trainer.create_optimizer().param_groups
    trainer.optimizer, trainer.args.optim = None, "adamw_torch"
    theirs = trainer.create_optimizer().param_groups
    assert [[id(p) for p in group["params"]] for group in mine] == [[id(p) for p in g["params"]] for g in theirs]
    shared = ("lr", "betas", "eps", "weight_decay")
    assert [[group[key] for key in shared] for group in mine] == [[group[key] for key in shared] for group in theirs]


@EACH
def test_a_groups_learning_rate_is_that_of_its_weights(optim: str) -> None:
    """Layer-wise rates, and rates that are set at any time, act on the weights that stand in the group."""
    model = tiny()
    optimizer = build(model, optim, groups_of(model))
    before = [param.detach().clone() for param in model.parameters()]
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = 1e-2 if number == 1 else 0.0
    train(model, optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [number == 5 for number in range(len(moved))]


@EACH
def test_schedulers_with_an_entry_per_group(optim: str) -> None:
    model = tiny()
    optimizer = build(model, optim, groups_of(model))
    schedulers = [
        LambdaLR(optimizer, [lambda step, factor=factor: factor for factor in (1, 2, 3, 4)]),
        OneCycleLR(optimizer, max_lr=[1e-3, 2e-3, 3e-3, 4e-3], total_steps=10),
        CyclicLR(optimizer, base_lr=[1e-3] * 4, max_lr=[2e-3] * 4, cycle_momentum=True),
    ]
    for scheduler in schedulers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(model, optimizer, 1)
            scheduler.step()
        assert len(scheduler.get_last_lr()) == 4
    train(model, optimizer, 1)


def layouts(optimizer: torch.optim.Optimizer) -> list[dict[str, tuple]]:
    shapes = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            shapes.append({name: (tuple(t.shape), t.dtype) for name, t in optimizer.state[param].items()})
    return shapes


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "saved", "flattened", "full"])
@EACH
def test_layouts_survive(optim: str, how: str) -> None:
    """What a parameter's state looks like is the same after every way of copying or saving, and so is each step."""
    model = tiny()
    optimizer = build(model, optim, groups_of(model)[:2] + groups_of(model)[3:], min_8bit_size=0)
    train(model, optimizer)
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin = tiny(1)
        other = build(twin, optim, groups_of(twin)[:2] + groups_of(twin)[3:], min_8bit_size=0)
        twin.load_state_dict(model.state_dict())
        if how == "state_dict":
            other.load_state_dict(optimizer.state_dict())
        elif how == "saved":
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        else:
            options = StateDictOptions(flatten_optimizer_state_dict=how == "flattened")
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            set_optimizer_state_dict(twin, other, saved, options=options)
    assert layouts(other) == layouts(optimizer)
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its)
    assert same(model, twin)
    assert layouts(other) == layouts(optimizer)


@EACH
def test_added_groups_have_their_roles(optim: str) -> None:
    """As when layers are unfrozen one after the other."""
    whole, late = tiny(), tiny()
    one = build(whole, optim, [{"params": list(whole.parameters())}], min_8bit_size=0)
    params = list(late.parameters())
    other = build(late, optim, [{"params": params[:3]}], min_8bit_size=0)
    for number in range(3, len(params), 4):
        other.add_param_group({"params": params[number : number + 4]})
    for model, optimizer in ((whole, one), (late, other)):
        train(model, optimizer)
    assert layouts(one) == layouts(other)
    assert same(whole, late)


@EACH
def test_parameters_may_be_swapped_for_others_of_their_shape(optim: str) -> None:
    """As sharding does inside the groups after the optimizer was built: positions survive, objects do not."""
    model, twin = tiny(), tiny()
    optimizer, other = (
        build(each, optim, [{"params": list(each.parameters())}], min_8bit_size=0) for each in (model, twin)
    )
    names = dict(twin.named_parameters())
    fresh = {name: nn.Parameter(param.detach().clone()) for name, param in names.items()}
    for name, param in fresh.items():
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, param)
    for group in other.param_groups:
        group["params"] = list(fresh.values())
    for each, its in ((model, optimizer), (twin, other)):
        train(each, its)
    assert layouts(other) == layouts(optimizer)
    assert same(model, twin)


@EACH
def test_a_failed_group_leaves_the_optimizer_as_it_was(optim: str) -> None:
    model = tiny()
    optimizer = build(model, optim, [{"params": list(model.parameters())}])
    for bad in ({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0}, {"params": list(model.parameters())[:1]}):
        with pytest.raises(ValueError, match=r"lr=-1.0|more than one parameter group"):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1
    train(model, optimizer)


@pytest.mark.parametrize("change", ["append", "remove", "add group", "remove group"])
@EACH
def test_changes_behind_the_optimizers_back_are_told(optim: str, change: str) -> None:
    model = tiny()
    optimizer = build(model, optim, groups_of(model))
    extra = nn.Parameter(torch.ones(4))
    if change == "append":
        optimizer.param_groups[0]["params"].append(extra)
    elif change == "remove":
        optimizer.param_groups[0]["params"].pop()
    elif change == "add group":
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": [extra]})
    else:
        optimizer.param_groups.pop()
    with pytest.raises(RuntimeError, match=r"were added.*add_param_group"):
        train(model, optimizer)


@pytest.mark.parametrize("flag", ["maximize", "amsgrad", "differentiable", "foreach", "fused", "nesterov"])
@EACH
def test_torchs_flags_are_refused_where_they_are_on(optim: str, flag: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    param = nn.Parameter(torch.ones(4, 64))
    with pytest.raises(ValueError, match=rf"{flag}=True.*does not support"):
        cls([{"params": [param], flag: True}])
    for off in (False, None):
        cls([{"params": [param], flag: off}])


@EACH
def test_groups_of_torchs_adamw_are_taken(optim: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    adamw = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(4, 64))], "lr": 0.5, "tag": "mine"}])
    (group,) = cls(adamw.param_groups).param_groups
    assert (group["lr"], group["tag"]) == (0.5, "mine")
    with pytest.raises(ValueError, match="decoupled_weight_decay=False"):
        cls(torch.optim.Adam([nn.Parameter(torch.ones(4))]).param_groups)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("axis", "axes"),
        ("Axes", "axes"),
        ("row_per_block", "rows_per_block"),
        ("state_bit", "state_bits"),
        ("statebits", "state_bits"),
        ("weight-decay", "weight_decay"),
        ("weight_deacy", "weight_decay"),
        ("learning_rate", "lr"),
        ("epsilon", "eps"),
        ("beta", "betas"),
        ("offload_sate", "offload_state"),
        ("roundng", "rounding"),
    ],
)
def test_misspelt_options_are_refused(key: str, meant: str) -> None:
    from hf_lowmem.algorithms import SlimAdamW

    with pytest.raises(ValueError, match=rf"{key}=.*{meant!r}"):
        SlimAdamW([{"params": [nn.Parameter(torch.ones(4, 64))], key: 1}])


TAGS = (
    *("name", "group_name", "layer_id", "lr_scale", "lr_mult", "initial_lr", "max_lr", "min_lr", "swa_lr", "tag"),
    *(
        "base_momentum",
        "max_momentum",
        "momentum",
        "is_expert",
        "use_muon",
        "role",
        "stage",
        "index",
        "type",
        "scale_lr",
    ),
    *(
        "no_decay",
        "apply_decay",
        "use_weight_decay",
        "weight_decay_mult",
        "warmup",
        "trainable",
        "rates",
        "moe",
        "wd_mult",
    ),
)


@EACH
def test_users_tags_are_legal(optim: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    (group,) = cls([{"params": [nn.Parameter(torch.ones(4, 64))], **dict.fromkeys(TAGS, "mine")}]).param_groups
    assert all(group[tag] == "mine" for tag in TAGS)


@EACH
def test_an_unknown_option_is_told_with_all_that_there_are(optim: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    with pytest.raises(TypeError, match=r"no option 'nonsense'; it has") as raised:
        cls([nn.Parameter(torch.ones(4))], nonsense=1)
    for option in ("compile", "rounding", "rounding_seed", "offload_state", "fused_clip", "capturable"):
        assert option in str(raised.value)
    with pytest.raises(TypeError, match=r"'roundin', did you mean 'rounding'\?"):
        cls([nn.Parameter(torch.ones(4))], roundin="kahan")


def test_options_of_other_optimizers_are_tags() -> None:
    from hf_lowmem.algorithms import SlimAdamW

    tags = {"rank": 0, "scale": 0, "sides": "left", "align": "top", "decay_rate": 1}
    (group,) = SlimAdamW([{"params": [nn.Parameter(torch.ones(4, 64))], **tags}]).param_groups
    assert {tag: group[tag] for tag in tags} == tags


@EACH
def test_a_tag_that_says_who_wrote_a_checkpoint_is_refused(optim: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    with pytest.raises(ValueError, match=r"algorithm='muon'.*another name"):
        cls([{"params": [nn.Parameter(torch.ones(4, 64))], "algorithm": "muon"}])


@pytest.mark.parametrize("when", ["set", "loaded"])
@EACH
def test_a_flag_is_refused_whenever_it_comes(optim: str, when: str) -> None:
    cls = recipe_for(optim).optimizer_cls
    param = nn.Parameter(torch.ones(4, 64))
    optimizer = cls([param])
    if when == "set":
        optimizer.param_groups[0]["maximize"] = True
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match="maximize=True"):
            optimizer.step()
    else:
        saved = optimizer.state_dict()
        saved["param_groups"][0]["maximize"] = True
        with pytest.raises(ValueError, match="maximize=True"):
            optimizer.load_state_dict(saved)


def test_a_copy_says_that_it_does_not_know_the_role_of_a_new_group(caplog) -> None:
    model = tiny()
    params = list(model.parameters())
    twin = copy.deepcopy(build(model, "slim_adamw", [{"params": params[1:]}]))
    twin.add_param_group({"params": [nn.Parameter(torch.ones(4, 64))]})
    assert "1 parameters are not those of the model that the roles were read from" in caplog.text


def test_misspelt_arguments_are_told_with_what_was_meant() -> None:
    from hf_lowmem.algorithms import SlimAdamW

    for wrong, meant in (("learning_rate", "lr"), ("weight_decays", "weight_decay"), ("axis", "axes")):
        with pytest.raises(TypeError, match=rf"'{wrong}', did you mean '{meant}'"):
            SlimAdamW([nn.Parameter(torch.ones(4, 64))], **{wrong: 1})
