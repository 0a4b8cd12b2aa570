"""One declaration per optimizer class; the tests multiply it by storage, rounding, dtype and backend.

An algorithm adds its declaration here, and every test of all optimizers runs on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from hf_lowmem.algorithms import (
    Adalayer,
    AdamMini,
    CoapAdafactor,
    CoapAdamW,
    FactoredAdamW,
    FAdam,
    HFac,
    LowMemAdamW,
    MicroAdam,
    Signum,
    SlimAdamW,
    Smmf,
    Soap,
)
from hf_lowmem.optimizer import LowMemOptimizer

Variant = tuple[dict[str, Any], tuple[int, ...]]  # options of a class, and the shape of a weight that they fit


@dataclass(frozen=True)
class Declaration:
    """An optimizer class and what it is tested with.

    Args:
        variants: options that bring out the branches of the class; the first are the plainest.
        geometries: more of them for tests of kernels: short 8-bit blocks, rows of several axes, fused weights.
        soon: options under which a change of basis happens within the few steps of a test.
        by_sign: whether an entry moves by the sign of its momentum, which may flip where that is almost zero.
        storages: which of `STORAGES` the class has.
        dense: options under which a step moves every entry.
    """

    cls: type[LowMemOptimizer]
    variants: list[Variant]
    geometries: list[Variant] = field(default_factory=list)
    soon: dict[str, Any] = field(default_factory=dict)
    by_sign: bool = False
    storages: tuple[str, ...] = ("32-bit", "8-bit", "kahan")
    dense: dict[str, Any] = field(default_factory=dict)


# The fields of moments.Segment: name, axis, outer, start, stop, axes, rows_per_block, cross_axes.
QKV = (("query", 0, 1, 0, 8, (1,), 4), ("key", 0, 1, 8, 12, (1,), 1), ("value", 0, 1, 12, 16, (0,), 1))
INTERLEAVED = (("gate", 0, 8, 0, 1, (0,), 1), ("up", 0, 8, 1, 2, (0,), 1))
LAST_AXIS = (("query", 1, 1, 0, 128, (0,), 64), ("key", 1, 1, 128, 256, (0,), 1), ("value", 1, 1, 256, 384, (1,), 1))
ODD_LAST_AXIS = (("query", 1, 1, 0, 65, (0,), 5), ("key", 1, 1, 65, 130, (0,), 1), ("value", 1, 1, 130, 195, (1,), 1))

FACTORED_QKV = (
    ("query", 0, 1, 0, 8, (1,), 1, (0,)),
    ("key", 0, 1, 8, 12, (1,), 4),
    ("value", 0, 1, 12, 16, (1,), 1, (0,)),
)
FACTORED_HEADS = (("query", 0, 4, 0, 2, (1,), 1, (0,)), ("value", 0, 4, 2, 4, (1,), 1, (0,)))
FACTORED_LAST_AXIS = (("query", 1, 1, 0, 64, (0,), 1, (1,)), ("value", 1, 1, 64, 192, (0,), 1, (1,)))
FACTORED_EXPERTS = (("gate", 1, 8, 0, 1, (2,), 1, (1,)), ("up", 1, 8, 1, 2, (2,), 1, (1,)))

FULL_SPACE = [
    Declaration(LowMemAdamW, [({}, (16, 128))], geometries=[({}, (5, 67)), ({}, (131,))]),
    Declaration(
        SlimAdamW,
        [({"axes": (1,)}, (3, 8, 64)), ({"segments": QKV}, (16, 128)), ({"segments": LAST_AXIS}, (24, 384))],
        geometries=[
            ({"axes": (1,)}, (16, 128)),
            ({"axes": (0,)}, (16, 128)),
            ({"segments": INTERLEAVED}, (16, 128)),
            ({"axes": (1,)}, (7, 131)),
            ({"axes": (0,)}, (16, 65)),
            ({"axes": (1,)}, (3, 8, 67)),
            ({"axes": (2,)}, (5, 4, 23)),
            ({"segments": QKV}, (16, 131)),
            ({"segments": ODD_LAST_AXIS}, (24, 195)),
            ({"axes": (1,), "update_limit": 0.5}, (7, 131)),
            ({"axes": (0,), "update_limit": 0.5}, (16, 65)),
            ({"segments": LAST_AXIS, "update_limit": 0.5}, (24, 384)),
        ],
    ),
    Declaration(
        FactoredAdamW,
        [({}, (16, 128)), ({"segments": FACTORED_QKV}, (16, 128)), ({}, (3, 8, 64))],
        geometries=[
            ({}, (7, 131)),
            ({"axes": (0,), "cross_axes": (1,)}, (16, 65)),
            ({"segments": FACTORED_HEADS}, (16, 128)),
            ({"segments": FACTORED_LAST_AXIS}, (24, 192)),
            ({"segments": FACTORED_EXPERTS}, (3, 16, 64)),
            ({"axes": (1, 2, 3), "cross_axes": (0,)}, (6, 3, 5, 5)),
            ({"factored": False}, (16, 128)),
            ({"update_limit": math.inf}, (7, 131)),
            ({"segments": FACTORED_QKV, "update_limit": math.inf}, (16, 128)),
        ],
    ),
    Declaration(
        AdamMini,
        [({"axes": (0,), "rows_per_block": 32}, (16, 128))],
        geometries=[
            ({"axes": (1,), "rows_per_block": 4}, (16, 128)),
            ({"axes": (1, 2, 3)}, (6, 3, 4, 64)),
            ({"axes": (1, 2, 3)}, (6, 3, 3, 3)),
            ({"axes": (1,), "rows_per_block": 4}, (16, 65)),
        ],
    ),
    Declaration(
        Adalayer,
        [({"axes": (0, 1)}, (16, 128))],
        geometries=[({"axes": (1, 2)}, (3, 8, 64)), ({"axes": (1, 2)}, (12, 3, 25))],
    ),
    Declaration(Signum, [({}, (16, 128))], geometries=[({}, (6, 3, 5, 5))], by_sign=True),
]
PROJECTED = [
    Declaration(
        CoapAdamW,
        [
            ({"rank": 8}, (16, 128)),
            ({"rank": 8, "transposed": True}, (16, 128)),
            ({"rank": 8, "restore_state": True, "eq5_scale": "rms"}, (48, 64)),
            ({}, (32, 32, 3, 3)),
        ],
        soon={"update_interval": 2, "reproject_factor": 2},
    ),
    Declaration(
        CoapAdafactor,
        [
            ({"rank": 8}, (16, 128)),
            ({"rank": 8, "scale_parameter": True}, (16, 128)),
            ({"scale_parameter": True}, (64, 32, 3, 3)),
            ({"scale_parameter": True, "project": False, "stacked": True}, (3, 8, 64)),
            ({}, (64,)),
        ],
        soon={"update_interval": 2, "reproject_factor": 2},
    ),
    Declaration(
        Soap,
        [({}, (16, 128)), ({"sides": "both", "normalize_grads": True}, (64, 48)), ({"project": False}, (16, 128))],
        soon={"precondition_frequency": 2},
    ),
]
IN_PASSES = [
    Declaration(
        Smmf,
        [
            ({}, (16, 128)),
            ({"stacked": True, "mask_zero_grads": True}, (3, 9, 15)),
            ({"vector_reshape": False}, (131,)),
        ],
        geometries=[
            ({}, (131,)),
            ({}, (31, 57)),
            ({"mask_zero_grads": True}, (6, 3, 5, 5)),
            ({"stacked": True}, (5, 64)),
            ({"stacked": True}, (3, 40, 64)),
        ],
    ),
    Declaration(
        MicroAdam,
        [({"state_bits": 32}, (16, 128)), ({"top_k_block_size": 96, "m": 2, "alpha": 0.1}, (3, 8, 64))],
        storages=("32-bit", "kahan"),
        dense={"density": 1.0},
    ),
    Declaration(
        FAdam,
        [({}, (16, 128)), ({"stacked": True}, (3, 8, 64))],
        geometries=[({"clip_threshold": 0.5}, (5, 67)), ({}, (131,)), ({}, (6, 3, 5, 5))],
    ),
    Declaration(
        HFac,
        [({}, (16, 128)), ({"momentum_in_correction": "previous", "stacked": True}, (3, 8, 64))],
        geometries=[({"clip_threshold": 0.5}, (5, 67)), ({}, (131,)), ({}, (6, 3, 5, 5))],
    ),
]
DECLARED = FULL_SPACE + PROJECTED + IN_PASSES
CLASSES = [declared.cls for declared in DECLARED]
BY_SIGN = {declared.cls for declared in DECLARED if declared.by_sign}
DENSE = {declared.cls: declared.dense for declared in DECLARED}


def skip_unless_stored(cls: type, bits: int) -> None:
    """Skip a test of a class that has no storage of so many bits."""
    if bits == 8 and any(declared.cls is cls and "8-bit" not in declared.storages for declared in DECLARED):
        pytest.skip(f"{cls.__name__} has no 8-bit storage")


STORAGES: dict[str, dict[str, Any]] = {
    "32-bit": {},
    "8-bit": {"state_bits": 8, "min_8bit_size": 0},
    "kahan": {"rounding": "kahan"},
}


def each_variant(
    declarations: Iterable[Declaration] = DECLARED,
    *,
    geometries: bool = False,
    plainest: bool = False,
    soon: bool = False,
    storages: Iterable[str] = ("32-bit",),
) -> pytest.MarkDecorator:
    """Parametrize a test over `cls`, `options` and `shape`: all variants of `declarations` in each of `storages`.

    Args:
        geometries: take the geometries too.
        plainest: take the first variant of each class alone.
        soon: add the options under which a basis changes within the test.
    """
    cases = []
    for declared in declarations:
        variants = declared.variants[: 1 if plainest else None] + (declared.geometries if geometries else [])
        legal = [storage for storage in storages if storage in declared.storages]
        for (number, (options, shape)), storage in itertools.product(enumerate(variants), legal):
            options = options | STORAGES[storage] | (declared.soon if soon else {})
            names = [declared.cls.__name__, "x".join(map(str, shape)), str(number)]
            names += [storage] if storage != "32-bit" else []
            cases.append(pytest.param(declared.cls, options, shape, id="-".join(names)))
    return pytest.mark.parametrize(("cls", "options", "shape"), cases)
