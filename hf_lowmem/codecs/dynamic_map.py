"""The 8-bit dynamic code map of bitsandbytes (Dettmers et al., arXiv:2110.02861, section 1.3).

Signed code c: with k = |c - 127| and e = floor(log2 k),

    value = sign(c - 127) * 10^(e-6) * (0.9 (k + 0.5) / 2^e - 0.8),   k = 0 -> 0,   c = 255 -> 1

Unsigned code c: with a = c + 1 and e = floor(log2 a),

    value = 10^(e-7) * (0.9 (a + 0.5) / 2^e - 0.8),                   c = 0 -> 0,   c = 255 -> 1

An encoder maps a number to the nearest code. There are four, because each backend is fast in its own way:

- Eager code (`encode_table`) is exact. One gather replaces the search: the leading 16 bits of a float select a cell,
  an interval that holds at most one boundary between two codes, and the carry of an integer addition tells on which
  side of the boundary the float lies.
- Under torch.compile (`encode_lines`) the code is exact up to float rounding at a boundary. It is the minimum of
  straight lines, which vectorizes where a gather does not.
- In C (`count_lines`) it is exact up to float rounding, too. The decade of the number selects one line.
- In Triton it is the minimum of one line per decade. Where two decades meet, and just below 1, this may give the code
  beside the nearest one.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CELL_BITS = 16  # the floats of a cell share their sign, exponent and upper 7 mantissa bits, and differ in these bits
_CPU = torch.device("cpu")
_FLOATS: Any = dict(dtype=torch.float32, device=_CPU)  # independent of torch's default dtype and device


@cache
def decode_table(signed: bool, device: torch.device) -> Tensor:
    """Return the value of each code as float32 (256,), in ascending order.

    The values equal those of bitsandbytes, because they are rounded to float32 at the same places.
    """
    decades = 7  # 2^e codes in decade e when signed, twice as many when not
    positive = [torch.zeros(1, **_FLOATS)]
    for e in range(decades):
        edges = torch.linspace(0.1, 1, 2 ** (e if signed else e + 1) + 1, **_FLOATS)
        positive.append(10.0 ** (e + 1 - decades) * ((edges[:-1] + edges[1:]) / 2))
    ascending = torch.cat(positive)
    if signed:
        ascending = torch.cat([-ascending[1:].flip(0), ascending])
    return torch.cat([ascending, torch.ones(1, **_FLOATS)]).to(device)


@cache
def boundaries(signed: bool) -> Tensor:
    """Return as float32 (255,) the smallest float whose nearest code is i + 1 rather than i."""
    values = decode_table(signed, _CPU).double()
    middle = (values[1:] + values[:-1]) / 2
    rounded = middle.float()
    return torch.where(rounded.double() < middle, _next_up(rounded), rounded)


@cache
def encode_table(signed: bool, device: torch.device) -> Tensor:
    """Return an int32 table T such that `(T[bits >> 16] + bits) >> 16` is the nearest code of the float with `bits`.

    The cells of negative floats start at index 2^15. They give 255 - code, because the bits of negative floats, read
    as integers, ascend as the floats descend.
    """
    edges = boundaries(signed)
    positive = _cells(edges, sign_bit=0)
    if not signed:
        return positive.to(device)
    mirrored = _cells(_next_up(-edges.flip(0)), sign_bit=1 << 31)
    unused = torch.zeros((1 << 15) - len(positive), dtype=torch.int32, device=_CPU)
    return torch.cat([positive, unused, mirrored]).to(device)


def _cells(edges: Tensor, sign_bit: int) -> Tensor:
    """Return the entries of the cells from 0 to 1, for floats whose bits have `sign_bit` added."""
    starts = torch.arange(0, 0x3F800000 + 1, 1 << CELL_BITS, dtype=torch.int32, device=_CPU)  # the bits of 0 to 1
    below = torch.bucketize(starts.view(torch.float32), edges, right=True)  # how many boundaries are <= the start
    edge_bits = torch.cat([edges.view(torch.int32).long(), torch.tensor([1 << 40], device=_CPU)])
    to_edge = (edge_bits[below] - starts).clamp(max=1 << CELL_BITS)
    cell = (below << CELL_BITS) + (1 << CELL_BITS) - to_edge - (starts.long() + sign_bit)
    return ((cell + (1 << 31)) % (1 << 32) - (1 << 31)).int()  # wraps as int32 addition does


def _next_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def _encode_lines(signed: bool) -> tuple[tuple[float, float], ...]:
    """Return the (slope, intercept) of lines whose minimum reaches n at the boundary below the n-th code from zero.

    The boundaries of one decade lie on one line, and two more lines join it to the next decade. The slopes decrease,
    so the minimum of all lines is the curve through all boundaries.
    """
    edges = boundaries(signed).double()
    edges = edges[127:-1] if signed else edges[:-1]  # the boundary below the top code, 1.0, is not on the curve
    slopes = 1 / (edges[1:] - edges[:-1])
    lines: list[tuple[float, float]] = []
    for n, (edge, slope) in enumerate(zip(edges.tolist(), slopes.tolist(), strict=False), start=1):
        if not lines or slope < 0.99 * lines[-1][0]:
            lines.append((slope, n - slope * edge))
    return tuple(lines)


class CountLine(NamedTuple):
    """One decade's line: a number from `start` up has the count floor(slope * number + intercept), at most `last`.

    The count of a code is |k| (signed) or a (not signed) in the equations above.
    """

    start: float
    slope: float
    intercept: float
    last: int


def count_lines(signed: bool) -> tuple[CountLine, ...]:
    """Return the lines of the seven decades, the first of which starts at 0, and of the top code."""
    edges = dict(enumerate(boundaries(signed).tolist()[127 if signed else 0 :], start=1 if signed else 2))
    found: list[CountLine] = []
    for e in range(7) if signed else range(1, 8):
        first, last = 2**e, 2 ** (e + 1) - 1  # the boundaries between the counts `first` to `last` lie on one line
        through = min(first + 1, last - 1) if first < last else last + 1
        slope = (last - through) / (edges[last] - edges[through])
        found.append(CountLine(edges[first] if found else 0.0, slope, last - slope * edges[last], last))
    return *found, CountLine(edges[last + 1], 0.0, last + 1, last + 1)


def _decode_lines(signed: bool) -> tuple[tuple[float, float], ...]:
    """Return for each decade the (slope, intercept) of the line from a code's count to its value."""
    decades = range(7) if signed else range(1, 8)
    scales = [10.0 ** (e - decades[-1]) for e in decades]
    return tuple((0.9 * s / 2**e, (0.45 / 2**e - 0.8) * s) for e, s in zip(decades, scales, strict=True))


# These are plain numbers and computed at import, because torch.compile cannot trace how they are found.
_LINES = {signed: _encode_lines(signed) for signed in (True, False)}
DECADES = {signed: _decode_lines(signed) for signed in (True, False)}
FIRST_COUNT = {True: -127, False: 1}  # the count, with its sign, of code 0; code c has FIRST_COUNT + c
TOP = {signed: boundaries(signed)[-1].item() for signed in (True, False)}  # the smallest float whose code is that of 1


def encode_lines(x: Tensor, signed: bool) -> Tensor:
    """Return the uint8 codes nearest to x in [-1, 1] ([0, 1] if not signed), up to float rounding at a boundary."""
    magnitude = x.abs() if signed else x
    count = torch.full_like(x, math.inf)
    for slope, intercept in _LINES[signed]:
        count = torch.minimum(count, magnitude * slope + intercept)
    count = count.floor().clamp(max=127 if signed else 254)  # the top code is added below
    code = torch.where(x < 0, 127 - count, 127 + count) if signed else count
    return (code + (x >= TOP[signed])).to(torch.uint8)


def decode_lines(codes: Tensor, signed: bool) -> Tensor:
    """Return the float32 values of uint8 codes, equal to those of `decode_table` up to one rounding."""
    count = codes.float() + FIRST_COUNT[signed]
    magnitude = count.abs()
    value = torch.zeros_like(count)
    for slope, intercept in DECADES[signed]:
        value = torch.maximum(value, magnitude * slope + intercept)
    value = value.clamp(max=1.0)
    return torch.where(count < 0, -value, value) if signed else value
