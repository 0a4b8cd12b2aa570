"""The codecs, which store the numbers of a moment."""

import math

from hf_lowmem.codecs.float import BFloat16, Float32
from hf_lowmem.codecs.int8_blockwise import BLOCK_SIZES, Int8Blockwise, blocks_for
from hf_lowmem.state import Codec

STATE_BITS = (32, 16, 8)


def codec_for(
    shape: tuple[int, ...], state_bits: int, block_size: int, min_8bit_size: int, *, any_divisor: bool = False
) -> Codec:
    """Return the codec that stores full moments of `shape` in `state_bits`.

    Args:
        block_size: the size of the largest 8-bit block.
        min_8bit_size: moments with fewer entries are stored in float32 instead of 8 bits.
        any_divisor: whether 8-bit blocks may have sizes other than 256, 128 and 64; see `blocks_for`.
    """
    if state_bits == 16:
        return BFloat16()
    if state_bits == 8 and shape and math.prod(shape) >= max(min_8bit_size, 1):
        return blocks_for(shape, block_size, any_divisor) or Float32()
    return Float32()


__all__ = ["BLOCK_SIZES", "STATE_BITS", "BFloat16", "Float32", "Int8Blockwise", "codec_for"]
