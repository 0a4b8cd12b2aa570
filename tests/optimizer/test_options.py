"""What `help`, signatures and `print` show of the optimizers."""

from __future__ import annotations

import copy
import inspect
import pydoc
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem import algorithms
from hf_lowmem.algorithms import RECIPES, CoapAdamW, LowMemAdamW, SlimAdamW
from hf_lowmem.options import Options, at_least, flag, layout, schedule
from hf_lowmem.state import StatePlan
from hf_lowmem.update_rules import RULE_FLAGS
from tests.support.declarations import CLASSES

SHARED = {
    *("rounding", "rounding_seed", "offload_state", "fused_clip", "capturable", "compile", "roles"),
    *("state_bits", "block_size", "min_8bit_size"),
}


def options(cls: type) -> dict[str, inspect.Parameter]:
    """The keywords of a class but those that every optimizer of torch has."""
    return dict(list(inspect.signature(cls).parameters.items())[5:])


def test_every_class_is_declared() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(algorithms.__all__) - {"RECIPES"}


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


@dataclass(frozen=True)
class TwistOptions(Options):
    twist: Literal["left", "right"] = layout("left", "which way.")
    turns: int = schedule(2, "how often.", at_least(1))
    compile: bool = flag(True, "another default, for another reader.")


class Twisted(LowMemAdamW):
    """AdamW with options of its own."""

    options_cls = TwistOptions

    @classmethod
    def make_plan(cls, shape: tuple[int, ...], *, twist: str, turns: int, **options: Any) -> StatePlan:
        return super().make_plan(shape, **options)


def twisted(**options: Any) -> LowMemAdamW:
    return Twisted([{"params": [nn.Parameter(torch.zeros(64, 64))], **options}])


def test_a_dataclass_declares_all_that_is_known_of_an_option() -> None:
    assert list(options(Twisted))[:4] == ["roles", "twist", "turns", "compile"]
    assert "    turns: how often.\n" in str(Twisted.__doc__)
    assert "    compile: another default, for another reader.\n" in str(Twisted.__doc__)
    optimizer = Twisted([nn.Parameter(torch.zeros(64, 64))], twist="right", turns=3)
    assert str(optimizer).startswith("Twisted(twist='right', turns=3): ")
    (group,) = optimizer.param_groups
    assert (group["turns"], group["compile"], "twist" in group) == (3, True, False)
    assert optimizer.state_dict()["layouts"][0][0]["twist"] == "right"
    with pytest.raises(ValueError, match=r"^twist='up' is not supported: use one of left, right\.$"):
        Twisted([nn.Parameter(torch.zeros(2))], twist="up")
    with pytest.raises(ValueError, match=r"^turns=0 must be a whole number of at least 1\.$"):
        twisted(turns=0)
    with pytest.raises(ValueError, match="turn=1, which is no option of Twisted, though 'turns' is"):
        twisted(turn=1)


def test_a_checkpoint_keeps_the_layout_and_takes_another_schedule() -> None:
    saved = twisted(twist="right", turns=3).state_dict()
    with pytest.raises(ValueError, match="twist='right', expected 'left'"):
        twisted().load_state_dict(saved)
    resumed = twisted(twist="right", turns=4)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["turns"] == 4


# The defaults of recipes that are not those of the optimizer class.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "smmf": {"decay_rate": -0.8, "mask_zero_grads": True, "reference_rounding": False},
    **{key: {"update_limit": "auto"} for key in ("slim_adamw", "factored_adamw", "adam_mini", "adalayer")},
}
DECLARED_ANEW = ("update_limit",)  # by recipes, as its default depends on other options


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_the_options_of_its_class(name: str) -> None:
    recipe_cls = RECIPES[name]
    arguments, optimizer_cls = recipe_cls.arguments(), recipe_cls.optimizer_cls
    declared = optimizer_cls.options_cls.declared()
    own = OWN_DEFAULTS.get(name, {})
    for key, each in declared.items():
        if each.kind != "role" and key not in DECLARED_ANEW:
            assert arguments[key] == replace(each, default=own.get(key, each.default))
    assert all(each.text.endswith(".") for each in {**declared, **arguments}.values())
    flags = set(optimizer_cls.options_cls.defaults("flag"))
    assert set(RULE_FLAGS[optimizer_cls.rule]) <= flags <= {flag for rule in RULE_FLAGS.values() for flag in rule}
    defaults = optimizer_cls.options_cls.defaults("layout", "schedule", "flag", "run", "recipe")
    assert recipe_cls().shared_options() == {**defaults, **own}


@pytest.mark.parametrize(
    ("cls", "given"),
    [(CoapAdamW, {"correct_bias": "no"}), (CoapAdamW, {"project": 2}), (SlimAdamW, {"compile": None})],
)
def test_a_switch_is_true_or_false(cls: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not supported: use one of False, True\.$"):
        cls([nn.Parameter(torch.zeros(64, 64))], **given)


@pytest.mark.parametrize("axes", [None, [1], range(1, 2), ()])
def test_axes_may_be_none_or_any_iterable(axes: Any) -> None:
    optimizer = SlimAdamW([nn.Parameter(torch.zeros(64, 64))], axes=axes)
    assert optimizer.state_dict()["layouts"][0][0]["axes"] == tuple(axes or ())


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
