"""What a user's tools show of an optimizer class: all its options, which its `__init__` takes as `**options`.

An option is declared once, as a keyword of the class that introduces it or in its `layout_options` and
`schedule_options`, and described once, in that class's docstring or below.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem.sizes import readable

# Of classes that have no other docstring in common.
STORAGE_TEXTS = """Args:
    state_bits: 32; 16 stores exp_avg as bfloat16; 8 stores exp_avg, and a full exp_avg_sq, as codes.
    block_size: largest 8-bit block: 256, 128 or 64. A row is the last axis, or as many of the last as make 64
        entries, and its last block may be short.
    min_8bit_size: weights with fewer entries stay float32.
    compile: step through torch.compile.
"""
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")  # those that schedulers and groups change

_ARGS = re.compile(r"^Args:\n((?: {4}.*\n|\n(?= ))*)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}([\w, ]+): .*\n(?: {8}.*\n)*", re.MULTILINE)


def show_options(cls: type) -> None:
    """Give a class the signature and the docstring that name every option, inherited ones too."""
    signature = _signature(cls)
    cls.__signature__ = signature  # type: ignore[attr-defined]
    if cls.__doc__:
        texts = [inspect.cleandoc(base.__doc__) + "\n" for base in cls.__mro__ if base.__doc__]
        args = "Args:\n" + "".join(_entries(signature.parameters, [*texts, STORAGE_TEXTS]))
        own = texts[0] if _ARGS.search(texts[0]) else f"{texts[0]}\nArgs:\n"
        cls.__doc__ = _ARGS.sub(lambda found: args, own).rstrip("\n")


def _signature(cls: type) -> Signature:
    """That of `__init__`, with what it passes on to the classes above, the class's own options first."""
    found: dict[str, Parameter] = {}
    for base in cls.__mro__[: cls.__mro__.index(Optimizer)]:
        if "__init__" in vars(base):
            _, *keywords = inspect.signature(vars(base)["__init__"]).parameters.values()
            for keyword in keywords:
                found.setdefault(keyword.name, keyword)
        for name, default in {
            **vars(base).get("layout_options", {}),
            **vars(base).get("schedule_options", {}),
        }.items():
            found.setdefault(name, Parameter(name, Parameter.KEYWORD_ONLY, default=default))
    named = [parameter for parameter in found.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    return Signature(sorted(named, key=lambda parameter: parameter.kind))


def _entries(names: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The entries of `Args` that describe `names`, in the order of `names`; of two, the first text's."""
    described: dict[str, str] = {}
    for text in texts:
        for args in _ARGS.finditer(text):
            for entry in _ENTRY.finditer(args[1]):
                for name in entry[1].split(", "):
                    described.setdefault(name, entry[0])
    return list(dict.fromkeys(described[name] for name in names if name in described))


def describe(optimizer: Optimizer, options: Mapping[str, Any]) -> str:
    """One line: the `options` that are not their defaults, what is trained, and the state that there is.

    Values that differ between groups are given in the order of the groups, each once.
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
