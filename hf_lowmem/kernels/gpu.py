"""Steps on a GPU by the Triton kernels of `gpu_kernels.py`: few launches, and one pass over memory where there can be.

Parts of weights that a variant of the kernels covers are stepped by one launch, or three where means come before the
step, through a table of addresses that is uploaded only when it changes. Nothing waits for the device. Slots that are
not covered (weights that are not contiguous, groups of an unusual shape) are left to the kernels of `eager.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.codecs import BLOCK_SIZES, Int8Blockwise
from hf_lowmem.kernels import eager
from hf_lowmem.kernels.eager import Form, adamw_form
from hf_lowmem.kernels.geometry import Geometry, elementwise, geometries
from hf_lowmem.kernels.seam import Hyper, Kernel, Slot
from hf_lowmem.kernels.tuning import KINDS, TUNING, Tile, current_arch, tile_for, warps_of
from hf_lowmem.log import get_logger
from hf_lowmem.moments import GroupMean
from hf_lowmem.rounding import noise_key
from hf_lowmem.state import KAHAN_COMP, StatePlan

logger = get_logger(__name__)

LINE = 256  # entries of a line of floats, at most
_ALIGN = 16
_OLDEST_ARCH = 75
ADDRESSES = 32  # that one launch writes into a table
_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """Where a part of a weight and its state are: a row of the table that the kernels read; see `Geometry`.

    It has `cells`, which share no mean, each of `chunks` tiles, or of `sums` partial sums; each kind is numbered
    through all parts of a launch, of which the part's begin with `first_`.
    """

    param: int
    grad: int
    kahan_comp: int
    exp_avg: int
    exp_avg_absmax: int
    exp_avg_sq: int
    exp_avg_sq_absmax: int
    first_tile: int
    chunks: int
    first_sum: int
    sums: int
    first_cell: int
    cells: int
    groups: int
    inner_groups: int
    outer_group_stride: int
    inner_group_stride: int
    rows: int
    inner_rows: int
    outer_row_stride: int
    inner_row_stride: int
    columns: int
    per_column: int
    start: int


class Scalar(NamedTuple):
    """The numbers of one step of a part, float64; `new_1` and `new_2` are the shares of the new gradient."""

    decay: float
    step_size: float
    eps: float
    new_1: float
    beta2: float
    new_2: float
    noise_key: int


class Variant(NamedTuple):
    """What a launch is compiled for.

    Args:
        weight, moment: dtypes of weight and gradient, and of the first moment; uint8 for the codes of both moments.
        rounding: "nearest", "stochastic" or "kahan", see `rounding.py`.
        second: "none" (Signum), "full", "group" (a mean per group) or "column" (a mean per column of each group).
        means: when the means are found, if there are any: in a "tile" of whole groups, which is read once; in a "loop"
            of one program over its group, which it reads twice; or "before", by kernels of their own.
        nest: 0 where a group is one row, 1 where its rows are evenly spaced, 2 where they are two loops.
        line, lines: the size of a tile.
        groups: how many groups a tile holds, each of `lines / groups` lines; 1 where a tile is part of a group.
        per_thread: how many entries of a tile each thread takes.
        align: what divides all addresses, in bytes, and all sizes and strides, in entries.
        clip: whether a scale multiplies the gradients.
        ragged: whether each run is a row of 8-bit blocks of which the last is shorter than a line.
    """

    weight: Any
    moment: Any
    rounding: str
    second: str
    means: str
    nest: int
    line: int
    lines: int
    groups: int
    per_thread: int
    align: int
    clip: bool = False
    ragged: bool = False

    @property
    def sums(self) -> Variant:
        """What the kernels before a step are compiled for, whatever its moments are."""
        return self._replace(moment=None, rounding="", clip=False, ragged=False)


Members = dict[tuple[torch.device, Variant], list[tuple[Part, Slot]]]  # by launch


@dataclass(frozen=True)
class TritonKernel:
    """Steps by the Triton kernels what they cover, and the rest by `otherwise`."""

    otherwise: Kernel
    form: Form = adamw_form

    def __call__(self, slots: Sequence[Slot], hyper: Hyper) -> None:
        if left := self.step(slots, hyper):
            self.otherwise(left, hyper)

    def step(self, slots: Sequence[Slot], hyper: Hyper) -> list[Slot]:
        """Step the slots that are covered; returns the others."""
        return step(slots, hyper, self.form) if triton_kernels() else list(slots)

    def square_sums(self, slots: Sequence[Slot], kept: dict[Any, Tensor]) -> tuple[list[Tensor], list[Slot]]:
        """See `square_sums`."""
        return square_sums(slots, kept) if triton_kernels() else ([], list(slots))


@cache
def triton_kernels() -> Any:
    """The module of the kernels, or None, said once, where Triton is missing or cannot compile for the device."""
    try:
        import triton

        if not triton.knobs.runtime.interpret:
            target = triton.runtime.driver.active.get_current_target()
            if target.backend == "cuda" and target.arch < _OLDEST_ARCH:
                raise RuntimeError(f"sm_{target.arch} is older than sm_{_OLDEST_ARCH}")
        from hf_lowmem.kernels import gpu_kernels
    except Exception as error:
        logger.warning(
            "Optimizer steps on the GPU take several times longer than they could: the Triton kernels cannot be used "
            "(%s). They need triton, a C compiler, such as gcc, and a device that Triton compiles for.",
            error,
        )
        return None
    return gpu_kernels


def step(slots: Sequence[Slot], hyper: Hyper, form: Form) -> list[Slot]:
    """Step the slots that are covered; returns the others."""
    launches, left = by_launch(slots)
    for (device, variant), members in launches.items():
        parts, owners = zip(*members, strict=True)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            launch(variant, parts, owners, scalars_of(owners, hyper, form, device))
    return left


def square_sums(slots: Sequence[Slot], kept: dict[Any, Tensor]) -> tuple[list[Tensor], list[Slot]]:
    """The sums of squares of the gradients whose means come before their step, 0-D; and the slots of the others.

    What it takes to find them is most of what it takes to find the means: that is `kept` for the step.
    """
    wanted: list[Slot] = []
    left: list[Slot] = []
    for slot in slots:
        parts_found = parts_of(slot)
        before = parts_found is not None and all(variant.means == "before" for variant, _ in parts_found)
        (wanted if before else left).append(slot)
    totals = []
    for (device, variant), members in by_launch(wanted)[0].items():
        parts, owners = zip(*members, strict=True)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            found, total = partial_sums(variant.sums, table_of(parts, owners, variant.means), totals=True)
        kept[key_of_sums(variant, parts, owners)] = found
        totals.append(total.sum())
    return totals, left


def by_launch(slots: Sequence[Slot]) -> tuple[Members, list[Slot]]:
    """The parts of the slots that are covered, those that one launch steps together; and the other slots."""
    launches: Members = defaultdict(list)
    left = []
    for slot in slots:
        found = parts_of(slot)
        if found is None:
            left.append(slot)
            continue
        for variant, part in found:
            launches[slot.param.device, variant].append((part, slot))
    return launches, left


def scalars_of(slots: Sequence[Slot], hyper: Hyper, form: Form, device: torch.device) -> Tensor:
    """A row of `Scalar` for each slot, on the device; under `capturable` computed there."""
    shares = (1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2)
    if not isinstance(slots[0].step, Tensor):
        forms = {slot.step: tuple(vars(form(slot, hyper)).values()) for slot in {s.step: s for s in slots}.values()}
        rows = [(*forms[slot.step], *shares, slot.noise_key) for slot in slots]
        return uploaded(rows, torch.float64, device)
    steps = torch.stack([slot.step for slot in slots]).double()
    keys: Any = 0
    if slots[0].noise_key:
        seeds, numbers = zip(*(slot.noise_key for slot in slots), strict=True)
        keys = noise_key(seeds[0], lasting_numbers(numbers, device), steps.long())
    scalars = torch.empty(len(slots), len(Scalar._fields), dtype=torch.float64, device=device)
    columns = (*vars(form(slots[0]._replace(step=steps), hyper)).values(), *shares, keys)
    for number, column in enumerate(columns):
        scalars[:, number] = column
    return scalars


def add(slot: Slot, update: Tensor, scale: float, decay: float | Tensor) -> None:
    """As `eager.add`, in one pass where weight and update are contiguous; a decay is one number or one per matrix."""
    param, device = slot.param, slot.param.device
    plain = param.dtype in _WEIGHTS and param.is_contiguous() and update.is_contiguous()
    kernels = triton_kernels() if plain else None
    if kernels is None:
        eager.add(slot, update, scale, decay)
        return
    decays = (
        decay.flatten() if isinstance(decay, Tensor) else torch.full((1,), decay, dtype=torch.float32, device=device)
    )
    entries, tile = param.numel() // decays.numel(), tile_for("add", current_arch())
    comps, rounding = slot.state.get(KAHAN_COMP, param), slot.plan.rounding.kind
    grid = (-(-entries // tile.entries), decays.numel())
    options = dict(num_warps=warps_of(tile.entries, tile.per_thread), enable_fp_fusion=True)
    sizes = dict(ROUNDING=rounding, TILE=tile.entries)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernels.add[grid](param, comps, update, decays, scale, slot.noise_key, entries, **sizes, **options)


def parts_of(slot: Slot) -> list[tuple[Variant, Part]] | None:
    """The parts of a slot with their variants, or None where there is no kernel for it."""
    param, grad, state, plan = slot.param, slot.grad, slot.state, slot.plan
    if grad.dtype != param.dtype or not (param.is_contiguous() and grad.is_contiguous()):
        return None
    addresses = tuple([_address(state.get(name)) for name in state_names(plan)])
    dtypes, places = (param.dtype, state["exp_avg"].dtype), (param.data_ptr(), grad.data_ptr())
    return placed(plan, param.shape, dtypes, slot.clip is not None, places, addresses)


@lru_cache(maxsize=1 << 12)
def state_names(plan: StatePlan) -> tuple[str, ...]:
    """The tensors whose addresses the kernels are given; the second moments of the parts come last."""
    moment = plan.moments.get("exp_avg_sq")
    names = [moment.state_name("exp_avg_sq", s) for s in moment.segments] if isinstance(moment, GroupMean) else []
    return KAHAN_COMP, "exp_avg", "exp_avg_absmax", "exp_avg_sq_absmax", *(names or ["exp_avg_sq"])


@lru_cache(maxsize=1 << 13)  # or the host would take longer over a step than the device
def placed(
    plan: StatePlan,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    clip: bool,
    places: tuple[int, int],
    addresses: tuple[int, ...],
) -> list[tuple[Variant, Part]] | None:
    """`parts_of` a weight and gradient at `places` and state at `addresses`; dtypes of the weight and of exp_avg."""
    moment, codec = plan.moments.get("exp_avg_sq"), plan.codec
    block = row = None
    if isinstance(codec, Int8Blockwise):
        block, row = codec.block_size, codec.ragged_row(shape)
        if block not in BLOCK_SIZES:
            row = codec.row(shape)
            if row != block:
                return None
    if dtypes[0] not in _WEIGHTS:
        return None
    found: list[Geometry] | None = [elementwise(math.prod(shape), row)]
    if isinstance(moment, GroupMean):
        found = geometries(moment, tuple(shape), block or 1, row)
    if found is None:
        return None
    comp, exp_avg, absmax, second_absmax, *seconds = addresses
    weight, first = (triton_kernels().DTYPES[dtype] for dtype in dtypes)
    # A projected update is float32 whatever its weight is, whose rounding is not its own.
    rounding = "nearest" if dtypes[0] == torch.float32 else plan.rounding.kind
    parts = []
    for geometry, exp_avg_sq in zip(found, seconds, strict=True):
        second = "full" if moment else "none"
        if isinstance(moment, GroupMean):
            second = "column" if geometry.per_column else "group"
        tile = tile_for(f"{second} 8-bit" if block else second, current_arch())
        layout = layout_of(geometry, second, block, tile)
        by_tile = (*places, comp, exp_avg, *([exp_avg_sq] if second == "full" else []))
        align = _ALIGN if layout.aligned and not any(address % _ALIGN for address in by_tile) else 1
        cut = (layout.means, layout.nest, layout.line, layout.lines, layout.groups, tile.per_thread)
        where = (*places, comp, exp_avg, absmax, exp_avg_sq, second_absmax)
        numbers = (*where, 0, layout.chunks, 0, layout.sums, 0, layout.cells, *geometry)
        variant = Variant(weight, first, rounding, second, *cut, align, clip, row is not None)
        parts.append((variant, Part(*numbers)))
    return parts


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Layout(NamedTuple):
    """How the entries of a part are cut into tiles."""

    means: str
    nest: int
    line: int
    lines: int
    groups: int
    cells: int
    chunks: int
    sums: int
    aligned: bool


@cache
def layout_of(found: Geometry, second: str, block: int | None, tile: Tile) -> Layout:
    """The tiles of a part: a line has room for an 8-bit `block`, or for a run of at most LINE entries."""
    line = _power_of_two(min(block or LINE, found.columns))
    if block:
        line = max(line, min(BLOCK_SIZES))  # the scales of more lines to a tile would not fit into registers
    across = -(-found.columns // line)
    lines, means, groups = max(tile.entries // line, 1), "before" if second in ("group", "column") else "none", 1
    if second == "column":
        cells, lines_of_cell = found.groups * across, found.rows
    else:
        cells, lines_of_cell = found.groups, found.rows * across
    whole = _power_of_two(lines_of_cell)
    if second == "group" and whole * line <= tile.one_tile:
        means = "tile"
        if found.groups == found.inner_groups:  # or the groups of a tile would not be evenly spaced
            groups = max(lines // whole, 1)
        lines, cells = whole * groups, -(-cells // groups)
    elif second == "group" and lines_of_cell * line <= tile.one_program:
        means = "loop"
    chunks = -(-lines_of_cell // lines)
    sums = -(-chunks // max(tile.partial_sum // (line * lines), 1))
    nest = 0 if found.rows == 1 else 1 if found.rows == found.inner_rows else 2
    sizes = (found.outer_group_stride, found.inner_group_stride, found.outer_row_stride, found.inner_row_stride)
    aligned = not any(size % _ALIGN for size in (*sizes, found.columns, found.start))
    return Layout(means, nest, line, lines, groups, cells, chunks, sums, aligned)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def warps(variant: Variant) -> int:
    """The warps of a program. A thread takes 16 entries at most where more would not fit into an A100's registers."""
    many = variant.rounding == "kahan" and variant.second == "full" and variant.moment.primitive_bitwidth > 8
    many |= variant.ragged and variant.align == 1  # an address for each entry
    per_thread = min(variant.per_thread, 16) if many else variant.per_thread
    return warps_of(variant.line * variant.lines, per_thread)


@contextmanager
def tuned(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Cut the launches of some kinds into other tiles than the table's, while the context lasts.

    Raises:
        ValueError: there is no such kind.
    """
    if unknown := set(tiles) - set(KINDS):
        raise ValueError(f"The kinds of launch are {', '.join(KINDS)}, not {', '.join(sorted(unknown))}.")
    before = dict(TUNING)
    TUNING.update({(kind, current_arch()): tile for kind, tile in tiles.items()})
    try:
        _forget_tiles()
        yield
    finally:
        TUNING.clear()
        TUNING.update(before)
        _forget_tiles()


def _forget_tiles() -> None:
    tile_for.cache_clear()
    placed.cache_clear()


def launch(variant: Variant, parts: tuple[Part, ...], slots: tuple[Slot, ...], scalars: Tensor) -> None:
    kernels, clip = triton_kernels(), slots[0].clip
    tables = table_of(parts, slots, variant.means)
    scale = scalars if clip is None else clip.scale  # not read where nothing is clipped
    options = dict(num_warps=warps(variant), enable_fp_fusion=True)
    if tables.sums is not None and tables.cells is not None:
        found = None if clip is None else clip.sums.pop(key_of_sums(variant, parts, slots), None)
        if found is None:
            found, _ = partial_sums(variant.sums, tables)
        shared = compiled_for(variant.sums._replace(clip=variant.clip))
        cells = (len(tables.cells),)
        kernels.combine[cells](
            tables.parts, scalars, scale, found, tables.cells, v=shared, **options | dict(num_warps=1)
        )
    kernels.step[(len(tables.tiles),)](tables.parts, scalars, scale, tables.tiles, v=compiled_for(variant), **options)


def partial_sums(variant: Variant, tables: Tables, totals: bool = False) -> tuple[Tensor, Tensor]:
    """The partial sums of squares that `combine` takes; and, with `totals`, of all entries of each, finite or not."""
    sums = tables.sums
    assert sums is not None
    width = variant.line if variant.second == "column" else 1
    found = torch.empty(len(sums) * width, dtype=torch.float32, device=sums.device)
    total = torch.empty(len(sums), dtype=torch.float32, device=sums.device) if totals else found
    triton_kernels().sum_squares[(len(sums),)](
        tables.parts,
        found,
        total,
        sums,
        TOTALS=totals,
        v=compiled_for(variant),
        num_warps=warps(variant),
        enable_fp_fusion=True,
    )
    return found, total


def key_of_sums(variant: Variant, parts: tuple[Part, ...], slots: tuple[Slot, ...]) -> Any:
    """Of partial sums: those of gradients that have been changed since are not found."""
    return variant.sums, parts, tuple(slot.grad._version for slot in slots)


@cache
def compiled_for(variant: Variant) -> Variant:
    """The variant as the kernels take it: Triton before 3.8 takes no parts of a constant for constants."""
    return Variant(*map(triton_kernels().tl.constexpr, variant))


class Tables(NamedTuple):
    """The rows of a launch, and the part of each tile, partial sum and cell; the last two where they are needed."""

    parts: Tensor
    tiles: Tensor
    sums: Tensor | None
    cells: Tensor | None


def table_of(parts: tuple[Part, ...], slots: tuple[Slot, ...], means: str) -> Tables:
    device = slots[0].param.device
    if not isinstance(slots[0].step, Tensor):
        return numbered(parts, means, device, current_stream(device))
    # A captured graph keeps its tables, and holds the addresses of its own gradients among the kernels' arguments.
    tables = lasting(tuple(part._replace(grad=0) for part in parts), means, device)
    for first in range(0, len(parts), ADDRESSES):
        # Odd numbers: Triton would compile for each pattern of those that 16 divides.
        grads = [part.grad | 1 for part in parts[first : first + ADDRESSES]]
        grads += grads[-1:] * (ADDRESSES - len(grads))
        options = dict(num_warps=1, enable_fp_fusion=True)  # or Triton would warn of its next version's default
        triton_kernels().write_grads[(1,)](tables.parts, first, len(parts) - 1, tuple(grads), **options)
    return tables


@lru_cache(maxsize=64)
def numbered(parts: tuple[Part, ...], means: str, device: torch.device, stream: int) -> Tables:
    """The tables of a launch, uploaded once for as long as no address changes.

    They are uploaded on `stream`, the current one: another would not wait for them.
    """
    tiles = [part.cells * (1 if means == "loop" else part.chunks) for part in parts]
    sums, cells = [part.cells * part.sums for part in parts], [part.cells for part in parts]
    firsts = zip(*(accumulate(counts, initial=0) for counts in (tiles, sums, cells)), strict=True)
    rows = tuple(
        part._replace(first_tile=tile, first_sum=sum_, first_cell=cell)
        for part, (tile, sum_, cell) in zip(parts, firsts, strict=False)
    )
    owners = [_owners(tuple(counts), device, stream) if means == "before" else None for counts in (sums, cells)]
    return Tables(uploaded(rows, torch.int64, device), _owners(tuple(tiles), device, stream), *owners)


@cache
def lasting(parts: tuple[Part, ...], means: str, device: torch.device) -> Tables:
    """`numbered`, for good: captured graphs may read them, on other streams."""
    tables = numbered.__wrapped__(parts, means, device, current_stream(device))
    arrived(device)
    return tables


@cache
def lasting_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    found = uploaded(numbers, torch.int64, device)
    arrived(device)
    return found


def arrived(device: torch.device) -> None:
    """Wait for what was uploaded, so that any stream can read it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@lru_cache(maxsize=64)  # of sizes alone: there are as many as launches, whatever the addresses
def _owners(counts: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """int32: the number of each part, as often as it counts; found on `stream`, as above."""
    repeats = uploaded(counts, torch.int32, device)
    numbers = torch.arange(len(counts), dtype=torch.int32, device=device)
    return torch.repeat_interleave(numbers, repeats, output_size=sum(counts))


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def uploaded(rows: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device, which nothing waits for.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would upload the same numbers at every replay.
    """
    if capturing(device):
        raise RuntimeError(
            "A CUDA graph of a step needs what the first steps make: with capturable=true, take at least one step of "
            "the same parameters before the capture."
        )
    on_host = torch.tensor(rows, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
