"""Where torch.optim.AdamW defines what an optimizer does, every class does the same."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel

from hf_lowmem.algorithms import (
    CoapAdafactor,
    CoapAdamW,
    LowMemAdamW,
    Soap,
)
from hf_lowmem.roles import canonical_name
from tests import ROOT
from tests.support.declarations import CLASSES

DOCS = ROOT / "docs" / "torch_agreement.md"
every_class = pytest.mark.parametrize("cls", CLASSES)
# For what the classes share; COAP's two add groups in a way of their own.
two_classes = pytest.mark.parametrize("cls", [LowMemAdamW, CoapAdamW])

Named = namedtuple("Named", "name param")


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    """A parameter with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    param.grad = torch.randn(shape, generator=generator).to(dtype)
    return param


def outcome(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call returns, or the type and the text of what it raises."""
    try:
        return "returned", call()
    except Exception as error:
        return type(error), str(error)


def settings(optimizer: torch.optim.Optimizer) -> list[tuple[int, Any]]:
    """Of each group: the number of its parameters, and their names."""
    return [(len(group["params"]), group.get("param_names")) for group in optimizer.param_groups]


# -- parameters and groups ------------------------------------------------------------------------------------------


def linear() -> nn.Linear:
    return nn.Linear(3, 2)


PARAMS: dict[str, Callable[[], Any]] = {
    "generator": lambda: linear().parameters(),
    "named generator": lambda: linear().named_parameters(),
    "items of a dict": lambda: dict(linear().named_parameters()).items(),
    "values of a dict": lambda: dict(linear().named_parameters()).values(),
    "items of an OrderedDict": lambda: OrderedDict(linear().named_parameters()).items(),
    "namedtuples": lambda: [Named(*entry) for entry in linear().named_parameters()],
    "triples": lambda: [(*entry, "more") for entry in linear().named_parameters()],
    "a tuple": lambda: tuple(linear().parameters()),
    "ParameterList": lambda: nn.ParameterList([weight(2, 2), weight(3)]),
    "a set": lambda: {weight(2, 2)},
    "one tensor in a group": lambda: [{"params": weight(2, 2)}],
    "generators in groups": lambda: [{"params": linear().named_parameters()}, {"params": linear().named_parameters()}],
    "an empty group first": lambda: [{"params": []}, {"params": [weight(2, 2)]}],
    "an empty group last": lambda: [{"params": [weight(2, 2)]}, {"params": iter(())}],
    "weights of 0, 1 and 5 axes": lambda: [weight(), weight(3), weight(2, 2, 2, 2, 2)],
    "a weight without entries": lambda: [weight(0, 3), weight(2)],
    "whole numbers that no gradient reaches": lambda: [torch.ones(3, dtype=torch.int64), weight(2)],
    # refused by torch
    "a dict of names": lambda: dict(linear().named_parameters()),
    "a tensor": lambda: weight(2, 2),
    "a module": linear,
    "nothing": lambda: [],
    "an empty generator": lambda: iter(()),
    "None": lambda: None,
    "a group alone": lambda: {"params": [weight(2, 2)]},
    "a set in a group": lambda: [{"params": {weight(2, 2), weight(3)}}],
    "a set in the second group": lambda: [{"params": [weight(2)]}, {"params": {weight(2, 2)}}],
    "an empty set in a group": lambda: [{"params": set()}],
    "a group without params": lambda: [{"lr": 1.0}],
    "a text in a group": lambda: [{"params": "abc"}],
    "None in a group": lambda: [{"params": None}],
    "a number": lambda: [1.0],
    "None in a list": lambda: [None],
    "a list in a list": lambda: [[weight(2, 2)]],
    "the name last": lambda: [(weight(2, 2), "weight")],
    "some names": lambda: [("weight", weight(2, 2)), weight(3)],
    "names in one group": lambda: [{"params": [("weight", weight(2, 2))]}, {"params": [weight(3)]}],
    "a weight in two groups": lambda: (lambda p: [{"params": [p]}, {"params": [p]}])(weight(2, 2)),
    "a result": lambda: [weight(2, 2) * 1.0],
    "a result in a group": lambda: [{"params": weight(2, 2) * 1.0}],
}


@two_classes
@pytest.mark.parametrize("kind", PARAMS)
def test_params_are_taken_or_refused_as_by_torch(cls: type, kind: str) -> None:
    torch.manual_seed(0)
    expected = outcome(lambda: settings(AdamW(PARAMS[kind]())))
    assert outcome(lambda: settings(cls(PARAMS[kind]()))) == expected


ADDED: dict[str, Callable[[], Any]] = {
    "a list": lambda: [weight(2, 2)],
    "a tensor": lambda: weight(2, 2),
    "a named pair": lambda: ("weight", weight(2, 2)),
    "None": lambda: None,
    "a generator": lambda: linear().parameters(),
    "a set": lambda: {"params": {weight(2, 2)}},
    "names": lambda: {"params": [("weight", weight(2, 2))]},
    "a result": lambda: {"params": [weight(2, 2) * 1.0]},
    "a group": lambda: {"params": weight(2, 2), "lr": 0.5},
    "an empty group": lambda: {"params": []},
}


@two_classes
@pytest.mark.parametrize("kind", ADDED)
def test_a_group_is_added_or_refused_as_by_torch(cls: type, kind: str) -> None:
    def added(optimizer: torch.optim.Optimizer) -> Any:
        result = outcome(lambda: optimizer.add_param_group(ADDED[kind]()))
        return result, settings(optimizer), [group["lr"] for group in optimizer.param_groups]

    assert added(cls([weight(3)], lr=0.1)) == added(AdamW([weight(3)], lr=0.1))


@every_class
def test_a_refused_group_leaves_the_optimizer_as_it_was(cls: type) -> None:
    param = weight(4, 3)
    optimizer = cls([param], lr=0.1)
    for bad in ([weight(2)], {"params": {weight(2)}}, {"params": [param]}, {"params": [weight(2)], "lr": -1.0}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(bad)
    assert settings(optimizer) == [(1, None)]
    optimizer.step()
    assert len(optimizer.state) == 1


@every_class
def test_a_weight_given_twice_is_warned_of(cls: type) -> None:
    param = weight(4, 3)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        cls([param, param])


def test_a_weight_given_twice_takes_two_steps() -> None:
    ours, torchs = weight(4, 3), weight(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for optimizer in (LowMemAdamW([ours, ours], lr=0.1), AdamW([torchs, torchs], lr=0.1, weight_decay=0.0)):
            for _ in range(3):
                optimizer.step()
    torch.testing.assert_close(ours, torchs)


@every_class
def test_a_lazy_weight_is_refused_with_what_to_do(cls: type) -> None:
    with pytest.raises(ValueError, match="forward"):
        cls(nn.LazyLinear(2).parameters())


# -- learning rates that are tensors --------------------------------------------------------------------------------


@two_classes
@pytest.mark.parametrize("shape", [(2,), (0,), (2, 1), (3, 3)])
def test_a_tensor_lr_of_other_than_one_element_is_torchs_error(cls: type, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 1e-3)
    expected = outcome(lambda: AdamW([weight(3)], lr=lr))
    assert expected == (ValueError, "Tensor lr must be 1-element")
    assert outcome(lambda: cls([weight(3)], lr=lr)) == expected
    assert outcome(lambda: cls([{"params": [weight(3)], "lr": lr}])) == expected
    assert outcome(lambda: cls([weight(3)]).add_param_group({"params": [weight(2)], "lr": lr})) == expected


@every_class
def test_a_tensor_lr_of_two_elements_set_later_changes_nothing(cls: type) -> None:
    param = weight(4, 3)
    optimizer = cls([param])
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["lr"] = torch.tensor([1e-3, 1e-3])
    with pytest.raises(ValueError, match="element"):
        optimizer.step()
    assert torch.equal(param, before)


@every_class
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_lr_of_one_element_is_a_number(cls: type, shape: tuple[int, ...], capturable: bool) -> None:
    if capturable and cls in (CoapAdamW, CoapAdafactor, Soap):
        pytest.skip("capturable does not go with projections")
    weights = []
    for lr in (2**-6, torch.full(shape, 2**-6)):
        params = [weight(4, 3), weight(5), weight()]
        optimizer = cls(params, lr=lr, weight_decay=0.1, capturable=capturable)
        for _ in range(3):
            optimizer.step()
        weights.append([param.detach() for param in params])
    torch.testing.assert_close(*weights)


# -- state dicts ----------------------------------------------------------------------------------------------------


def trained(cls: type, params: Any, steps: int = 2, **options: Any) -> torch.optim.Optimizer:
    optimizer = cls(params, **options)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    return optimizer.state_dict()["state"]


def grouped(named: Iterable[tuple[str, Tensor]], names: bool) -> list[dict[str, Any]]:
    """Two groups, matrices and the rest, with names or without."""
    entries = list(named)
    split = ([e for e in entries if e[1].ndim > 1], [e for e in entries if e[1].ndim < 2])
    return [{"params": [entry if names else entry[1] for entry in part]} for part in split]


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))


@two_classes
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(("saved_names", "own_names"), [(True, False), (False, True), (True, True), (False, False)])
def test_names_are_adopted_where_one_side_has_them(
    cls: type, groups: bool, saved_names: bool, own_names: bool
) -> None:
    def params(names: bool) -> Any:
        model = convolutions()
        if groups:
            return grouped(model.named_parameters(), names)
        return model.named_parameters() if names else model.parameters()

    def loaded(kind: type) -> list[Any]:
        optimizer = kind(params(own_names))
        optimizer.load_state_dict(trained(kind, params(saved_names)).state_dict())
        assert settings(optimizer) == settings(copy.deepcopy(optimizer))
        optimizer.load_state_dict(optimizer.state_dict())
        return [group.get("param_names") for group in optimizer.state_dict()["param_groups"]]

    assert loaded(cls) == loaded(AdamW)


WRAPPED = {
    "module.{}": "DDP",
    "module.module.{}": "DDP twice",
    "_orig_mod.{}": "torch.compile",
    "module._orig_mod.{}": "torch.compile in DDP",
    "_fsdp_wrapped_module.{}": "FSDP",
    "block._checkpoint_wrapped_module.{}": "a checkpointed block",
    "block._orig_mod.{}": "a compiled block",
    "base_model.model.{}": "PEFT",
}


@two_classes
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("saved_wrapped", [False, True])
def test_names_are_compared_without_wrappers(cls: type, wrapper: str, saved_wrapped: bool) -> None:
    plain = [canonical_name(wrapper.format(name)) for name in ("weight", "bias")]
    wrapped = [wrapper.format(name) for name in ("weight", "bias")]
    saved, own = (wrapped, plain) if saved_wrapped else (plain, wrapped)

    def params(names: list[str]) -> list[tuple[str, Tensor]]:
        return list(zip(names, (weight(4, 3), weight(4)), strict=True))

    source = trained(cls, params(saved))
    target = cls(params(own))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(state_of(target), state_of(source))
    assert [canonical_name(name) for name in target.param_groups[0]["param_names"]] == plain


@two_classes
@pytest.mark.parametrize("other", ["gate", "encoder.weight", "modules.weight", "orig_mod.weight"])
def test_names_of_another_weight_are_refused(cls: type, other: str) -> None:
    source = trained(cls, [("weight", weight(4, 3))])
    with pytest.raises(ValueError, match=f"{other}|weight"):
        cls([(other, weight(4, 3))]).load_state_dict(source.state_dict())


STEPS: dict[str, Callable[[int], Any]] = {
    "float": float,
    "int": int,
    "float64 tensor": lambda step: torch.tensor(step, dtype=torch.float64),
    "int64 tensor": lambda step: torch.tensor(step),
    "tensor of one axis": lambda step: torch.tensor([float(step)]),
}


@every_class
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_is_another_kind_of_number_is_converted(cls: type, kind: str) -> None:
    params, others = [weight(4, 3), weight(5)], [weight(4, 3), weight(5)]
    optimizer = trained(cls, params, steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = STEPS[kind](3)
    resumed = cls(others)
    resumed.load_state_dict(saved)
    for state in resumed.state.values():
        assert (state["step"].dtype, tuple(state["step"].shape), state["step"].item()) == (torch.float32, (), 3)
    with torch.no_grad():
        for param, other in zip(params, others, strict=True):
            other.copy_(param)
            other.grad = param.grad
    optimizer.step()
    resumed.step()
    torch.testing.assert_close(others, params, rtol=0, atol=0)
    torch.testing.assert_close(state_of(resumed), state_of(optimizer), rtol=0, atol=0)


@two_classes
@pytest.mark.parametrize("step", [float("nan"), -1.0, "three", torch.ones(2)])
def test_a_step_that_is_no_count_is_refused(cls: type, step: Any) -> None:
    optimizer = trained(cls, [weight(4, 3)])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    with pytest.raises(ValueError, match="step"):
        optimizer.load_state_dict(saved)


@every_class
def test_entries_of_the_state_that_belong_to_no_weight_are_carried(cls: type) -> None:
    """torch's own suite keeps flags there, and so do tools that keep a count of the whole optimizer."""
    source, target = trained(cls, [weight(4, 3)]), cls([weight(4, 3)])
    source.state["calls"] = 3  # type: ignore[index]
    target.load_state_dict(source.state_dict())
    assert target.state["calls"] == 3  # type: ignore[index]
    target.load_state_dict(pickle.loads(pickle.dumps(target.state_dict())))
    assert target.state["calls"] == 3  # type: ignore[index]
    target.param_groups[0]["params"][0].grad = torch.ones(4, 3)
    target.step()
    assert copy.deepcopy(target).state["calls"] == 3


@every_class
def test_a_state_dict_of_no_step_loads(cls: type) -> None:
    optimizer = cls([weight(4, 3), weight(4)])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert len(optimizer.state) == 2


@two_classes
def test_a_longer_or_shorter_state_dict_is_refused(cls: type) -> None:
    one, two, split = [weight(3)], [weight(3), weight(2)], [{"params": [weight(3)]}, {"params": [weight(2)]}]
    for source, target in ((one, two), (two, one), (two, split), (split, two), (split, one)):
        saved = trained(cls, source).state_dict()
        with pytest.raises(ValueError, match="group"):
            cls(target).load_state_dict(saved)


# -- hooks ----------------------------------------------------------------------------------------------------------


@every_class
def test_hooks_run_in_torchs_order(cls: type) -> None:
    def order(kind: type) -> list[str]:
        seen: list[str] = []
        optimizer = kind([weight(4, 3)])
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("every optimizer, before")),
            register_optimizer_step_post_hook(lambda *_: seen.append("every optimizer, after")),
            optimizer.register_step_pre_hook(lambda *_: seen.append("step, before")),
            optimizer.register_step_post_hook(lambda *_: seen.append("step, after")),
            optimizer.register_state_dict_pre_hook(lambda _: seen.append("save, before")),
            optimizer.register_state_dict_post_hook(lambda _, saved: seen.append("save, after")),
            optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append("load, before")),
            optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load, after")),
        ]
        try:
            optimizer.step(lambda: seen.append("closure"))
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return seen

    assert order(cls) == order(AdamW)


@every_class
def test_a_hook_may_replace_what_is_saved_and_what_is_loaded(cls: type) -> None:
    optimizer = trained(cls, [weight(4, 3)])
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "run": 7})
    saved = optimizer.state_dict()
    assert saved["run"] == 7

    def other_rate(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        return {**loaded, "param_groups": [{**group, "lr": 0.5} for group in loaded["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(other_rate)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] != 0.5


# -- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.5**epoch, lambda epoch: 0.9**epoch]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda epoch: 0.5, lambda epoch: 0.9]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=10),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [1e-4, 1e-3], [1e-2, 1e-1], step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[1e-4, 1e-5]),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.06]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@two_classes
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_same_rates_and_betas(cls: type, name: str, tensor_lr: bool) -> None:
    def rate(value: float) -> float | Tensor:
        return torch.tensor(value) if tensor_lr else value

    def run(kind: type) -> tuple[list[Any], list[Tensor]]:
        params = [weight(4, 3), weight(5)]
        groups = [{"params": params[:1], "lr": rate(2**-5)}, {"params": params[1:]}]
        optimizer = kind(groups, lr=rate(2**-7), betas=(0.9, 0.999), weight_decay=0.0)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for _ in range(6):
            for param in params:
                param.grad = param.detach() * 2
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(float(group["lr"]), *map(float, group["betas"])) for group in optimizer.param_groups])
        return seen, [param.detach() for param in params]

    (rates, weights), (torch_rates, torch_weights) = run(cls), run(AdamW)
    torch.testing.assert_close(rates, torch_rates)
    if cls is LowMemAdamW:
        torch.testing.assert_close(weights, torch_weights)


# -- stepping -------------------------------------------------------------------------------------------------------

META: dict[str, Callable[[], list[Tensor]]] = {
    "a small weight": lambda: [torch.empty(4, 3)],
    "a weight of blocks": lambda: [torch.empty(64, 128)],
    "vectors and numbers": lambda: [torch.empty(5), torch.empty(())],
    "bfloat16": lambda: [torch.empty(64, 128, dtype=torch.bfloat16)],
    "a layer": lambda: [torch.empty(6, 4), torch.empty(6)],
}


@every_class
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", META)
def test_a_step_on_the_meta_device_works(cls: type, kind: str, bits: int) -> None:
    params = [nn.Parameter(param.to("meta")) for param in META[kind]()]
    optimizer = cls(params, state_bits=bits, min_8bit_size=0)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert state["step"].item() == 2
        assert all(tensor.is_meta for name, tensor in state.items() if name not in ("step", "proj_count"))


@every_class
def test_weights_on_the_meta_device_leave_the_others_alone(cls: type) -> None:
    """A model that is loaded in part."""
    there, alone = weight(4, 3), weight(4, 3)
    absent = nn.Parameter(torch.empty(4, 3, device="meta"))
    absent.grad = torch.empty_like(absent)
    for optimizer in (cls([absent, there], lr=0.1), cls([alone], lr=0.1)):
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(there, alone, rtol=0, atol=0)


@every_class
@pytest.mark.parametrize("shape", [(4, 3), (64, 128), (5,)])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_shows_in_the_version_of_a_weight(cls: type, shape: tuple[int, ...], bits: int) -> None:
    """Which is how autograd knows that a weight it saved is another now."""
    param = weight(*shape)
    optimizer = cls([param], state_bits=bits, min_8bit_size=0)
    optimizer.step()
    version = param._version
    optimizer.step()
    assert param._version > version


@every_class
def test_a_backward_pass_over_a_stepped_weight_is_torchs_error(cls: type) -> None:
    param = weight(3, 3)
    optimizer = cls([param], lr=0.1)
    optimizer.step()  # SOAP's first prepares
    inputs = torch.ones(2, 3, requires_grad=True)
    loss = ((inputs @ param).relu() @ param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_inference_tensors_are_torchs_error(cls: type) -> None:
    with torch.inference_mode():
        param, grad = torch.ones(4, 3), torch.ones(4, 3)
    param.grad = grad
    optimizer = cls([param])
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 3))


@every_class
def test_a_step_may_be_taken_in_inference_mode(cls: type) -> None:
    inside, outside = weight(4, 3), weight(4, 3)
    ours, other = cls([inside], lr=0.1), cls([outside], lr=0.1)
    for number in range(4):
        with torch.inference_mode(number == 1):
            ours.step()
        other.step()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@two_classes
@pytest.mark.parametrize("result", [None, 3, 2.5, torch.tensor(1.5)])
def test_a_closure_is_called_once_with_gradients_on_and_its_result_returned(cls: type, result: Any) -> None:
    enabled = []

    def closure() -> Any:
        enabled.append(torch.is_grad_enabled())
        return result

    with torch.no_grad():
        assert cls([weight(4, 3)]).step(closure) is result
    assert enabled == [True]


@every_class
def test_zero_grad_keeps_the_gradient_where_it_is_asked_to(cls: type) -> None:
    param = weight(4, 3)
    grad = param.grad
    optimizer = cls([param])
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is grad
    assert grad is not None
    assert not grad.any()
    optimizer.zero_grad()
    assert param.grad is None


def toggled(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for trains in (True, False, True):
        param.requires_grad_(trains)
        param.grad = torch.ones_like(param) if trains else None
        optimizer.step()


def no_grad_between(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    grad = param.grad
    for present in (True, False, True):
        param.grad = grad if present else None
        optimizer.step()


def state_removed(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    del optimizer.state[param]
    optimizer.step()


def another_dtype_by_default(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)


def another_device_by_default(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()


def under_autocast(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()


def gradient_with_a_graph(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference cycle
        (param**3).sum().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def gradient_expanded(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch.ones(()).expand(param.shape)
    optimizer.step()


def gradient_negated(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch._neg_view(torch.ones(param.shape))
    optimizer.step()
    optimizer.step()


def gradient_misaligned(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch.arange(param.numel() + 1.0)[1:].view(param.shape)
    optimizer.step()


def gradient_of_zeros(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch._efficientzerotensor(param.shape)
    optimizer.step()


def gradient_not_finite(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    assert param.grad is not None
    param.grad[0] = float("nan")
    param.grad[1] = float("inf")
    optimizer.step()


def shared_memory(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.share_memory_()
    optimizer.step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.share_memory_()
    optimizer.step()
    assert param.is_shared()
    assert all(tensor.is_shared() for state in optimizer.state.values() for tensor in state.values())


def hyperparameters_later(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.param_groups[0].update(lr=0.5, betas=[0.5, 0.5], eps=1e-3, weight_decay=0.2)
    optimizer.step()


def scaler(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):  # the second is left out
        param.grad = None
        scaler.scale((param**2).sum() * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([param], 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[param]["step"].item() == 2


SITUATIONS: list[Callable[[nn.Parameter, torch.optim.Optimizer], None]] = [
    toggled,
    no_grad_between,
    state_removed,
    another_dtype_by_default,
    another_device_by_default,
    under_autocast,
    gradient_with_a_graph,
    gradient_expanded,
    gradient_negated,
    gradient_misaligned,
    gradient_of_zeros,
    gradient_not_finite,
    shared_memory,
    hyperparameters_later,
    scaler,
]


@pytest.mark.parametrize("shape", [(4, 3), (2, 64), (5,)])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_the_weight_ends_where_adamw_leaves_it(
    situation: Callable[[nn.Parameter, torch.optim.Optimizer], None], shape: tuple[int, ...]
) -> None:
    ours, torchs = weight(*shape), weight(*shape)
    situation(ours, LowMemAdamW([ours], lr=0.1, weight_decay=0.0))
    situation(torchs, AdamW([torchs], lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(ours, torchs, equal_nan=True)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(4, 3).t(),
    "every second column": lambda: torch.randn(3, 8)[:, ::2],
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "rows of a larger weight": lambda: torch.randn(6, 4)[1:4],
    "float64": lambda: torch.randn(3, 4, dtype=torch.float64),
    "no axis": lambda: torch.randn(()),
    "no entries": lambda: torch.randn(0, 4),
    "a result that keeps its gradient": lambda: torch.randn(3, 4),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_weight_of_any_layout_ends_where_adamw_leaves_it(kind: str) -> None:
    ends = []
    for cls in (LowMemAdamW, AdamW):
        torch.manual_seed(0)
        param = LAYOUTS[kind]().requires_grad_()
        if kind == "a result that keeps its gradient":
            param = param * 1.0
            param.retain_grad()
        param.grad = torch.randn(param.shape, dtype=param.dtype)
        optimizer = cls([param], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)
    assert ends[0].stride() == ends[1].stride()


@every_class
@pytest.mark.parametrize("shape", [(3, 4), (2, 3), (12,), (4, 3, 1)])
def test_a_gradient_of_another_shape_is_an_error_and_changes_nothing(cls: type, shape: tuple[int, ...]) -> None:
    """torch lets nobody assign one, but `.data` swaps it."""
    param = weight(4, 3)
    optimizer = cls([param])
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(4, 3)
    param.grad.data = torch.ones(shape)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert torch.equal(param, before)


# -- copies, files, processes ---------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    with tempfile.TemporaryFile() as file:
        torch.save(optimizer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


COPIES["torch.save"] = saved_and_loaded


@every_class
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_as_the_original(cls: type, how: str) -> None:
    param = weight(8, 6)
    groups = [{"params": [("weight", param)], "lr": torch.tensor(0.1), "tag": {"any": ["thing"]}}]
    optimizer = cls(groups)
    optimizer.step()
    optimizer.step()
    twin = COPIES[how](optimizer)
    other = twin.param_groups[0]["params"][0]
    assert other is not param
    other.grad = param.grad
    assert twin.param_groups[0]["tag"] == {"any": ["thing"]}
    optimizer.step()
    twin.step()
    torch.testing.assert_close(other, param, rtol=0, atol=0)
    torch.testing.assert_close(state_of(twin), state_of(optimizer), rtol=0, atol=0)


@every_class
def test_functional_calls_and_ensembles_train(cls: type) -> None:
    model = nn.Linear(4, 3)
    params = dict(model.named_parameters())
    optimizer = cls(params.items())

    def loss(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (inputs,)).pow(2).sum()

    before = float(loss(params, torch.ones(2, 4)).detach())
    for _ in range(3):
        for name, grad in torch.func.grad(loss)(params, torch.ones(2, 4)).items():
            params[name].grad = grad.detach()
        optimizer.step()
    assert float(loss(params, torch.ones(2, 4)).detach()) < before

    stacked, _ = torch.func.stack_module_state([nn.Linear(4, 3) for _ in range(3)])
    ensemble = cls(stacked.values())
    for param in stacked.values():
        param.grad = torch.ones_like(param)
    starts = {name: param.detach().clone() for name, param in stacked.items()}
    ensemble.step()
    ensemble.step()
    assert all((param < starts[name]).all() for name, param in stacked.items())


@every_class
def test_an_average_of_weights_follows_the_steps(cls: type) -> None:
    model = nn.Linear(4, 3)
    average = AveragedModel(model)
    optimizer = cls(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.module.weight.detach(), torch.stack(seen).mean(0))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of one, without a port."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_class
@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer_shards_it(cls: type) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(kind: type) -> Any:
        params = [weight(4, 3), weight(5), weight(2, 2)]
        groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:2]}]
        sharded = ZeroRedundancyOptimizer(groups, optimizer_class=kind, lr=0.1)
        sharded.add_param_group({"params": params[2:], "lr": 0.3})
        return sharded

    def rates(kind: type) -> list[Any]:
        sharded = make(kind)
        scheduler = lr_scheduler.LambdaLR(sharded, [lambda epoch, base=base: base**epoch for base in (0.5, 0.9, 0.1)])
        seen = []
        for _ in range(3):
            sharded.step()
            scheduler.step()
            seen.append([(group["lr"], len(group["params"])) for group in sharded.optim.param_groups])
        return seen

    assert rates(cls) == rates(AdamW)

    sharded, resumed = make(cls), make(cls)
    sharded.step()
    sharded.step()
    sharded.consolidate_state_dict()
    resumed.load_state_dict(sharded.state_dict())
    torch.testing.assert_close(state_of(resumed.optim), state_of(sharded.optim), rtol=0, atol=0)


# -- what is absent -------------------------------------------------------------------------------------------------

ABSENT = ["maximize", "amsgrad", "foreach", "fused", "differentiable"]


@two_classes
@pytest.mark.parametrize("flag", ABSENT)
def test_flags_of_torch_that_are_absent_are_refused_and_documented(cls: type, flag: str) -> None:
    with pytest.raises(TypeError, match=flag):
        cls([weight(4, 3)], **{flag: True})
    with pytest.raises((TypeError, ValueError), match=flag):
        cls([{"params": [weight(4, 3)], flag: True}])
    with pytest.raises((TypeError, ValueError), match=flag):
        cls([weight(4, 3)]).add_param_group({"params": [weight(3)], flag: True})
    assert f"`{flag}`" in DOCS.read_text()


@two_classes
@pytest.mark.parametrize("flag", ABSENT)
def test_flags_of_torch_that_are_off_may_stand_in_a_group(cls: type, flag: str) -> None:
    """As in groups that were made for AdamW."""
    param = weight(4, 3)
    optimizer = cls([{"params": [param], flag: None if flag in ("foreach", "fused") else False}])
    optimizer.step()
    assert flag in optimizer.param_groups[0]


@every_class
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse", lambda: nn.Parameter(torch.ones(4, 3).to_sparse())),
        ("sparse", lambda: nn.Parameter(torch.ones(4, 3).to_sparse_csr())),
        ("complex", lambda: nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))),
        ("complex", lambda: nn.Parameter(torch.ones(3, dtype=torch.complex128))),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_and_complex_weights_are_refused_and_documented(
    cls: type, kind: str, make: Callable[[], nn.Parameter]
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"(?i){kind}"):
        cls([make()])
    assert kind in DOCS.read_text().lower()


@every_class
def test_sparse_gradients_are_refused_before_anything_moves(cls: type) -> None:
    embedding, dense = nn.Embedding(6, 4, sparse=True), weight(4, 3)
    optimizer = cls([dense, *embedding.parameters()])
    embedding(torch.tensor([1, 2])).sum().backward()
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, before)
