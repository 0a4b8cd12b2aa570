"""In-place steps in plain torch: cache-sized tiles, reused temporaries, no pass over memory that is not needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from hf_lowmem.codecs import Int8Blockwise
from hf_lowmem.codecs.int8_blockwise import dequantize, quantize
from hf_lowmem.kernels.seam import Clip, Hyper, Kernel, Slot
from hf_lowmem.moments import GroupMean
from hf_lowmem.rounding import StoredWeight
from hf_lowmem.scratch import Scratch, known_finite
from hf_lowmem.state import FULL_SPACE, Subspace
from hf_lowmem.update_rules import root_mean_square

Index = tuple[slice, ...]
View = Callable[[Tensor], Tensor]


def tile_size(device: torch.device) -> int:
    """Entries per tile: what a CPU's last cache holds with its temporaries, or enough to fill an accelerator."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def tile_limit(slot: Slot) -> int:
    """`tile_size`, in whole 8-bit blocks: a row longer than that is cut between them."""
    limit, codec = tile_size(slot.param.device), slot.plan.codec
    return limit - limit % codec.block_size if isinstance(codec, Int8Blockwise) else limit


def tiles(shape: Sequence[int], limit: int, depth: int) -> Iterator[Index]:
    """Cover `shape` with tiles of at most `limit` entries, cutting only the first `depth` axes."""
    if math.prod(shape) <= limit or depth == 0:
        yield ()
        return
    row = math.prod(shape[1:])
    if shape[0] > 1 and row <= limit:
        rows = limit // row
        for start in range(0, shape[0], rows):
            yield (slice(start, min(start + rows, shape[0])),)
        return
    for start in range(shape[0]):
        for rest in tiles(shape[1:], limit, depth - 1):
            yield (slice(start, start + 1), *rest)


def broadcast_tile(stored: Tensor, index: Index) -> Tensor:
    """The part of `stored` that broadcasts against tile `index` of the tensor that `stored` broadcasts against."""
    return stored[tuple(s if size > 1 else slice(None) for s, size in zip(index, stored.shape, strict=False))]


@dataclass
class StoredMoment:
    """A full moment, or a view of it: float, or 8-bit codes with the scales of their blocks."""

    name: str
    data: Tensor
    absmax: Tensor | None = None
    block_size: int = 1
    signed: bool = True

    @classmethod
    def of(cls, slot: Slot, name: str, view: View, signed: bool = True) -> StoredMoment:
        data, codec = view(slot.state[name]), slot.plan.codec
        if not isinstance(codec, Int8Blockwise):
            return cls(name, data, signed=signed)
        return cls(name, data, view(slot.state[f"{name}_absmax"]), codec.block_size, signed)

    @property
    def depth(self) -> int:
        """How many axes a tile may cut: not those of a row of blocks that are more than one."""
        return self.data.ndim if self.absmax is None or self.absmax.ndim == self.data.ndim else self.absmax.ndim - 1

    def __getitem__(self, index: Index) -> StoredMoment:
        absmax = self.absmax
        if absmax is not None:
            if len(index) == absmax.ndim:  # the last axis is cut too, between blocks
                last = slice(index[-1].start // self.block_size, -(-index[-1].stop // self.block_size))
                absmax = absmax[(*index[:-1], last)]
            else:
                absmax = absmax[index]
        return replace(self, data=self.data[index], absmax=absmax)

    def load(self, scratch: Scratch) -> Tensor:
        """As float32: in place where it is stored so, else a temporary to hand to `store`."""
        if self.absmax is None:
            return as_float32(self.data, self.name, scratch)
        out = scratch.get(self.name, self.data.shape)
        dequantize(self.data, self.absmax, self.block_size, self.signed, out=out, scratch=scratch)
        return out

    def store(self, value: Tensor, scratch: Scratch) -> None:
        """Write back what `load` gave; a temporary is overwritten."""
        if self.absmax is not None:
            quantize(value, self.data, self.absmax, self.block_size, self.signed, scratch=scratch)
        elif value is not self.data:
            self.data.copy_(value)


def as_float32(tile: Tensor, name: str, scratch: Scratch) -> Tensor:
    return tile if tile.dtype == torch.float32 else scratch.get(name, tile.shape).copy_(tile)


@dataclass
class Weight:
    """A parameter with its gradient and first moment, or one view or tile of all three."""

    param: StoredWeight
    grad: Tensor
    exp_avg: StoredMoment
    clip: Clip | None

    @classmethod
    def of(cls, slot: Slot, view: View) -> Weight:
        return cls(slot.weight().map(view), view(slot.grad), StoredMoment.of(slot, "exp_avg", view), slot.clip)

    def __getitem__(self, index: Index) -> Weight:
        return Weight(self.param[index], self.grad[index], self.exp_avg[index], self.clip) if index else self

    @property
    def shape(self) -> torch.Size:
        return self.grad.shape

    @property
    def depth(self) -> int:
        return self.exp_avg.depth

    def load_grad(self, scratch: Scratch) -> Tensor:
        grad = as_float32(self.grad, "grad", scratch)
        return grad if self.clip is None else torch.mul(grad, self.clip.scale, out=scratch.get("grad", grad.shape))

    def load(self, grad: Tensor, decay: float | Tensor, beta1: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """The weights times `decay` and the first moment with `grad` averaged in, as float32."""
        param = self.param.load(scratch)
        if isinstance(decay, Tensor) or decay != 1:
            param.mul_(decay)
        return param, self.exp_avg.load(scratch).lerp_(grad, 1 - beta1)

    def store(self, param: Tensor, exp_avg: Tensor, scratch: Scratch) -> None:
        self.param.store(param)
        self.exp_avg.store(exp_avg, scratch)


@dataclass(frozen=True)
class Scalars:
    """One step of one parameter: param <- decay * param - step_size * exp_avg / (sqrt(exp_avg_sq) + eps).

    Numbers, or under `capturable` tensors on the device.
    """

    decay: Any
    step_size: Any
    eps: Any


Form = Callable[[Slot, Hyper], Scalars]
Add = Callable[[Slot, Tensor, float, "float | Tensor"], None]


def adamw_form(slot: Slot, hyper: Hyper) -> Scalars:
    """`adamw_rule`, its bias corrections moved from the tensors to the scalars."""
    root = (1 - hyper.beta2**slot.step) ** 0.5  # of a float or, under `capturable`, of a tensor of steps
    step_size = hyper.lr * root / (1 - hyper.beta1**slot.step)
    return Scalars(1 - hyper.lr * hyper.weight_decay, step_size, hyper.eps * root)


def transformers_adamw_form(slot: Slot, hyper: Hyper) -> Scalars:
    """`transformers_adamw_rule`, the decay of the update moved to the scalars too."""
    decay = 1 - hyper.lr * hyper.weight_decay
    step_size = adamw_form(slot, hyper).step_size if hyper.flags["correct_bias"] else hyper.lr
    return Scalars(decay, decay * step_size, hyper.eps)


def signum_form(slot: Slot, hyper: Hyper) -> Scalars:
    """`signum_rule`: the sign takes the place of the quotient."""
    return Scalars(1 - hyper.lr * hyper.weight_decay, hyper.lr, 0.0)


def signum(slots: Sequence[Slot], hyper: Hyper) -> None:
    """Signum: no second moment."""
    scratch = Scratch(slots[0].param.device)
    for slot in slots:
        scalars = signum_form(slot, hyper)
        weight = Weight.of(slot, at_least_1d)
        for index in tiles(weight.shape, tile_limit(slot), weight.depth):
            tile = weight[index]
            param, exp_avg = tile.load(tile.load_grad(scratch), scalars.decay, hyper.beta1, scratch)
            param.sub_(torch.sign(exp_avg, out=scratch.get("sign", exp_avg.shape)), alpha=scalars.step_size)
            tile.store(param, exp_avg, scratch)


def adamw_full_float32(slots: Sequence[Slot], hyper: Hyper, form: Form = adamw_form) -> None:
    """AdamW as torch's fused step takes it, where all is float32, contiguous and not clipped; else as `adamw_full`."""
    by_step: dict[float, list[Slot]] = defaultdict(list)
    others: list[Slot] = []
    for slot in slots:
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in (slot.param, slot.grad))
        (by_step[slot.step] if plain and slot.clip is None else others).append(slot)
    for step, fused in by_step.items():
        torch_fused(fused, step, hyper, form)
    if others:
        adamw_full(others, hyper, form)


def torch_fused(slots: Sequence[Slot], step: float, hyper: Hyper, form: Form) -> None:
    lr, weight_decay, eps = hyper.lr, hyper.weight_decay, hyper.eps
    if form is not adamw_form:  # the hyperparameters with which adamw_rule takes the same step
        scalars, root = form(slots[0], hyper), math.sqrt(1 - hyper.beta2**step)
        lr = scalars.step_size * (1 - hyper.beta1**step) / root
        weight_decay = (1 - scalars.decay) / lr if lr else 0.0
        eps = scalars.eps / root
    torch_adamw(
        [slot.param for slot in slots],
        [slot.grad for slot in slots],
        [slot.state["exp_avg"] for slot in slots],
        [slot.state["exp_avg_sq"] for slot in slots],
        [],
        [torch.tensor(step - 1, dtype=torch.float32, device="cpu") for _ in slots],  # torch counts the step itself
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )


def adamw_full(slots: Sequence[Slot], hyper: Hyper, form: Form = adamw_form) -> None:
    """AdamW with one second-moment number per entry."""
    scratch = Scratch(slots[0].param.device)
    for slot in slots:
        scalars = form(slot, hyper)
        weight = Weight.of(slot, at_least_1d)
        second = StoredMoment.of(slot, "exp_avg_sq", at_least_1d, signed=False)
        for index in tiles(weight.shape, tile_limit(slot), weight.depth):
            tile, exp_avg_sq = weight[index], second[index]
            grad = tile.load_grad(scratch)
            param, exp_avg = tile.load(grad, scalars.decay, hyper.beta1, scratch)
            loaded = exp_avg_sq.load(scratch)
            rooted = exp_avg_sq.absmax is not None  # codes hold the square root, which the step needs too
            if rooted:
                loaded.square_()
            loaded.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
            root = torch.sqrt(loaded, out=loaded if rooted else scratch.get("root", grad.shape))
            denominator = torch.add(root, scalars.eps, out=scratch.get("denominator", grad.shape))
            param.addcdiv_(exp_avg, denominator, value=-scalars.step_size)
            exp_avg_sq.store(loaded, scratch)
            tile.store(param, exp_avg, scratch)


def undecayed_form(slot: Slot, hyper: Hyper) -> Scalars:
    """`transformers_adamw_form` for an update alone: the weight is decayed as it takes it."""
    return replace(transformers_adamw_form(slot, hyper), decay=1.0)


def transformers_adamw_in_subspace(slots: Sequence[Slot], hyper: Hyper, step: Kernel, add: Add) -> None:
    """`transformers_adamw_rule` in the space of a projection; `step` is AdamW by `undecayed_form`, `add` as below.

    It takes as many weights at once as make a tile of projected entries, so that small ones share its launches.
    """
    limit, waiting, entries = tile_size(slots[0].param.device), list[tuple[Slot, Slot]](), 0
    for slot in slots:
        inner = in_subspace(slot)
        waiting.append((slot, inner))
        entries += inner.param.numel()
        if entries >= limit or slot is slots[-1]:
            step([inner for _, inner in waiting], hyper)
            for outer, inner in waiting:
                add_back(outer, inner.param, 1 - hyper.lr * hyper.weight_decay, add)
            waiting, entries = [], 0


def in_subspace(slot: Slot) -> Slot:
    """The projected gradient, and an update that starts at zero in place of the parameter."""
    grad = slot.plan.projection.project(slot.state, slot.grad).contiguous()
    return slot._replace(param=torch.zeros_like(grad), grad=grad)


def add_back(slot: Slot, update: Tensor, decay: float | Tensor, add: Add) -> None:
    """The parameter times `decay` plus an update of the subspace."""
    projection = cast(Subspace, slot.plan.projection)
    if slot.plan.rounding.kind == "nearest" and not isinstance(decay, Tensor):
        if projection.add_back(slot.state, slot.param, update, decay):
            return
    add(slot, projection.project_back(slot.state, update), 1.0, decay)


def add(slot: Slot, update: Tensor, scale: float, decay: float | Tensor) -> None:
    """param <- decay * param + scale * update, for an update (float32) of the parameter's shape."""
    scratch, weight, update = Scratch(slot.param.device), slot.weight().map(at_least_1d), at_least_1d(update)
    for index in tiles(update.shape, tile_limit(slot), update.ndim):
        tile, factor = weight[index], broadcast_tile(decay, index) if isinstance(decay, Tensor) else decay
        tile.store(tile.load(scratch).mul_(factor).add_(update[index], alpha=scale))


def soap(slots: Sequence[Slot], hyper: Hyper, add: Add = add) -> None:
    """SOAP's elementwise part in tiles; its rotations are whole products."""
    scratch = Scratch(slots[0].param.device)
    for slot in map(Slot.clipped, slots):
        scalars, projection = transformers_adamw_form(slot, hyper), slot.plan.projection
        exp_avg = StoredMoment.of(slot, "exp_avg", at_least_1d)
        exp_avg_sq = StoredMoment.of(slot, "exp_avg_sq", at_least_1d, signed=False)
        grad, indices = at_least_1d(slot.grad), list(tiles(exp_avg.data.shape, tile_limit(slot), exp_avg.depth))
        stored = exp_avg.data.dtype == torch.float32
        moment = (
            exp_avg.data if stored else torch.empty(exp_avg.data.shape, dtype=torch.float32, device=scratch.device)
        )
        for index in indices:
            averaged = exp_avg[index].load(scratch).lerp_(as_float32(grad[index], "grad", scratch), 1 - hyper.beta1)
            if not stored:
                moment[index].copy_(averaged)  # the step takes the average before it is rounded
            exp_avg[index].store(averaged, scratch)
        update = projection.project(slot.state, moment.view(slot.param.shape))
        update = update.clone() if projection is FULL_SPACE else update
        del moment
        rotated = projection.project(slot.state, slot.grad).float()
        for index in indices:
            tile, g = exp_avg_sq[index], at_least_1d(rotated)[index]
            loaded = tile.load(scratch)
            if tile.absmax is not None:
                loaded.square_()
            loaded.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
            root = torch.sqrt(loaded, out=scratch.get("root", loaded.shape))
            at_least_1d(update)[index].div_(root.add_(scalars.eps))
            tile.store(loaded if tile.absmax is None else loaded.sqrt_(), scratch)
        del rotated
        update = projection.project_back(slot.state, update)
        if hyper.flags["normalize_grads"]:
            dims = matrix_dims(slot)
            norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True) if update.ndim else update.abs()
            update = update / (1e-30 + norm / math.sqrt(update.numel() / norm.numel()))
        add(slot, update, -scalars.step_size, scalars.decay)


def adafactor(slots: Sequence[Slot], hyper: Hyper, add: Add = add) -> None:
    """Adafactor with row and column means: one pass for them, one for the clipping, one for the update."""
    for slot in slots:
        step_size: float | Tensor = hyper.lr
        if hyper.flags["scale_parameter"]:
            dims = matrix_dims(slot)
            norm = torch.linalg.vector_norm(slot.weight().load(), dim=dims, keepdim=slot.plan.stacked)
            count = slot.param.numel() / norm.numel()
            step_size = hyper.lr * (norm / math.sqrt(count)).clamp(min=1e-3)
        decay = 1 - step_size * hyper.weight_decay
        if slot.plan.projection is FULL_SPACE:
            adafactor_pass(slot, hyper, step_size, decay)
        else:
            inner = in_subspace(slot)
            adafactor_pass(inner, hyper, step_size, 1.0)
            add_back(slot, inner.param, decay, add)


def matrix_dims(slot: Slot) -> tuple[int, ...]:
    """The axes that statistics are taken over."""
    return tuple(range(1 if slot.plan.stacked else 0, slot.param.ndim))


def adafactor_pass(slot: Slot, hyper: Hyper, step_size: float | Tensor, decay: float | Tensor) -> None:
    """param <- decay * param - exp_avg, for a parameter or an update in the space of a projection."""
    scratch, weight = Scratch(slot.param.device), Weight.of(slot, lambda tensor: tensor)
    row, col = slot.state["exp_avg_sq_row"].unsqueeze(-1), slot.state["exp_avg_sq_col"].unsqueeze(-2)
    indices = list(tiles(slot.param.shape, tile_limit(slot), slot.param.ndim))

    row_sum, col_sum = torch.zeros_like(row), torch.zeros_like(col)
    for index in indices:
        grad = weight[index].load_grad(scratch)
        square = torch.mul(grad, grad, out=scratch.get("square", grad.shape)).add_(1e-30)
        broadcast_tile(row_sum, index).add_(square.sum(-1, keepdim=True))
        broadcast_tile(col_sum, index).add_(square.sum(-2, keepdim=True))
    beta2 = 1 - slot.step ** hyper.flags["decay_rate"]
    row.mul_(beta2).add_(row_sum, alpha=(1 - beta2) / slot.param.shape[-1])
    col.mul_(beta2).add_(col_sum, alpha=(1 - beta2) / slot.param.shape[-2])
    row_factor, col_factor = (row / row.mean(-2, keepdim=True)).rsqrt(), col.rsqrt()

    def update(index: Index) -> Tensor:
        grad = weight[index].load_grad(scratch)
        out = torch.mul(grad, broadcast_tile(row_factor, index), out=scratch.get("update", grad.shape))
        return out.mul_(broadcast_tile(col_factor, index))

    dims = matrix_dims(slot)
    energy = torch.zeros_like(row.sum(dims, keepdim=True))
    for index in indices:
        u = update(index)
        broadcast_tile(energy, index).add_(u.mul_(u).sum(dims, keepdim=True))
    rms = (energy / (slot.param.numel() / energy.numel())).sqrt()
    factor = step_size / (rms / hyper.flags["clip_threshold"]).clamp(min=1.0)
    for index in indices:
        tile, scaled = weight[index], update(index).mul_(broadcast_tile(factor, index))
        shrink = broadcast_tile(decay, index) if isinstance(decay, Tensor) else decay
        param, exp_avg = tile.load(scaled, shrink, hyper.beta1, scratch)
        tile.store(param.sub_(exp_avg), exp_avg, scratch)


def adafactor_of_vectors(slots: Sequence[Slot], hyper: Hyper) -> None:
    """`adafactor_rule` where the second moment has one number per entry, as that of biases and norms does."""
    scratch = Scratch(slots[0].param.device)
    for slot in slots:
        weight, step_size = Weight.of(slot, at_least_1d), hyper.lr
        exp_avg_sq = StoredMoment.of(slot, "exp_avg_sq", at_least_1d, signed=False)
        if hyper.flags["scale_parameter"]:
            step_size = hyper.lr * root_mean_square(weight.param.load(), False).clamp(min=1e-3)
        grad, loaded, beta2 = (
            weight.load_grad(scratch),
            exp_avg_sq.load(scratch),
            1 - slot.step ** hyper.flags["decay_rate"],
        )
        rooted = exp_avg_sq.absmax is not None  # codes hold the square root
        if rooted:
            loaded.square_()
        loaded.mul_(beta2).add_(grad.square() + 1e-30, alpha=1 - beta2)
        update = grad * loaded.rsqrt()
        update.mul_(step_size / (root_mean_square(update, False) / hyper.flags["clip_threshold"]).clamp(min=1.0))
        param, exp_avg = weight.load(update, 1 - step_size * hyper.weight_decay, hyper.beta1, scratch)
        exp_avg_sq.store(loaded.sqrt_() if rooted else loaded, scratch)
        weight.store(param.sub_(exp_avg), exp_avg, scratch)


def adamw_mean(slots: Sequence[Slot], hyper: Hyper) -> None:
    """AdamW with one second-moment number per group of entries."""
    scratch = Scratch(slots[0].param.device)
    for slot in slots:
        moment = slot.plan.moments["exp_avg_sq"]
        assert isinstance(moment, GroupMean)
        stored = [s.broadcast(slot.state[moment.state_name("exp_avg_sq", s)]) for s in moment.segments]
        # 8-bit blocks run along the last axes. Where no segment splits those, each segment is a view of weights, codes
        # and scales alike and is stepped on its own; else the segments are taken inside decoded tiles.
        codec = slot.plan.codec
        row_axes = codec.row_axes if isinstance(codec, Int8Blockwise) else 1
        if all(segment.axis < slot.param.ndim - row_axes for segment in moment.segments):
            for segment, exp_avg_sq in zip(moment.segments, stored, strict=True):
                weight = Weight.of(slot, segment.view)
                groups = Groups(at_least_1d, exp_avg_sq, segment.mean_dims)
                step_means(weight, [groups], weight.depth, slot, hyper, scratch)
        else:
            parts = [Groups(s.view, v, s.mean_dims) for s, v in zip(moment.segments, stored, strict=True)]
            weight, split_axis = Weight.of(slot, at_least_1d), min(segment.axis for segment in moment.segments)
            step_means(weight, parts, min(split_axis, weight.depth), slot, hyper, scratch)


@dataclass
class Groups:
    """A part of a weight: the view of it, its stored means, which broadcast against that, and the averaged axes."""

    view: View
    exp_avg_sq: Tensor
    dims: tuple[int, ...]

    def __getitem__(self, index: Index) -> Groups:
        return Groups(self.view, broadcast_tile(self.exp_avg_sq, index), self.dims) if index else self


def step_means(
    weight: Weight, parts: Sequence[Groups], depth: int, slot: Slot, hyper: Hyper, scratch: Scratch
) -> None:
    """Step a weight of which the first `depth` axes may be cut: first along axes that no group crosses."""
    limit = tile_limit(slot)
    scalars = adamw_form(slot, hyper)
    crossed = {axis for part in parts for axis in part.dims}
    free = next((axis for axis in range(depth) if axis in crossed), depth)
    for chunk_index in tiles(weight.shape, limit, free):
        chunk = weight[chunk_index]
        groups = [part[chunk_index] for part in parts]
        inner = list(tiles(chunk.shape, limit, depth))
        grad = average_squares(chunk, groups, inner, hyper, scratch)
        roots = [part.exp_avg_sq.sqrt().add_(scalars.eps) for part in groups]
        for index in inner:
            tile = chunk[index]
            loaded = tile.load_grad(scratch) if grad is None else grad
            param, exp_avg = tile.load(loaded, scalars.decay, hyper.beta1, scratch)
            for part, root in zip(groups, roots, strict=True):
                part.view(param).addcdiv_(part.view(exp_avg), broadcast_tile(root, index), value=-scalars.step_size)
            tile.store(param, exp_avg, scratch)


def average_squares(
    chunk: Weight, groups: Sequence[Groups], inner: Sequence[Index], hyper: Hyper, scratch: Scratch
) -> Tensor | None:
    """Average the squared gradient into the stored means; returns the loaded gradient where it is a single tile."""
    totals = [torch.zeros_like(part.exp_avg_sq) for part in groups]
    for index in inner:
        grad = chunk[index].load_grad(scratch)
        for part, total in zip(groups, totals, strict=True):
            broadcast_tile(total, index).add_(square_sum(part.view(grad), part.dims, scratch))
    for part, total in zip(groups, totals, strict=True):
        count = part.view(chunk.grad).numel() // total.numel()
        part.exp_avg_sq.mul_(hyper.beta2).add_(total, alpha=(1 - hyper.beta2) / count)
    return grad if len(inner) == 1 else None


def square_sum(grad: Tensor, dims: tuple[int, ...], scratch: Scratch) -> Tensor:
    """Sum of squares over `dims`, kept. A square that is not finite counts as zero: it concerns its own entry only."""
    square = torch.mul(grad, grad, out=scratch.get("square", grad.shape))
    total = square.sum(dims, keepdim=True)
    if not known_finite(total):
        total = torch.nan_to_num(square, 0.0, 0.0, 0.0, out=square).sum(dims, keepdim=True)
    return total


def at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.view(1) if tensor.ndim == 0 else tensor
