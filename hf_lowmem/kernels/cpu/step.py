"""Steps on the CPU by the compiled kernels: one call for a bucket, one pass over memory where there can be, on all
threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hf_lowmem.codecs import Int8Blockwise
from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.columns import ADDRESSES, CPU_PART, SCALARS
from hf_lowmem.kernels.cpu.library import code_maps, library
from hf_lowmem.kernels.means import Sums
from hf_lowmem.kernels.parts import addresses_of, geometries_of, second_moment
from hf_lowmem.kernels.registry import Backend
from hf_lowmem.kernels.scalars import rows_on_host
from hf_lowmem.state import StatePlan

# The numbers by which native.c knows second moments, dtypes and roundings.
SECOND_MOMENTS = {"full": 0, "mean": 1, "none": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2}
STEP, APPLY, AVERAGE = range(3)  # the passes of native.c
GRAD = CPU_PART.index("grad")


class Cpu(Backend):
    """Steps by the library of contiguous float32 and bfloat16 weights whose gradients have the weight's dtype."""

    name = "cpu"
    devices = ("cpu",)

    def available(self) -> bool:
        return library() is not None

    def covers(self, rule: str, step: ParamStep) -> bool:
        param, grad = step.param, step.grad
        if second_moment(rule, step.plan) is None or isinstance(step.step, Tensor):
            return False
        if param.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != param.dtype:
            return False
        if not (param.is_contiguous() and grad.is_contiguous()):
            return False
        return geometries_of(step.plan, tuple(param.shape)) is not None and self.available()

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        table = self._table(bucket)
        self._call(table, rows_on_host(bucket, hyper, table.owners, scale_of(bucket)), STEP)

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        table = self._table(bucket)
        self._call(table, rows_on_host(bucket, hyper, table.owners, scale_of(bucket)), APPLY)

    def reduce(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        sums = Sums.of(bucket)
        table = self._table(sums.taking(bucket))
        numbers = torch.zeros(len(table.owners), len(SCALARS), dtype=torch.float64, device="cpu")
        numbers[:, SCALARS.index("new_2")], numbers[:, SCALARS.index("grad_scale")] = 1.0, scale_of(bucket)
        self._call(table, numbers, AVERAGE)
        return sums.read()

    def _table(self, bucket: Bucket) -> Table:
        table: Table | None = bucket.kept.get(self.name)
        if table is None:
            table = bucket.kept[self.name] = Table(bucket.rule, list(bucket))
        table.take_gradients(bucket)
        return table

    @staticmethod
    def _call(table: Table, scalars: Tensor, which: int) -> None:
        compiled = library()
        assert compiled is not None
        rows, numbers, count = table.rows.data_ptr(), scalars.data_ptr(), len(table.owners)
        if compiled.hf_lowmem_step(rows, numbers, code_maps(), count, which, torch.get_num_threads()):
            raise MemoryError("There is no memory left for the sums of the optimizer's step.")


def scale_of(bucket: Bucket) -> float:
    """Return what clipping multiplies the gradients by."""
    return 1.0 if bucket.clip is None else bucket.clip.scale.item()


class Table:
    """The rows of the parts of some weights, int64 (parts, columns), and the number of each one's weight."""

    def __init__(self, rule: str, steps: Sequence[ParamStep]) -> None:
        rows = [(number, row) for number, step in enumerate(steps) for row in rows_of(rule, step)]
        self.owners = torch.tensor([number for number, _ in rows], dtype=torch.int64, device="cpu")
        self.rows = torch.tensor([row for _, row in rows], dtype=torch.int64, device="cpu")
        self._grads, self._numbers = self.rows.numpy()[:, GRAD], self.owners.tolist()
        self._gradients = [step.grad.data_ptr() for step in steps]

    def take_gradients(self, bucket: Bucket) -> None:
        """Write the addresses of this step's gradients, if they have moved."""
        found = bucket.gradient_addresses()
        if found != self._gradients:
            self._gradients = found
            self._grads[:] = [found[number] for number in self._numbers]


def rows_of(rule: str, step: ParamStep) -> list[list[int]]:
    """Return the row of each part of a weight."""
    found = []
    dtypes = (step.param.dtype, step.state["exp_avg"].dtype)
    planned = _planned(rule, step.plan, tuple(step.param.shape), dtypes)
    for row, where in zip(planned, addresses_of(step.param, step.grad, step.state, step.plan), strict=True):
        found.append([*(where.get(name, 0) for name in ADDRESSES), *row])
    return found


@lru_cache(maxsize=1 << 12)
def _planned(
    rule: str, plan: StatePlan, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> list[list[int]]:
    """Return the columns after the addresses of each part of a weight; `dtypes` are the weight's and exp_avg's."""
    second, found, codec = second_moment(rule, plan), geometries_of(plan, shape), plan.codec
    assert second is not None
    assert found is not None
    block, row = 1, 1
    if isinstance(codec, Int8Blockwise):
        block = codec.block_size
        row = codec.ragged_row(shape) or block  # whole blocks are rows of their own
    kinds = {
        "dtype": DTYPES[dtypes[0]],
        "exp_avg_dtype": DTYPES[dtypes[1]],
        "exp_avg_sq_dtype": DTYPES[
            torch.uint8 if second == "full" and isinstance(codec, Int8Blockwise) else torch.float32
        ],
        "rule": SECOND_MOMENTS[second],
        "rounding": ROUNDINGS["nearest" if dtypes[0] == torch.float32 else plan.rounding.kind],
        "block_size": block,
        "row": row,
    }
    columns = CPU_PART[len(ADDRESSES) :]
    return [[int({**kinds, **geometry._asdict()}[name]) for name in columns] for geometry in found]


CPU = Cpu()
