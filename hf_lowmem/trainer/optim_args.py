"""`optim_args` as text, JSON or a mapping, checked against the options that the algorithm's recipe declares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.options import Option, alternatives
from hf_lowmem.param_groups import Recipe
from hf_lowmem.trainer.names import LAYERWISE, optim_name, unknown_optim

_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "none"}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def recipe_for(
    name: str,
    optim_args: str | Mapping[str, Any] | None = None,
    target_modules: str | Sequence[str] | None = None,
) -> Recipe:
    """Return the recipe that an optim name stands for, with the user's options.

    Args:
        name: an optim name of this package, such as "slim_adamw_8bit".
        optim_args: "key=value,key=value", a JSON object, or a mapping.
        target_modules: `TrainingArguments.optim_target_modules`; the option `target_modules` says the same.

    Raises:
        ValueError: the name is unknown; a key is unknown or repeated; a value has the wrong type; `state_bits`
            or `release` contradicts the name; or target modules are given twice, or for a name that projects nothing.
    """
    found = optim_name(name)
    if found is None:
        raise ValueError(unknown_optim(name))
    algorithm, state_bits = found.algorithm, found.state_bits
    recipe_cls = RECIPES[algorithm]
    given = read_optim_args(optim_args)
    if target_modules is not None:
        if "target_modules" not in recipe_cls.arguments():
            raise ValueError(
                f"optim_target_modules={target_modules!r} means nothing to {name!r}, which projects no weights: "
                "leave it out, or use a name such as 'coap_adamw'."
            )
        if given.setdefault("target_modules", target_modules) != target_modules:
            raise ValueError("optim_target_modules and optim_args target_modules differ: give one of them.")
    options = typed_options(recipe_cls, given, name)
    if state_bits is not None and options.setdefault("state_bits", state_bits) != state_bits:
        raise ValueError(
            f"optim_args state_bits={options['state_bits']} contradicts the optim name {name!r}, which fixes "
            f"state_bits={state_bits}: leave it out, or use the name {algorithm!r}."
        )
    if name.endswith(LAYERWISE) and not options.setdefault("release", True):
        raise ValueError(
            f"optim_args release=false contradicts the optim name {name!r}: leave it out, or use the name "
            f"{name.removesuffix(LAYERWISE)!r}."
        )
    return recipe_cls(**options)


def read_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Split `optim_args` into keys and values; the values of "key=value" text stay strings.

    Raises:
        ValueError: the text is neither "key=value,key=value" nor a JSON object, or it repeats a key.
    """
    if not optim_args:
        return {}
    if isinstance(optim_args, Mapping):
        return dict(optim_args)
    if optim_args.lstrip().startswith("{"):
        try:
            return dict(json.loads(optim_args, object_pairs_hook=_unique))
        except json.JSONDecodeError as error:
            raise ValueError(f"optim_args {optim_args!r} is not valid JSON: {error}.") from None
    return _unique([_key_and_value(item, optim_args) for item in optim_args.split(",")])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"optim_args has the keys {', '.join(key for key, _ in pairs)}: give each key once.")
    return options


def _key_and_value(item: str, optim_args: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"optim_args {optim_args!r} must be key=value,key=value or a JSON object, but {item.strip()!r} is not "
            "key=value; give values that hold a comma as JSON."
        )
    return key.strip(), value.strip()


def typed_options(recipe_cls: type[Recipe], options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Check the options' keys against those of the recipe, and convert the values to the types declared for them."""
    legal = recipe_cls.arguments()
    for key in options:
        if key not in legal:
            nearest = get_close_matches(key, legal, n=1, cutoff=0.6)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"optim_args has no key {key!r} for {name!r}{hint}; legal keys: {', '.join(legal)}.")
    return {key: _typed(legal[key], value) for key, value in options.items()}


def _typed(option: Option, value: Any) -> Any:
    """Convert one value to the type that its option is annotated with."""
    kinds = alternatives(option.annotation)
    # None comes first, because "none" is no string where None is legal.
    for kind in sorted(kinds, key=lambda kind: kind is not type(None)):
        try:
            found = _convert(value, kind)
        except ValueError:
            continue
        if not option.table or found in option.choices:
            return found
    expected = " or ".join(map(_describe, kinds))
    if option.table:
        expected = "one of " + ", ".join(map(str, option.choices))
    raise ValueError(f"optim_args {option.name}={value!r} is not legal: expected {expected}.")


def _convert(value: Any, kind: Any) -> Any:
    """Convert text, or a value read from JSON, to `kind`; raise ValueError where it does not fit."""
    text = value.lower() if isinstance(value, str) else None
    if get_origin(kind) is Literal:
        for legal in get_args(kind):
            if (type(legal) is type(value) and legal == value) or (text is not None and str(legal).lower() == text):
                return legal
    elif kind is type(None):
        if value is None or text in ("none", "null"):
            return None
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in _BOOLS:
            return _BOOLS[str(value).lower()]
    elif get_origin(kind) is list:
        if isinstance(value, (list, tuple)) and all(isinstance(item, get_args(kind)[0]) for item in value):
            return list(value)
    elif kind in (int, float):
        if text is not None or type(value) in (int, kind):
            return kind(value)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return "a JSON list of strings" if get_origin(kind) is list else _EXPECTED[kind]
