"""How the numbers of a moment are stored."""

import math

from hf_lowmem.codecs.float import BFloat16, Float32
from hf_lowmem.codecs.int8_blockwise import BLOCK_SIZES, Int8Blockwise, block_size_for
from hf_lowmem.state import Codec

STATE_BITS = (32, 16, 8)


def codec_for(
    shape: tuple[int, ...], state_bits: int, block_size: int, min_8bit_size: int, *, any_divisor: bool = False
) -> Codec:
    """The codec of full moments of `shape`: `state_bits` where the shape allows it, else float32.

    8 bits need a last axis that a block size divides, and at least `min_8bit_size` entries.

    Args:
        any_divisor: where neither 256, 128 nor 64 divides the last axis, take its largest divisor of at least 32.
    """
    if state_bits == 16:
        return BFloat16()
    if state_bits == 8:
        large = bool(shape) and math.prod(shape) >= max(min_8bit_size, 1)
        size = block_size_for(shape[-1], block_size, any_divisor) if large else None
        if size:
            return Int8Blockwise(size)
    return Float32()


__all__ = ["BFloat16", "BLOCK_SIZES", "Float32", "Int8Blockwise", "STATE_BITS", "block_size_for", "codec_for"]
