"""SMMF in one pass over rows of the square view, by the old factors; the new ones need the sums over all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Hyper, ParamStep
from hf_lowmem.kernels.means import scaled_grad, tile_size
from hf_lowmem.kernels.passes import Passes, RulePasses, Sum
from hf_lowmem.moments import RankOne
from hf_lowmem.moments.rank_one import packed, store_factors, unpacked
from hf_lowmem.rounding import StoredWeight
from hf_lowmem.scratch import Scratch, known_finite

MOMENTS, SIDES = ("exp_avg", "exp_avg_sq"), ("row", "col")


class Numbers(NamedTuple):
    """The numbers of one step: floats, or 0-D tensors where the number of the step or the learning rate is one."""

    decay: Any
    lr: Any
    eps: float
    beta1: Any
    beta2: Any


def numbers_of(step: ParamStep, hyper: Hyper) -> Numbers:
    """Return the numbers of `smmf_rule` at this step."""
    number = step.step.double() if isinstance(step.step, Tensor) else step.step
    decay, beta1 = 1 - hyper.lr * hyper.weight_decay, hyper.beta1 * hyper.flags["growth_rate"] ** (number - 1)
    return Numbers(decay, hyper.lr, hyper.eps, beta1, 1 - number ** hyper.flags["decay_rate"])


class Square(NamedTuple):
    """A weight in its square view: the number of squares, and the sides of each."""

    squares: int
    n: int
    m: int

    @classmethod
    def of(cls, step: ParamStep) -> Square:
        stack, n, m = first_moment(step).view_of(step.shape)
        return cls(stack[0] if stack else 1, n, m)


def first_moment(step: ParamStep) -> RankOne:
    """Return the first moment of a weight whose moments are factored."""
    moment = step.plan.moments["exp_avg"]
    assert isinstance(moment, RankOne)
    return moment


def is_contiguous_square(step: ParamStep) -> bool:
    """Return whether a step has factored moments, of a weight that can be viewed as a square."""
    kinds = {name: type(moment) for name, moment in step.plan.moments.items()}
    return kinds == dict.fromkeys(MOMENTS, RankOne) and step.param.is_contiguous() and step.grad.is_contiguous()


def covers(step: ParamStep) -> bool:
    """Return whether a step is taken in float32, but for a bfloat16 weight that is rounded after its decay."""
    in_float32 = step.plan.arithmetic in (torch.float32, torch.bfloat16)
    return in_float32 and is_contiguous_square(step) and not isinstance(step.step, Tensor)


Sums = dict[str, Tensor]  # of the rows and of the columns of both moments, by the names of the factors
Pass = Callable[[ParamStep, Numbers, Sums], None]


def in_one_pass(go_over: Pass) -> Callable[[ParamStep, Hyper], Passes]:
    """Return how a weight is stepped by a function that goes over it: updates it and its signs, and adds up the sums.

    Args:
        go_over: the function; it reads the old factors and leaves them, and adds to the sums, which are zero.
    """

    def smmf(step: ParamStep, hyper: Hyper) -> Passes:
        sums = {f"{name}_{side}": torch.zeros_like(step.state[f"{name}_{side}"]) for name in MOMENTS for side in SIDES}
        go_over(step, numbers_of(step, hyper), sums)
        dims = (0, None) if first_moment(step).stacked else (None,)
        yield [Sum(values, dims) for values in sums.values()]
        for name in MOMENTS:
            row, col = f"{name}_row", f"{name}_col"
            store_factors(step.state[row], step.state[col], sums[row], sums[col])

    return smmf


def in_tiles(step: ParamStep, numbers: Numbers, sums: Sums) -> None:
    """Go over a weight in tiles of whole rows, so many that no byte of the signs crosses two tiles."""
    square, scratch, limit = Square.of(step), Scratch(step.param.device), tile_size(step.param.device)
    rows = max(limit // square.m // 8, 1) * 8
    weight = step.weight().map(lambda tensor: tensor.view(square))
    flat = step._replace(grad=step.grad.view(square))
    signs = step.state["exp_avg_sign"].view(square.squares, -1)
    factors, totals = ({name: each[name].view(square.squares, -1) for name in sums} for each in (step.state, sums))
    for number in range(square.squares):
        for start in range(0, square.n, rows):
            cut = slice(start, min(start + rows, square.n))
            index, codes = (slice(number, number + 1), cut), slice(start * square.m // 8, -(-cut.stop * square.m // 8))
            step_rows(
                weight[index].map(lambda tensor: tensor[0]),
                scaled_grad(flat, index)[0],
                rows_of(factors, number, cut),
                signs[number, codes],
                rows_of(totals, number, cut),
                numbers,
                first_moment(step).mask_zeros,
                scratch,
            )


def rows_of(tensors: Sums, number: int, cut: slice) -> Sums:
    """Return the factors, or the sums, of some rows of one square."""
    return {name: each[number, cut] if name.endswith("_row") else each[number] for name, each in tensors.items()}


def step_rows(
    weight: StoredWeight,
    grad: Tensor,
    factors: Sums,
    signs: Tensor,
    sums: Sums,
    numbers: Numbers,
    mask_zeros: bool,
    scratch: Scratch,
) -> None:
    """Step rows of one square, whose gradient has the dtype that the decayed weight is rounded to."""
    arithmetic, grad = grad.dtype, grad.float()

    def moment(name: str) -> Tensor:
        row, col = factors[f"{name}_row"].unsqueeze(-1), factors[f"{name}_col"]
        return torch.mul(row, col, out=scratch.get(name, grad.shape))

    def add_up(name: str, values: Tensor) -> None:
        row_sums = values.sum(-1)
        if not known_finite(v_sums):  # an entry that is not finite concerns itself alone
            values = torch.where(v.isfinite(), values, 0.0)
            row_sums = values.sum(-1)
        sums[f"{name}_row"].add_(row_sums)
        sums[f"{name}_col"].add_(values.sum(0))

    m, v = map(moment, MOMENTS)
    positive = unpacked(signs, grad.numel()).view(grad.shape)
    m.copysign_(torch.sub(positive.to(m.dtype), 0.5, out=scratch.get("sign", grad.shape)))
    if mask_zeros:
        m.masked_fill_(grad == 0, 0.0)
    m.mul_(numbers.beta1).add_(grad, alpha=1 - numbers.beta1)
    v.mul_(numbers.beta2).addcmul_(grad, grad, value=1 - numbers.beta2)
    signs.copy_(packed((m > 0).view(-1)))
    v_sums = v.sum(-1)
    add_up("exp_avg", torch.abs(m, out=scratch.get("sign", grad.shape)))
    add_up("exp_avg_sq", v)
    decayed = weight.load(scratch).mul_(numbers.decay).to(arithmetic).float()
    weight.store(decayed.addcdiv_(m, v.sqrt_().add_(numbers.eps), value=-numbers.lr))


SMMF = RulePasses(covers, in_one_pass(in_tiles))
