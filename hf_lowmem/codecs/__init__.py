"""The codecs, which store the numbers of a moment."""

import math
from collections.abc import Callable

from hf_lowmem.codecs.float import BFloat16, Float32
from hf_lowmem.codecs.int8_blockwise import BLOCK_SIZES, Int8Blockwise, blocks_for
from hf_lowmem.state import Codec

# By `state_bits`: what stores moments of a shape, given the size of the largest block and whether blocks may have any
# size; None where that would take more bytes than float32.
CODECS: dict[int, Callable[[tuple[int, ...], int, bool], Codec | None]] = {
    32: lambda shape, block_size, any_divisor: Float32(),
    16: lambda shape, block_size, any_divisor: BFloat16(),
    8: blocks_for,
}


def codec_for(
    shape: tuple[int, ...], state_bits: int, block_size: int, min_8bit_size: int, *, any_divisor: bool = False
) -> Codec:
    """Return the codec that stores full moments of `shape` in `state_bits`.

    Args:
        block_size: the size of the largest 8-bit block.
        min_8bit_size: moments with fewer entries are stored in float32 instead of 8 bits or fewer.
        any_divisor: whether 8-bit blocks may have sizes other than 256, 128 and 64; see `blocks_for`.
    """
    if state_bits <= 8 and (not shape or math.prod(shape) < max(min_8bit_size, 1)):
        return Float32()
    return CODECS[state_bits](shape, block_size, any_divisor) or Float32()


__all__ = ["BLOCK_SIZES", "CODECS", "BFloat16", "Float32", "Int8Blockwise", "codec_for"]
