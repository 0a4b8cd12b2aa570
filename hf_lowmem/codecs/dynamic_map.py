"""The 8-bit dynamic code map of bitsandbytes (Dettmers et al., arXiv:2110.02861, section 1.3).

Signed code c: with k = |c - 127| and e = floor(log2 k),

    value = sign(c - 127) * 10^(e-6) * (0.9 (k + 0.5) / 2^e - 0.8),   k = 0 -> 0,   c = 255 -> 1

Unsigned code c: with a = c + 1 and e = floor(log2 a),

    value = 10^(e-7) * (0.9 (a + 0.5) / 2^e - 0.8),                   c = 0 -> 0,   c = 255 -> 1

Encoding takes the nearest code, in one of three ways that agree up to float rounding at the boundary of two codes.
Eager code (`encode_table`) uses one gather and no search: the leading bits of a float name a cell that holds at most
one boundary, and the carry of one integer addition says on which side of it the float lies. Compiled code
(`encode_lines`) takes the minimum of straight lines, which vectorizes where a gather does not. `native.c` finds the
decade and then takes its line alone (`count_lines`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CELL_BITS = 16  # low bits of a float32 that lie inside a cell; sign, exponent and 7 mantissa bits name it
_CPU = torch.device("cpu")
_FLOATS: Any = dict(dtype=torch.float32, device=_CPU)  # whatever the defaults are


@cache
def decode_table(signed: bool, device: torch.device) -> Tensor:
    """float32 (256,): the value of each code, ascending.

    The decades are rounded to float32 in the order in which bitsandbytes rounds them, so both tables are equal.
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
    """float32 (255,): the smallest float that belongs to code i + 1 rather than to code i."""
    values = decode_table(signed, _CPU).double()
    middle = (values[1:] + values[:-1]) / 2
    rounded = middle.float()
    return torch.where(rounded.double() < middle, _next_up(rounded), rounded)


@cache
def encode_table(signed: bool, device: torch.device) -> Tensor:
    """int32 table T of cells: `(T[bits >> 16] + bits) >> 16` is the nearest code of the float with those bits.

    Cells of negative floats come second (index 2^15 and up) and give 255 - code, because there the integer order of
    the bits runs against the order of the floats.
    """
    edges = boundaries(signed)
    positive = _cells(edges, sign_bit=0)
    if not signed:
        return positive.to(device)
    mirrored = _cells(_next_up(-edges.flip(0)), sign_bit=1 << 31)
    unused = torch.zeros((1 << 15) - len(positive), dtype=torch.int32, device=_CPU)
    return torch.cat([positive, unused, mirrored]).to(device)


def _cells(edges: Tensor, sign_bit: int) -> Tensor:
    starts = torch.arange(0, 0x3F800000 + 1, 1 << CELL_BITS, dtype=torch.int32, device=_CPU)  # 0 to 1
    below = torch.bucketize(starts.view(torch.float32), edges, right=True)  # boundaries at or below the cell's start
    edge_bits = torch.cat([edges.view(torch.int32).long(), torch.tensor([1 << 40], device=_CPU)])
    to_edge = (edge_bits[below] - starts).clamp(max=1 << CELL_BITS)
    cell = (below << CELL_BITS) + (1 << CELL_BITS) - to_edge - (starts.long() + sign_bit)
    return ((cell + (1 << 31)) % (1 << 32) - (1 << 31)).int()  # wrapped, as int32 addition wraps


def _next_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def _encode_lines(signed: bool) -> tuple[tuple[float, float], ...]:
    """(slope, intercept) of the lines whose minimum reaches n at the boundary below the n-th code from zero.

    The boundaries of one decade lie on one line; two more join it to the next. Slopes fall, so the curve is concave.
    """
    edges = boundaries(signed).double()
    edges = edges[127:-1] if signed else edges[:-1]  # the boundary of the top code, 1.0, is off the curve
    slopes = 1 / (edges[1:] - edges[:-1])
    lines: list[tuple[float, float]] = []
    for n, (edge, slope) in enumerate(zip(edges.tolist(), slopes.tolist(), strict=False), start=1):
        if not lines or slope < 0.99 * lines[-1][0]:
            lines.append((slope, n - slope * edge))
    return tuple(lines)


class CountLine(NamedTuple):
    """The numbers from `start` to the next decade's. Their count is the whole part of a line, but at most `last`."""

    start: float
    slope: float
    intercept: float
    last: int


def count_lines(signed: bool) -> tuple[CountLine, ...]:
    """Of a number's magnitude: the seven decades, of which the first begins at 0, and the top code."""
    edges = dict(enumerate(boundaries(signed).tolist()[127 if signed else 0 :], start=1 if signed else 2))
    found: list[CountLine] = []
    for e in range(7) if signed else range(1, 8):
        first, last = 2**e, 2 ** (e + 1) - 1  # counts; the boundaries between them lie on one line
        through = min(first + 1, last - 1) if first < last else last + 1
        slope = (last - through) / (edges[last] - edges[through])
        found.append(CountLine(edges[first] if found else 0.0, slope, last - slope * edges[last], last))
    return *found, CountLine(edges[last + 1], 0.0, last + 1, last + 1)


def _decode_lines(signed: bool) -> tuple[tuple[float, float], ...]:
    """(slope, intercept) of the line that the n-th codes from zero of each decade lie on."""
    decades = range(7) if signed else range(1, 8)
    scales = [10.0 ** (e - decades[-1]) for e in decades]
    return tuple((0.9 * s / 2**e, (0.45 / 2**e - 0.8) * s) for e, s in zip(decades, scales, strict=True))


# Plain numbers, found before anything is compiled: a graph cannot hold the search for them.
_LINES = {signed: _encode_lines(signed) for signed in (True, False)}
DECADES = {signed: _decode_lines(signed) for signed in (True, False)}
FIRST_COUNT = {True: -127, False: 1}  # of code 0: a code's count is this and the code
TOP = {signed: boundaries(signed)[-1].item() for signed in (True, False)}  # the smallest float of the code of 1


def encode_lines(x: Tensor, signed: bool) -> Tensor:
    """uint8 codes of x in [-1, 1] ([0, 1] if not signed): the nearest code up to float rounding at a boundary."""
    magnitude = x.abs() if signed else x
    count = torch.full_like(x, math.inf)
    for slope, intercept in _LINES[signed]:
        count = torch.minimum(count, magnitude * slope + intercept)
    count = count.floor().clamp(max=127 if signed else 254)  # the top code is added below
    code = torch.where(x < 0, 127 - count, 127 + count) if signed else count
    return (code + (x >= TOP[signed])).to(torch.uint8)


def decode_lines(codes: Tensor, signed: bool) -> Tensor:
    """float32 values of uint8 codes; equals the table up to one rounding."""
    count = codes.float() + FIRST_COUNT[signed]
    magnitude = count.abs()
    value = torch.zeros_like(count)
    for slope, intercept in DECADES[signed]:
        value = torch.maximum(value, magnitude * slope + intercept)
    value = value.clamp(max=1.0)
    return torch.where(count < 0, -value, value) if signed else value
