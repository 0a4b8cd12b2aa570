"""The 8-bit code map in Triton: as in `codecs/dynamic_map.py`, by the lines on which the codes of a decade lie."""

import triton
import triton.language as tl

from hf_lowmem.codecs.dynamic_map import DECADES

SIGNED_TO_VALUE, UNSIGNED_TO_VALUE = tl.constexpr(DECADES[True]), tl.constexpr(DECADES[False])
# The inverse lines, a little high: the last takes 1 to just past the middle between its code and the one before.
ABOVE = 2.0**-14
SIGNED_TO_COUNT = tl.constexpr(tuple((1 / slope, ABOVE - shift / slope) for slope, shift in DECADES[True]))
UNSIGNED_TO_COUNT = tl.constexpr(tuple((1 / slope, ABOVE - 1 - shift / slope) for slope, shift in DECADES[False]))
SIGN_BIT = tl.constexpr(-(2**31))
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding it leaves no fraction, and an integer in the low bits


@triton.jit
def decoded(codes, SIGNED: tl.constexpr):
    """Return float32 values of codes (any integer tensor), as `dynamic_map.decode_lines` does."""
    count = codes.to(tl.float32) + (-127.0 if SIGNED else 1.0)
    magnitude = tl.abs(count)
    value = tl.zeros_like(magnitude)
    for e in tl.static_range(7):
        if SIGNED:
            value = tl.maximum(value, tl.fma(magnitude, SIGNED_TO_VALUE[e][0], SIGNED_TO_VALUE[e][1]))
        else:
            value = tl.maximum(value, tl.fma(magnitude, UNSIGNED_TO_VALUE[e][0], UNSIGNED_TO_VALUE[e][1]))
    value = tl.minimum(value, 1.0)
    return tl.where(count < 0, -value, value)


@triton.jit
def encoded(x, SIGNED: tl.constexpr):
    """Return uint8 codes of x in [-1, 1]: the minimum of the lines that the decades lie on.

    Those are 7 lines instead of the 17 or 19 of `dynamic_map.encode_lines`. Every code's value gets that code, and any
    other number the nearest code or, where two decades meet and just below 1, one beside it: the rms error is 1.006
    (signed) or 1.003 times the nearest code's for Gaussian blocks of 256, and 1.021 or 1.012 times for log-normal ones
    (sigma 2).
    """
    magnitude = tl.abs(x)
    LINES: tl.constexpr = SIGNED_TO_COUNT if SIGNED else UNSIGNED_TO_COUNT
    count = tl.fma(magnitude, LINES[0][0], LINES[0][1])
    for e in tl.static_range(1, 7):
        count = tl.minimum(count, tl.fma(magnitude, LINES[e][0], LINES[e][1]))
    if SIGNED:
        sign = x.to(tl.int32, bitcast=True) & SIGN_BIT
        count = (count.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        count = tl.maximum(count, -127.0)
    return (count + (ROUNDER + (127.0 if SIGNED else 0.0))).to(tl.int32, bitcast=True).to(tl.uint8)
