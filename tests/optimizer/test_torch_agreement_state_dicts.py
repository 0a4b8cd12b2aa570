"""Where torch.optim.AdamW defines what is saved, loaded, copied and shared, every class does the same."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from torch.optim.swa_utils import AveragedModel

from hf_lowmem.roles import canonical_name
from tests.support.declarations import DENSE
from tests.support.torch_twins import every_class, settings, trained, two_classes, weight


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
    optimizer = cls(params.items(), **DENSE[cls])

    def loss(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (inputs,)).pow(2).sum()

    before = float(loss(params, torch.ones(2, 4)).detach())
    for _ in range(3):
        for name, grad in torch.func.grad(loss)(params, torch.ones(2, 4)).items():
            params[name].grad = grad.detach()
        optimizer.step()
    assert float(loss(params, torch.ones(2, 4)).detach()) < before

    stacked, _ = torch.func.stack_module_state([nn.Linear(4, 3) for _ in range(3)])
    ensemble = cls(stacked.values(), **DENSE[cls])
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
