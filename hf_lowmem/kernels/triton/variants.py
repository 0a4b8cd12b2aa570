"""The variants that the Triton kernels are compiled for, and the tiles that each cuts a part of a weight into."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from hf_lowmem.codecs import BLOCK_SIZES, Int8Blockwise
from hf_lowmem.kernels.bucket import ParamStep
from hf_lowmem.kernels.columns import Geometry
from hf_lowmem.kernels.parts import addresses_of, geometries_of, second_moment, state_names
from hf_lowmem.kernels.triton.tuning import Tile, current_arch, generation, tile_for, warps_of
from hf_lowmem.log import get_logger
from hf_lowmem.state import StatePlan

logger = get_logger(__name__)

BLOCK = 256  # entries of a block of floats, at most
ALIGN = 16
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_ARCH = 75


class Variant(NamedTuple):
    """The constants that a launch is compiled for; none of them changes from step to step.

    Args:
        weight, moment: dtypes of weight and gradient, and of the first moment; uint8 for the codes of both moments.
        rounding: "nearest", "stochastic" or "kahan", see `rounding.py`.
        second: "none" (Signum), "full", "group" (a mean per group) or "column" (a mean per column of each group).
        means: when the means are found, if there are any: in a "tile" of whole groups, which is read once; in a "loop"
            of one program over its group, which it reads twice; or "before", by kernels of their own.
        nest: 0 where a group is one row, 1 where its rows are evenly spaced, 2 where they are two loops.
        block, blocks: the size of a tile.
        groups: how many groups a tile holds, each of `blocks / groups` blocks; 1 where a tile is part of a group.
        per_thread: how many entries of a tile each thread takes.
        align: what divides all addresses, in bytes, and all sizes and strides, in entries.
        clip: whether a scale multiplies the gradients.
        ragged: whether each run is a row of 8-bit blocks of which the last is shorter than a block.
        factored: whether the rows of a group have means too, beside those of its columns.
        limited: whether the second moment includes the first, which limits updates.
    """

    weight: Any
    moment: Any
    rounding: str
    second: str
    means: str
    nest: int
    block: int
    blocks: int
    groups: int
    per_thread: int
    align: int
    clip: bool = False
    ragged: bool = False
    factored: bool = False
    limited: bool = False

    @property
    def sums(self) -> Variant:
        """Return what the kernels before a step are compiled for, whatever its moments are."""
        return self._replace(moment=None, rounding="", clip=False, ragged=False, limited=False)


class Layout(NamedTuple):
    """How the entries of a part are cut into tiles; see `Variant` and `columns.TRITON_PART`."""

    means: str
    nest: int
    block: int
    blocks: int
    groups: int
    reductions: int
    tiles: int
    sums: int
    aligned: bool


@cache
def layout_of(found: Geometry, second: str, code_block: int | None, tile: Tile) -> Layout:
    """Return the tiles of a part, whose blocks have room for an 8-bit block or for a run of at most BLOCK entries."""
    block = _power_of_two(min(code_block or BLOCK, found.columns))
    if code_block:
        block = max(block, min(BLOCK_SIZES))  # the scales of more blocks to a tile would not fit into registers
    across = -(-found.columns // block)
    blocks, means, groups = max(tile.entries // block, 1), "before" if second in ("group", "column") else "none", 1
    if second == "column":
        reductions, blocks_of_reduction = found.groups * across, found.rows
    else:
        reductions, blocks_of_reduction = found.groups, found.rows * across
    whole = _power_of_two(blocks_of_reduction)
    if second == "group" and whole * block <= tile.one_tile:
        means = "tile"
        if found.groups == found.inner_groups:  # or the groups of a tile would not be evenly spaced
            groups = max(blocks // whole, 1)
        blocks, reductions = whole * groups, -(-reductions // groups)
    elif second == "group" and blocks_of_reduction * block <= tile.one_program:
        means = "loop"
    tiles = -(-blocks_of_reduction // blocks)
    sums = -(-tiles // max(tile.partial_sum // (block * blocks), 1))
    nest = 0 if found.rows == 1 else 1 if found.rows == found.inner_rows else 2
    sizes = (found.outer_group_stride, found.inner_group_stride, found.outer_row_stride, found.inner_row_stride)
    aligned = not any(size % ALIGN for size in (*sizes, found.columns, found.start))
    return Layout(means, nest, block, blocks, groups, reductions, tiles, sums, aligned)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def warps(variant: Variant) -> int:
    """Return the warps of a program; a thread takes 16 entries where more would not fit into an A100's registers."""
    many = variant.rounding == "kahan" and variant.second == "full" and variant.moment.primitive_bitwidth > 8
    many |= variant.ragged and variant.align == 1  # an address for each entry
    per_thread = min(variant.per_thread, 16) if many else variant.per_thread
    return warps_of(variant.block * variant.blocks, per_thread)


class Piece(NamedTuple):
    """A part of a weight as a launch takes it: what it is compiled for, and its columns in the launch's table."""

    variant: Variant
    columns: dict[str, int]


def pieces_of(rule: str, step: ParamStep, averaged: bool) -> list[Piece]:
    """Return the parts of a weight that `is_covered`, by steps that find the means or, `averaged`, have them."""
    param, plan = step.param, step.plan
    dtypes = (param.dtype, step.state["exp_avg"].dtype)
    found = []
    addresses = addresses_of(param, step.grad, step.state, plan)
    planned = _planned(rule, plan, tuple(param.shape), dtypes, averaged, (current_arch(), generation()))
    for (variant, aligned, columns), where in zip(planned, addresses, strict=True):
        by_tile = ["param", "grad", "kahan_comp", "exp_avg", *(["exp_avg_sq"] if variant.second == "full" else [])]
        aligned = aligned and not any(where.get(name, 0) % ALIGN for name in by_tile)
        found.append(Piece(variant._replace(align=ALIGN if aligned else 1), {**columns, **where}))
    return found


def is_covered(rule: str, step: ParamStep) -> bool:
    """Return whether the kernels can step a parameter."""
    param, grad, shape = step.param, step.grad, tuple(step.param.shape)
    if second_moment(rule, step.plan) is None or param.dtype not in WEIGHTS or grad.dtype != param.dtype:
        return False
    if not (param.is_contiguous() and grad.is_contiguous()):
        return False
    codec = step.plan.codec
    if isinstance(codec, Int8Blockwise) and codec.block_size not in (*BLOCK_SIZES, codec.row(shape)):
        return False
    return geometries_of(step.plan, shape, has_odd_blocks(step.plan)) is not None


def has_odd_blocks(plan: StatePlan) -> bool:
    """Return whether 8-bit blocks are whole rows of a size that no tile has, so that each fills a part of a block."""
    return isinstance(plan.codec, Int8Blockwise) and plan.codec.block_size not in BLOCK_SIZES


@lru_cache(maxsize=1 << 13)
def _planned(
    rule: str,
    plan: StatePlan,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    averaged: bool,
    tuning: tuple[int, int],
) -> list[tuple[Variant, bool, dict[str, int]]]:
    """Return the variant, whether sizes are aligned, and the columns beside addresses of each part of a weight.

    Args:
        dtypes: those of the weight and of `exp_avg`.
    """
    kind, codec, odd = second_moment(rule, plan), plan.codec, has_odd_blocks(plan)
    found = geometries_of(plan, shape, odd)
    assert kind is not None
    assert found is not None
    code_block = row = None
    if isinstance(codec, Int8Blockwise):
        code_block, row = codec.block_size, codec.row(shape) if odd else codec.ragged_row(shape)
    kernels = triton_kernels()
    weight, first = (kernels.DTYPES[dtype] for dtype in dtypes)
    # A projected update is float32 whatever its weight is, whose rounding is not its own.
    rounding = "nearest" if dtypes[0] == torch.float32 else plan.rounding.kind
    parts = []
    for geometry, names in zip(found, state_names(plan, shape), strict=True):
        second = kind if kind != "mean" else "column" if geometry.per_column else "group"
        tile = tile_for(f"{second} 8-bit" if code_block else second, tuning[0])
        if averaged:
            tile = tile._replace(one_tile=0, one_program=0)  # so that the means are taken as they are
        layout = layout_of(geometry, second, code_block, tile)
        cut = (layout.means, layout.nest, layout.block, layout.blocks, layout.groups, tile.per_thread)
        factored = "exp_avg_sq_rows" in names
        limited = rule == "limited_adamw"
        variant = Variant(weight, first, rounding, second, *cut, ALIGN, False, row is not None, factored, limited)
        columns = geometry._asdict() | {"tiles": layout.tiles, "sums": layout.sums, "reductions": layout.reductions}
        parts.append((variant, layout.aligned, columns))
    return parts


@cache
def compiled_for(variant: Variant) -> Variant:
    """Return the variant as the kernels take it: Triton before 3.8 takes no parts of a constant for constants."""
    return Variant(*map(triton_kernels().tl.constexpr, variant))


@cache
def triton_kernels() -> Any:
    """Return the module of the kernels, or None, logged once, where Triton is missing or cannot compile."""
    try:
        import triton

        if not triton.knobs.runtime.interpret:
            target = triton.runtime.driver.active.get_current_target()
            if target.backend == "cuda" and target.arch < _OLDEST_ARCH:
                raise RuntimeError(f"sm_{target.arch} is older than sm_{_OLDEST_ARCH}")
        from hf_lowmem.kernels.triton import step
    except Exception as error:
        logger.warning(
            "Optimizer steps on the GPU take several times longer than they could: the Triton kernels cannot be used "
            "(%s). They need triton, a C compiler, such as gcc, and a device that Triton compiles for.",
            error,
        )
        return None
    return step
