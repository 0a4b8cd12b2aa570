"""How a weight takes its update in Triton: as `hf_lowmem/rounding.py` has it, in one pass."""

import triton
import triton.language as tl

from hf_lowmem import rounding
from hf_lowmem.kernels.triton.codes import ROUNDER
from hf_lowmem.kernels.triton.memory import INFINITY, TINY, widened

WEYL, MIX_1, MIX_2 = (tl.constexpr(n) for n in (rounding.WEYL, rounding.MIX_1, rounding.MIX_2))


@triton.jit
def take(weights, comps, at, mask, decay, update, key, WEIGHT: tl.constexpr, ROUNDING: tl.constexpr):
    """param <- decay * param + update, rounded as `rounding.StoredWeight` does."""
    param = tl.fma(held(weights, comps, at, mask, WEIGHT, ROUNDING), decay, update)
    if ROUNDING == "stochastic":
        param = rounded_at_random(param, at, key, WEIGHT)
    narrow = param.to(WEIGHT)
    tl.store(weights + at, narrow, mask=mask)
    if ROUNDING == "kahan":
        stored = narrow.to(tl.float32)
        fraction = (param - stored) * inverse(last_place(stored, WEIGHT)) * 2.0**16
        fraction = tl.minimum(tl.maximum(fraction, -(2.0**15)), 2.0**15 - 1)
        tl.store(comps + at, (fraction + ROUNDER - ROUNDER).to(tl.int16), mask=mask)


@triton.jit
def held(weights, comps, at, mask, WEIGHT: tl.constexpr, ROUNDING: tl.constexpr):
    """Return a tile of a weight as float32, with what rounding has cut off."""
    param = widened(tl.load(weights + at, mask=mask, other=0))
    if ROUNDING == "kahan":
        fraction = tl.load(comps + at, mask=mask, other=0).to(tl.float32) * 2.0**-16
        param = tl.fma(last_place(param, WEIGHT), fraction, param)
    return param


@triton.jit
def last_place(value, WEIGHT: tl.constexpr):
    """Return one unit in the last place of each value, as `rounding.last_place` does."""
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(
        power * (2.0**-7 if WEIGHT == tl.bfloat16 else 2.0**-10), TINY if WEIGHT == tl.bfloat16 else 2.0**-24
    )


@triton.jit
def inverse(power):
    """Return 1 / power of a power of two, exact, by its exponent."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rounded_at_random(value, at, key, WEIGHT: tl.constexpr):
    """Return `value` rounded at random to WEIGHT's dtype, by the noise of `rounding.hashed`."""
    BITS: tl.constexpr = 16 if WEIGHT == tl.bfloat16 else 13
    x = at.to(tl.uint32) * WEYL + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 15)) * MIX_2
    noise = (x >> (32 - BITS)).to(tl.float32)
    unit = last_place(value, WEIGHT)
    units = tl.floor(tl.fma(noise, 2.0**-BITS, tl.abs(value) * inverse(unit))) * unit
    return tl.where(tl.abs(value) < INFINITY, tl.where(value < 0, -units, units), value)
