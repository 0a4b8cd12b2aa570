"""The options of an algorithm, each declared once: its default, its legal values, what it does, and what reads it.

A field of a dataclass that inherits `Options` is an option. The optimizer class, the recipe, the parser of
`optim_args`, the checks, `help()` and the README's table all read that field. Its kind says what depends on it:

    layout    The layout of a weight's state. It is kept beside the groups and compared when a checkpoint is loaded.
    role      The same, but the role of each weight decides it, so that `optim_args` do not take it.
    schedule  The plan of a weight's state, but not its layout: a group holds it, and a resumed run may change it.
    flag      The update rule, which takes it as a keyword. A group holds it, and a resumed run may change it.
    run       How a step is taken. A group holds it, and a resumed run may change it.
    recipe    The recipe alone, which decides the options of each weight from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from hf_lowmem.codecs import CODECS

Kind = Literal["hyperparameter", "layout", "role", "schedule", "flag", "run", "recipe"]


class Legal(NamedTuple):
    """The legal values of an option, in words and as a test."""

    words: str
    includes: Callable[[Any], bool]


def at_least(least: int) -> Legal:
    """Return the whole numbers from `least` on."""
    return Legal(f"a whole number of at least {least}", lambda value: type(value) is int and value >= least)


def _is_not_negative(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")  # torch's own words
    return bool(0 <= value < math.inf)


NOT_NEGATIVE = Legal("a finite number of at least 0", _is_not_negative)
POSITIVE = Legal("a finite number above 0", lambda value: 0 < value < math.inf)
NEGATIVE = Legal("a finite number below 0", lambda value: -math.inf < value < 0)
DECAY = Legal("at least 0 and below 1", lambda value: 0 <= value < 1)
DECAYS = Legal(
    "two numbers, each at least 0 and below 1",
    lambda value: len(value) == 2 and all(0 <= decay < 1 for decay in value),
)


def option(kind: Kind, default: Any, text: str = "", legal: Legal | None = None, choices: Collection[Any] = ()) -> Any:
    """Declare an option as a field of a dataclass.

    Args:
        kind: what depends on the option; see the module's docstring.
        default: the value of an option that is not given.
        text: what the option does, for `help()` and the README.
        legal: the values that an option of numbers takes; `bool`, `Literal` and `None` in its annotation say theirs.
        choices: a table whose keys are the values that it takes, beside None where its annotation has that.
    """
    return field(default=default, metadata={"kind": kind, "text": text, "legal": legal, "table": choices})


def with_default(default: Any, options: type[Options], name: str) -> Any:
    """Declare an option of another class again with a default of its own."""
    return field(default=default, metadata=options.__dataclass_fields__[name].metadata)


hyperparameter = partial(option, "hyperparameter")
layout = partial(option, "layout")
decided_by_role = partial(option, "role")
schedule = partial(option, "schedule")
flag = partial(option, "flag")
run = partial(option, "run")
recipe_only = partial(option, "recipe")


@dataclass(frozen=True)
class Option:
    """One option as its field declares it."""

    name: str
    default: Any
    annotation: Any
    kind: Kind = "recipe"
    text: str = ""
    legal: Legal | None = None
    table: Collection[Any] = ()

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that the option takes, where they are few."""
        if self.table:
            return (*([None] if NoneType in get_args(self.annotation) else []), *self.table)
        return choices_of(self.annotation)

    def check(self, value: Any) -> None:
        """Raise ValueError if `value` is not legal."""
        choices = self.choices
        if choices and value not in choices:
            raise ValueError(f"{self.name}={value!r} is not supported: use one of {', '.join(map(str, choices))}.")
        unset = value is None and NoneType in get_args(self.annotation)
        if self.legal and not unset and not self.legal.includes(value):
            raise ValueError(f"{self.name}={value!r} must be {self.legal.words}.")


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """Return the values that an annotation lists; none where it admits others too."""
    found: list[Any] = []
    for kind in alternatives(annotation):
        if kind is bool:
            found += (False, True)
        elif kind is NoneType:
            found.append(None)
        elif get_origin(kind) is Literal:
            found += get_args(kind)
        else:
            return ()
    return tuple(found)


class Declared:
    """A dataclass whose fields are options."""

    @classmethod
    @cache
    def declared(cls) -> dict[str, Option]:
        """Return the options by name, inherited ones first."""
        hints = get_type_hints(cls)
        found = fields(cls)  # type: ignore[arg-type]
        return {each.name: Option(each.name, each.default, hints[each.name], **each.metadata) for each in found}

    @classmethod
    def defaults(cls, *kinds: Kind) -> dict[str, Any]:
        """Return the defaults by name, of all options or of those of `kinds`."""
        return {name: each.default for name, each in cls.declared().items() if not kinds or each.kind in kinds}

    @classmethod
    def check_values(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError for the first of `values` that is not legal; keys that are no options pass."""
        for name, each in cls.declared().items():
            if name in values:
                each.check(values[name])


@dataclass(frozen=True)
class Hyperparameters(Declared):
    """What torch's own optimizers take by position, with the defaults of one optimizer class.

    Schedulers and groups change these, and a checkpoint brings them back.
    """

    lr: float | Tensor = hyperparameter(1e-3, "learning rate.", NOT_NEGATIVE)  # noqa: RUF009
    betas: tuple[float, float] = hyperparameter(
        (0.9, 0.999), "decay rates of the averages of the gradient and of its square.", DECAYS
    )
    eps: float = hyperparameter(1e-8, "number added to the root of the second moment.", NOT_NEGATIVE)
    weight_decay: float = hyperparameter(0.0, "weight decay, decoupled as in `torch.optim.AdamW`.", NOT_NEGATIVE)


HYPERPARAMETERS = tuple(Hyperparameters.declared())


@dataclass(frozen=True)
class Options(Declared):
    """The options of every algorithm. One that has others inherits this class and adds a field for each."""

    state_bits: int = layout(
        32,
        "bits per number of the state: 32; 16, which stores `exp_avg` as bfloat16; or 8, which stores `exp_avg`, and "
        "a full `exp_avg_sq`, as 8-bit codes, and is what `_8bit` in an optim name stands for.",
        choices=CODECS,
    )
    block_size: Literal[256, 128, 64] = layout(
        256,
        "largest 8-bit block: 256, 128 or 64. The largest of these that divides a row is taken (under COAP, any "
        "divisor of the projected rows from 32 up); where none does, rows end in a shorter block. A row is the last "
        "axis, or as many of the last as make 64 entries.",
    )
    min_8bit_size: int = layout(4096, "moments with fewer entries stay float32.", at_least(0))
    compile: bool = run(False, "step through `torch.compile`, which takes seconds of compilation per shape.")
    rounding: Literal["nearest", "stochastic", "kahan"] = run(
        "nearest",
        'how a bfloat16 or float16 weight takes an update: "nearest" rounds it; "stochastic" rounds at random, so '
        'that nothing is lost on average; "kahan" keeps what was cut off in 2 more bytes per entry, and with it the '
        "precision of float32. float32 weights are not touched.",
    )
    rounding_seed: int = run(
        0,
        'seed of the noise of "stochastic", which also depends on the place and the step of a parameter.',
        at_least(0),
    )
    offload_state: bool = run(
        False,
        "keep the state in pinned host memory while a trainer generates, or between the steps of one that does not; "
        "in a loop of your own, `release_state` moves it there.",
    )
    fused_clip: bool = run(
        False,
        "let the step clip by a Trainer's `max_grad_norm`: gradients are read once for the norm and scaled as the "
        "update reads them, and the logged `grad_norm` is summed in float32.",
    )
    capturable: bool = run(
        False,
        "let a CUDA graph capture the step, in a loop of your own; `step` and a tensor `lr` are read on the device "
        "only. It excludes COAP, SOAP, `compile` and `offload_state`.",
    )
    release: bool = run(
        False,
        "step each weight as soon as its gradient is complete, and free the gradient, so that one at a time is on the "
        "device; in a loop of your own, `release_gradients` does it.",
    )
    clip: Literal["auto", "none", "host", "recompute", "previous"] = run(
        "auto",
        'where the norm that clips released gradients comes from: "host" keeps gradients in host memory until it is '
        'known, and adds up those of several batches there; "recompute" finds it by a backward pass of its own; '
        '"previous" takes the norm of the step before, which is '
        'not exact; "none" neither clips nor accumulates; "auto" is "none" if the Trainer does neither, else "host".',
    )
