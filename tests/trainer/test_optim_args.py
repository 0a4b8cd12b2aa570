"""`optim_args` is typed and checked against the recipe's fields, with one sentence for each mistake."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.param_groups import Recipe
from hf_lowmem.trainer.names import OPTIM_NAMES
from hf_lowmem.trainer.optim_args import read_optim_args, recipe_for, typed_options


@dataclass(frozen=True)
class Options(Recipe):
    algorithm: ClassVar[str] = "options"

    flag: bool = False
    count: int = 1
    scale: float = 1.0
    path: str = ""
    maybe_path: str | None = None
    maybe_count: int | None = None
    value: Literal["row", "tensor"] = "row"
    bits: Literal[32, 16, 8] = 32


def typed(optim_args):
    return typed_options(Options, read_optim_args(optim_args), "options")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("flag=true", {"flag": True}),
        ("flag=YES, count = 3", {"flag": True, "count": 3}),
        ("flag=0,scale=2e-3", {"flag": False, "scale": 2e-3}),
        ("path=/a/b c.json", {"path": "/a/b c.json"}),
        ("path=a=b", {"path": "a=b"}),
        ("maybe_path=none,maybe_count=none", {"maybe_path": None, "maybe_count": None}),
        ("maybe_count=-4", {"maybe_count": -4}),
        ("value=Tensor,bits=8", {"value": "tensor", "bits": 8}),
        ('{"path": "a,b", "flag": true, "bits": 16}', {"path": "a,b", "flag": True, "bits": 16}),
        ('  {"maybe_path": null, "scale": 2}', {"maybe_path": None, "scale": 2.0}),
        ({"count": "3", "scale": 0.5}, {"count": 3, "scale": 0.5}),
    ],
)
def test_values_become_the_fields_types(text, expected):
    options = typed(text)
    assert options == expected
    assert [type(value) for value in options.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flg=true", r"optim_args has no key 'flg' for 'options' \(did you mean 'flag'\?\); legal keys: .*bits\."),
        ("flag=maybe", "optim_args flag='maybe' is not legal: expected true or false."),
        ("count=1.5", "optim_args count='1.5' is not legal: expected an integer."),
        ('{"count": true}', "optim_args count=True is not legal: expected an integer."),
        ('{"count": 1.5}', "optim_args count=1.5 is not legal: expected an integer."),
        ("scale=big", "optim_args scale='big' is not legal: expected a number."),
        ('{"path": 3}', "optim_args path=3 is not legal: expected a string."),
        ("maybe_count=some", "optim_args maybe_count='some' is not legal: expected an integer or none."),
        ("value=head", "optim_args value='head' is not legal: expected one of row, tensor."),
        ("bits=4", "optim_args bits='4' is not legal: expected one of 32, 16, 8."),
        ('{"bits": 8.0}', "optim_args bits=8.0 is not legal: expected one of 32, 16, 8."),
        ("flag", "optim_args 'flag' must be key=value,key=value or a JSON object, but 'flag' is not key=value"),
        ("path=a,b", "optim_args 'path=a,b' must be .* but 'b' is not key=value; give values that hold a comma"),
        ("=1", "optim_args '=1' must be"),
        ('{"flag": tru}', "optim_args .* is not valid JSON: "),
        ("flag=1,flag=0", "optim_args has the keys flag, flag: give each key once."),
        ('{"flag": true, "flag": false}', "optim_args has the keys flag, flag: give each key once."),
    ],
)
def test_each_mistake_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        typed(text)


@pytest.mark.parametrize("name", OPTIM_NAMES)
def test_a_name_fixes_its_algorithm_and_state_bits(name):
    recipe = recipe_for(name)
    assert type(recipe) is RECIPES[OPTIM_NAMES[name].algorithm]
    assert recipe.state_bits == (8 if name.endswith("_8bit") else 16 if name == "micro_adam" else 32)


def test_state_bits_may_repeat_the_name_but_not_contradict_it():
    assert recipe_for("slim_adamw_8bit", "state_bits=8") == recipe_for("slim_adamw", "state_bits=8")
    assert recipe_for("slim_adamw", "state_bits=16").state_bits == 16
    with pytest.raises(
        ValueError,
        match=r"^optim_args state_bits=16 contradicts the optim name 'slim_adamw_8bit', which fixes state_bits=8: "
        r"leave it out, or use the name 'slim_adamw'\.$",
    ):
        recipe_for("slim_adamw_8bit", "state_bits=16")
