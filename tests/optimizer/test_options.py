"""What `help`, signatures and `print` show of the optimizers."""

from __future__ import annotations

import copy
import inspect
import pydoc
import re
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem import algorithms
from hf_lowmem.algorithms import CoapAdamW, SlimAdamW

CLASSES = [
    value for value in vars(algorithms).values() if isinstance(value, type) and value.__name__ in algorithms.__all__
]
SHARED = {
    *("rounding", "rounding_seed", "offload_state", "fused_clip", "capturable", "compile", "roles"),
    *("state_bits", "block_size", "min_8bit_size"),
}


def options(cls: type) -> dict[str, inspect.Parameter]:
    """The keywords of a class but those that every optimizer of torch has."""
    return dict(list(inspect.signature(cls).parameters.items())[5:])


@pytest.mark.parametrize("cls", CLASSES)
def test_help_lists_and_explains_every_option(cls: type) -> None:
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    signature, _, args = text.partition("Args:")
    assert "**" not in signature.partition("\n\n")[2].splitlines()[1]
    assert set(options(cls)) >= SHARED
    for name in inspect.signature(cls).parameters:
        assert name in signature
        assert len(re.findall(rf"(?m)^ \|      (?:\w+, )*{name}(?:, \w+)*: \S", args)) == 1, name


def test_own_options_are_those_that_the_class_takes() -> None:
    assert {"axes", "rows_per_block", "segments"} <= set(options(SlimAdamW))
    assert {"rank", "update_interval", "align", "correct_bias"} <= set(options(CoapAdamW))
    assert "axes" not in options(CoapAdamW)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_signature_is_what_the_class_takes(cls: Any) -> None:
    given = {name: parameter.default for name, parameter in options(cls).items()}
    assert inspect.Parameter.empty not in given.values()
    written, plain = (cls([nn.Parameter(torch.zeros(64, 64))], **keywords) for keywords in (given, {}))
    assert written.defaults == plain.defaults
    assert {*written.defaults, *cls.layout_options} - {"algorithm", "lr", "betas", "eps", "weight_decay"} == set(
        given
    ) - {"roles"}
    with pytest.raises(TypeError):
        cls([nn.Parameter(torch.zeros(64, 64))], not_an_option=1)


def test_a_class_of_the_users_shows_its_options_too() -> None:
    class Mine(SlimAdamW):
        """Ours, with a twist.

        Args:
            twist: how much.
            block_size: as the twist wants it.
        """

        def __init__(self, params: Any, *, twist: float = 0.5, **others: Any) -> None:
            super().__init__(params, **others)

    class Undocumented(Mine):
        pass

    assert list(options(Undocumented)) == list(options(Mine)) == ["twist", *options(SlimAdamW)]
    assert Undocumented.__doc__ is None
    doc = inspect.getdoc(Mine)
    assert doc is not None
    assert doc.startswith("Ours, with a twist.\n\nArgs:\n    params: ")
    assert "    twist: how much.\n" in doc
    assert doc.count("block_size: ") == 1
    assert "block_size: as the twist wants it." in doc
    assert "block_size: largest" in str(SlimAdamW.__doc__)


def model() -> nn.Module:
    return nn.ModuleDict({"tokens": nn.Embedding(128, 64), "norm": nn.LayerNorm(64)})


@pytest.mark.parametrize("name", hf_lowmem.optim_names())
def test_print_is_one_short_line(name: str) -> None:
    optimizer = hf_lowmem.build_optimizer(model(), name, lr=5e-4, weight_decay=0.1)
    text = str(optimizer)
    assert text == repr(optimizer)
    assert "\n" not in text
    assert len(text) < 250
    assert text.startswith(f"{type(optimizer).__name__}(lr=0.0005, ")
    assert "weight_decay=0.1 | 0.0" in text
    assert ("state_bits=8" in text) == name.endswith("_8bit")
    assert "parameters: 3 of 8,320 entries" in text
    assert text.endswith("state: none before the first step")


def test_print_says_what_is_not_the_default_and_the_state_there_is() -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = SlimAdamW([{"params": [param]}], lr=torch.tensor(0.25), axes=(1,), rounding="kahan")
    param.grad = torch.ones_like(param)
    optimizer.step()
    expected = "SlimAdamW(lr=0.25, axes=(1,), rounding='kahan'): groups: 1, parameters: 1 of 4,096 entries, state: "
    assert str(optimizer) == expected + "16.25 KiB"  # one number per entry and row, and the step
    optimizer.param_groups[0]["lr"] = 0.5
    assert str(copy.deepcopy(optimizer)).startswith("SlimAdamW(lr=0.5, ")
    assert str(SlimAdamW([param])).startswith("SlimAdamW(): groups: 1, ")
