"""Where torch.optim.AdamW defines which parameters, groups and learning rates are taken, every class does the same."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW, LowMemAdamW, Soap
from tests import ROOT
from tests.support.torch_twins import Named, every_class, outcome, settings, two_classes, weight

DOCS = ROOT / "docs" / "torch_agreement.md"


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
