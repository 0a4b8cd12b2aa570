"""What a user's tools show of an optimizer class and of an optimizer: `help()`, signatures and `print`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from textwrap import fill
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.options import HYPERPARAMETERS, Option
from hf_lowmem.sizes import readable

_ARGS = re.compile(r"^Args:\n((?: {4}.*\n|\n(?= ))*)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}([\w, ]+): .*\n(?: {8}.*\n)*", re.MULTILINE)


def show_options(cls: Any) -> None:
    """Give an optimizer class the signature and the docstring that name every option, inherited ones too.

    What the class's own docstring says of an option wins over the text of the option's field.
    """
    cls.__signature__ = signature = _signature(cls)
    if cls.__doc__:
        own, *inherited = [inspect.cleandoc(base.__doc__) + "\n" for base in cls.__mro__ if base.__doc__]
        declared = {**cls.hyperparameters.declared(), **cls.options_cls.declared()}
        fields = "Args:\n" + "".join(map(_entry, declared.values()))
        args = "Args:\n" + "".join(_entries(signature.parameters, [own, fields, *inherited]))
        if not _ARGS.search(own):
            own += "\nArgs:\n"
        cls.__doc__ = _ARGS.sub(lambda found: args, own).rstrip("\n")


def _signature(cls: Any) -> Signature:
    """Return the signature of `__init__` with all that it passes on, the class's own options before inherited ones."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__[: cls.__mro__.index(Optimizer)]:
        if "__init__" in vars(base):
            _, *keywords = inspect.signature(vars(base)["__init__"]).parameters.values()
            for keyword in keywords:
                found.setdefault(keyword.name, keyword)
    for name, default in vars(cls.hyperparameters).items():
        if found[name].default is ...:
            found[name] = found[name].replace(default=default)
    declared = cls.options_cls.declared()
    for base in cls.options_cls.__mro__:
        for name in filter(declared.__contains__, inspect.get_annotations(base)):
            default, annotation = declared[name].default, declared[name].annotation
            found.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = [parameter for parameter in found.values() if parameter.kind not in variadic]
    return Signature(sorted(named, key=lambda parameter: parameter.kind))


def _entry(option: Option) -> str:
    """Return the entry of `Args` that an option's own text makes."""
    first, further = " " * 4, " " * 8
    return fill(f"{first}{option.name}: {option.text}", 115, subsequent_indent=further, break_on_hyphens=False) + "\n"


def _entries(names: Iterable[str], texts: Iterable[str]) -> list[str]:
    """Return the entries of `Args` that describe `names`, in the order of `names`; of two, the first text's."""
    described: dict[str, str] = {}
    for text in texts:
        for args in _ARGS.finditer(text):
            for entry in _ENTRY.finditer(args[1]):
                for name in entry[1].split(", "):
                    described.setdefault(name, entry[0])
    return list(dict.fromkeys(described[name] for name in names if name in described))


def describe(optimizer: Optimizer, options: Mapping[str, Any]) -> str:
    """Return one line with the `options` that are not their defaults, what is trained, and how large the state is.

    Values that differ between groups come in the order of the groups, each once.
    """
    chosen = []
    for name, parameter in inspect.signature(type(optimizer)).parameters.items():
        if name in HYPERPARAMETERS:
            values = [_plain(group.get(name)) for group in optimizer.param_groups]
        else:
            values = [options.get(name, parameter.default)]
        if any(value != parameter.default for value in values):
            chosen.append(f"{name}={' | '.join(dict.fromkeys(map(repr, values)))}")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    kept = [optimizer.state[param] for param in params if param in optimizer.state]
    state = sum(value.nbytes for each in kept for value in each.values() if isinstance(value, Tensor))
    return (
        f"{type(optimizer).__name__}({', '.join(chosen)}): groups: {len(optimizer.param_groups)}, parameters: "
        f"{len(params)} of {sum(param.numel() for param in params):,} entries, state: "
        f"{readable(state) if state else 'none before the first step'}"
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
