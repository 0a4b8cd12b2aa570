"""Each optimizer class with options that bring out its branches, and shapes that they fit."""

from __future__ import annotations

from typing import Any

from hf_lowmem.algorithms import Adalayer, AdamMini, LowMemAdamW, Signum, SlimAdamW

QKV = (("query", 0, 1, 0, 8, (1,), 4), ("key", 0, 1, 8, 12, (1,), 1), ("value", 0, 1, 12, 16, (0,), 1))
INTERLEAVED = (("gate", 0, 8, 0, 1, (0,), 1), ("up", 0, 8, 1, 2, (0,), 1))
LAST_AXIS = (("query", 1, 1, 0, 128, (0,), 64), ("key", 1, 1, 128, 256, (0,), 1), ("value", 1, 1, 256, 384, (1,), 1))
ODD_LAST_AXIS = (("query", 1, 1, 0, 65, (0,), 5), ("key", 1, 1, 65, 130, (0,), 1), ("value", 1, 1, 130, 195, (1,), 1))

# Each class with options that bring out its branches, and a shape that they fit.
VARIANTS: list[tuple[type, dict[str, Any], tuple[int, ...]]] = [
    (LowMemAdamW, {}, (16, 128)),
    (SlimAdamW, {"axes": (1,)}, (16, 128)),
    (SlimAdamW, {"axes": (0,)}, (16, 128)),
    (SlimAdamW, {"axes": (1,)}, (3, 8, 64)),
    (SlimAdamW, {"segments": QKV}, (16, 128)),
    (SlimAdamW, {"segments": INTERLEAVED}, (16, 128)),
    (SlimAdamW, {"segments": LAST_AXIS}, (24, 384)),
    (AdamMini, {"axes": (1,), "rows_per_block": 4}, (16, 128)),
    (AdamMini, {"axes": (0,), "rows_per_block": 32}, (16, 128)),
    (AdamMini, {"axes": (1, 2, 3)}, (6, 3, 4, 64)),
    (Adalayer, {"axes": (0, 1)}, (16, 128)),
    (Adalayer, {"axes": (1, 2)}, (3, 8, 64)),
    (Signum, {}, (16, 128)),
    # Rows whose last 8-bit block is short, and rows of several axes.
    (LowMemAdamW, {}, (5, 67)),
    (LowMemAdamW, {}, (131,)),
    (Signum, {}, (6, 3, 5, 5)),
    (SlimAdamW, {"axes": (1,)}, (7, 131)),
    (SlimAdamW, {"axes": (0,)}, (16, 65)),
    (SlimAdamW, {"axes": (1,)}, (3, 8, 67)),
    (SlimAdamW, {"axes": (2,)}, (5, 4, 23)),
    (SlimAdamW, {"segments": QKV}, (16, 131)),
    (SlimAdamW, {"segments": ODD_LAST_AXIS}, (24, 195)),
    (AdamMini, {"axes": (1, 2, 3)}, (6, 3, 3, 3)),
    (AdamMini, {"axes": (1,), "rows_per_block": 4}, (16, 65)),
    (Adalayer, {"axes": (1, 2)}, (12, 3, 25)),
]
IDS = [f"{cls.__name__}-{'x'.join(map(str, shape))}-{n}" for n, (cls, _, shape) in enumerate(VARIANTS)]
