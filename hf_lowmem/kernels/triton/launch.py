"""The launches of the Triton kernels: few of them, through tables of addresses that are uploaded when they change.

Parts of weights that one variant of the kernels covers are stepped by one launch, by three where their means come
before the step, or by four where they are factored. Nothing waits for the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.columns import SCALARS, TRITON_PART
from hf_lowmem.kernels.registry import choice
from hf_lowmem.kernels.scalars import SCALARS as SCALARS_OF
from hf_lowmem.kernels.scalars import rows_on_host
from hf_lowmem.kernels.triton.tuning import current_arch, tile_for, warps_of
from hf_lowmem.kernels.triton.variants import WEIGHTS, Piece, Variant, compiled_for, pieces_of, triton_kernels, warps
from hf_lowmem.rounding import noise_key
from hf_lowmem.state import KAHAN_COMP

ADDRESSES = 32  # that one launch writes into a table
GRAD = TRITON_PART.index("grad")


class Tables(NamedTuple):
    """The rows of a launch, and the part of each tile and, where they are needed, each partial sum, reduction and
    group."""

    parts: Tensor
    tiles: Tensor
    sums: Tensor | None
    reductions: Tensor | None
    groups: Tensor | None


class Launch:
    """The parts of a bucket's weights that one launch steps.

    Args:
        variant: what it is compiled for, without clipping.
        pieces: the parts, each with the place in the bucket of its weight.
        has_whole_weights: whether all parts of these weights have their means found before the step.
    """

    def __init__(self, variant: Variant, pieces: Sequence[tuple[int, Piece]], has_whole_weights: bool) -> None:
        self.variant, self.has_whole_weights = variant, has_whole_weights
        self.weights = torch.tensor([number for number, _ in pieces], dtype=torch.int64, device="cpu")
        columns = [piece.columns for _, piece in pieces]
        tiles = [c["reductions"] * (1 if variant.means == "loop" else c["tiles"]) for c in columns]
        sums, reductions = [c["reductions"] * c["sums"] for c in columns], [c["reductions"] for c in columns]
        groups, row_sums = [c["groups"] for c in columns], [c["reductions"] * c["rows"] for c in columns]
        self._counts = [tuple(tiles), *([tuple(sums), tuple(reductions)] if variant.means == "before" else [])]
        self._counts += [tuple(groups)] if variant.factored else []
        column_sums = sum(sums) * (variant.block if variant.second == "column" else 1)
        self.number_of_sums = column_sums + (sum(row_sums) if variant.factored else 0)
        counts = {"tile": tiles, "sum": sums, "reduction": reductions, "row_sum": row_sums, "group": groups}
        starts = {name: accumulate(each, initial=0) for name, each in counts.items()}
        for (number, _), column in zip(pieces, columns, strict=True):
            column |= {"weight": number, **{f"first_{name}": next(start) for name, start in starts.items()}}
            column["first_row_sum"] += column_sums
        rows = [[column.get(name, 0) for name in TRITON_PART] for column in columns]
        self.rows = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.entries = sum(column["groups"] * column["rows"] * column["columns"] for column in columns)
        self._tables: Tables | None = None
        self._tables_of: Any = None  # the stream and the gradients that they were uploaded on and for

    def __len__(self) -> int:
        return len(self.weights)

    def tables(self, bucket: Bucket, gradients: list[int]) -> Tables:
        """Return the tables on the device, where those of these gradients are uploaded if they are not there."""
        device, stream = bucket.device, current_stream(bucket.device)
        own = torch.tensor(gradients, dtype=torch.int64, device="cpu")[self.weights]
        if isinstance(bucket.steps[0], Tensor):
            return self._lasting(own, device)
        if self._tables is None or self._tables_of != (stream, gradients):
            self.rows[:, GRAD] = own
            self._tables = self._uploaded(self.rows, device, stream)
            self._tables_of = (stream, gradients)
        return self._tables

    def _uploaded(self, rows: Tensor, device: torch.device, stream: int) -> Tables:
        part_tables = [part_numbers(counts, device, stream) for counts in self._counts]
        return Tables(uploaded(rows, device), *part_tables, *[None] * (4 - len(part_tables)))

    def _lasting(self, gradients: Tensor, device: torch.device) -> Tables:
        """Return tables that are never freed, since captured graphs, which hold their own gradients, may read them."""
        rows = self.rows.clone()
        rows[:, GRAD] = 0
        key = (self.variant, tuple(map(tuple, rows.tolist())), device)
        if key not in _LASTING:
            _LASTING[key] = self._uploaded(rows, device, current_stream(device))
            arrived(device)
        tables = _LASTING[key]
        for first in range(0, len(self), ADDRESSES):
            # Odd numbers: Triton would compile for each pattern of those that 16 divides.
            grads = [grad | 1 for grad in gradients[first : first + ADDRESSES].tolist()]
            grads += grads[-1:] * (ADDRESSES - len(grads))
            options = dict(num_warps=1, enable_fp_fusion=True)  # or Triton would warn of its next version's default
            triton_kernels().write_grads[(1,)](tables.parts, first, len(self) - 1, tuple(grads), **options)
        return tables

    def step(self, bucket: Bucket, gradients: list[int], scalars: Tensor, averaged: bool) -> None:
        """Step the parts: by the means as they are if `averaged`, else by means that this step finds."""
        kernels, clip = triton_kernels(), bucket.clip
        tables, variant = self.tables(bucket, gradients), self.variant._replace(clip=clip is not None)
        scale = scalars if clip is None else clip.scale  # not read where nothing is clipped
        options = dict(num_warps=warps(variant), enable_fp_fusion=True)
        if not averaged:
            self._average(tables, bucket, gradients, scalars)
        group_means = scale  # not read where no part is factored
        if tables.groups is not None:
            group_means = torch.empty(len(tables.groups), dtype=torch.float32, device=bucket.device)
            each, many_warps = (len(tables.groups),), options | dict(num_warps=8)
            kernels.mean_of_rows[each](tables.parts, group_means, tables.groups, **many_warps)
        tiles, chosen = (len(tables.tiles),), compiled_for(variant)
        kernels.step[tiles](tables.parts, scalars, scale, group_means, tables.tiles, v=chosen, **options)

    def average(self, bucket: Bucket, gradients: list[int], scalars: Tensor) -> None:
        """Average the squares of this step's gradients into the means that are found before the step, if any are."""
        self._average(self.tables(bucket, gradients), bucket, gradients, scalars)

    def _average(self, tables: Tables, bucket: Bucket, gradients: list[int], scalars: Tensor) -> None:
        clip = bucket.clip
        if tables.sums is None or tables.reductions is None:
            return
        stamp, found = (None, None) if clip is None else clip.partial_sums.pop(self, (None, None))
        if found is None or stamp != self._stamp(bucket, gradients):
            found, _ = self.partial_sums(tables)
        shared = compiled_for(self.variant.sums._replace(clip=clip is not None))
        scale = scalars if clip is None else clip.scale  # not read where nothing is clipped
        triton_kernels().combine[(len(tables.reductions),)](
            tables.parts, scalars, scale, found, tables.reductions, v=shared, num_warps=1, enable_fp_fusion=True
        )

    def square_norm(self, bucket: Bucket, gradients: list[int], kept: dict[Any, Any]) -> Tensor:
        """Return the squared norm of the parts' gradients, 0-D; the partial sums of their means go into `kept`."""
        found, totals = self.partial_sums(self.tables(bucket, gradients), totals=True)
        kept[self] = (self._stamp(bucket, gradients), found)
        return totals.sum()

    @staticmethod
    def _stamp(bucket: Bucket, gradients: list[int]) -> Any:
        """Return a key of the gradients, which changes if one is replaced or written."""
        return gradients, [grad._version for grad in bucket.grads]

    def partial_sums(self, tables: Tables, totals: bool = False) -> tuple[Tensor, Tensor]:
        """Return the partial sums of squares that `combine` takes and, with `totals`, those that count what is not
        finite too."""
        variant, sums = self.variant.sums, tables.sums
        assert sums is not None
        found = torch.empty(self.number_of_sums, dtype=torch.float32, device=sums.device)
        total = torch.empty(len(sums), dtype=torch.float32, device=sums.device) if totals else found
        options = dict(num_warps=warps(variant), enable_fp_fusion=True)
        triton_kernels().sum_squares[(len(sums),)](
            tables.parts, found, total, sums, TOTALS=totals, v=compiled_for(variant), **options
        )
        return found, total


_LASTING: dict[Any, Tables] = {}


def launches_of(bucket: Bucket, averaged: bool) -> list[Launch]:
    """Return the launches that step a bucket."""
    found: dict[tuple[Variant, bool], list[tuple[int, Piece]]] = defaultdict(list)
    for number, step in enumerate(bucket):
        pieces = pieces_of(bucket.rule, step, averaged)
        before = all(piece.variant.means == "before" for piece in pieces)
        for piece in pieces:
            found[piece.variant, before].append((number, piece))
    return [Launch(variant, pieces, before) for (variant, before), pieces in found.items()]


def scalars_on_device(bucket: Bucket, hyper: Hyper) -> Tensor:
    """Return the rows of `columns.SCALARS` of the bucket's weights, on the device; computed there if `capturable`."""
    device, count = bucket.device, len(bucket.params)
    if not isinstance(bucket.steps[0], Tensor):
        return uploaded(rows_on_host(bucket, hyper, torch.arange(count, device="cpu")), device)
    steps, keys = torch.stack(list(bucket.steps)).double(), 0
    if isinstance(bucket.noise_keys[0], tuple):
        seeds, numbers = zip(*bucket.noise_keys, strict=True)
        keys = noise_key(seeds[0], lasting_numbers(numbers, device), steps.long())
    shares = (1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2)
    scalars = torch.empty(count, len(SCALARS), dtype=torch.float64, device=device)
    for number, column in enumerate((*SCALARS_OF[bucket.rule](steps, hyper), *shares, keys, 1.0)):
        scalars[:, number] = column
    return scalars


def adds(step: ParamStep, update: Tensor) -> bool:
    """Return whether `add` can add an update to a parameter."""
    param = step.param
    plain = param.dtype in WEIGHTS and param.is_contiguous() and update.is_contiguous()
    wanted = "triton" in choice() if choice() else param.device.type == "cuda"
    return wanted and plain and triton_kernels() is not None


def add(step: ParamStep, update: Tensor, scale: float, decay: float | Tensor) -> None:
    """Take param <- decay * param + scale * update in one pass; a decay is a number, or one per matrix of a stack."""
    param, device = step.param, step.param.device
    decays = (
        decay.flatten() if isinstance(decay, Tensor) else torch.full((1,), decay, dtype=torch.float32, device=device)
    )
    entries, tile = param.numel() // decays.numel(), tile_for("add", current_arch())
    comps, rounding = step.state.get(KAHAN_COMP, param), step.plan.rounding.kind
    grid = (-(-entries // tile.entries), decays.numel())
    options = dict(num_warps=warps_of(tile.entries, tile.per_thread), enable_fp_fusion=True)
    sizes = dict(ROUNDING=rounding, TILE=tile.entries)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        add_kernel = triton_kernels().add[grid]
        add_kernel(param, comps, update, decays.float(), scale, step.noise_key, entries, **sizes, **options)


def numbers_on_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return the numbers of a step, float64; computed on the device where one of them is there."""
    if not any(isinstance(value, Tensor) for value in values):
        return uploaded(torch.tensor(values, dtype=torch.float64, device="cpu"), device)
    found = torch.empty(len(values), dtype=torch.float64, device=device)
    for place, value in enumerate(values):
        found[place] = value
    return found


@cache
def lasting_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    found = uploaded(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
    arrived(device)
    return found


def arrived(device: torch.device) -> None:
    """Wait for what was uploaded, so that any stream can read it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@lru_cache(maxsize=64)  # of sizes alone: there are as many as launches, whatever the addresses
def part_numbers(counts: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Return int32 the number of each part as often as it counts, found on `stream`, since others do not wait."""
    repeats = uploaded(torch.tensor(counts, dtype=torch.int32, device="cpu"), device)
    numbers = torch.arange(len(counts), dtype=torch.int32, device=device)
    return torch.repeat_interleave(numbers, repeats, output_size=sum(counts))


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def uploaded(on_host: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device of a tensor on the host, which nothing waits for.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would upload the same numbers at every replay.
    """
    if capturing(device):
        raise RuntimeError(
            "A CUDA graph of a step needs what the first steps make: with capturable=true, take at least one step of "
            "the same parameters before the capture."
        )
    if device.type == "cuda":
        return on_host.pin_memory().to(device, non_blocking=True)
    return on_host.to(device, copy=True)
