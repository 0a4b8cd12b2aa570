"""When COAP's basis changes, what becomes of the moments, and which gradients leave it as it is."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW
from hf_lowmem.projections import low_rank, tucker
from tests.support.coap_runs import (
    BOTH,
    CONV,
    CONV_1,
    EACH,
    LEFT,
    RIGHT,
    SOON,
    assert_orthonormal,
    bases,
    build,
    gradients,
    moment,
    projected,
    random,
    run,
    same,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- when the basis changes -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (2, *RIGHT), CONV, CONV_1], ids=str)
def test_schedule(cls: type, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[int]] = defaultdict(list)
    call = 0

    def count(module: Any, function: str) -> None:
        original = getattr(module, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            made[function].append(call)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)

    for function in ("first_basis", "recomputed_basis", "corrected_basis"):
        count(low_rank, function)
    for function in ("decompose", "corrected_factors"):
        count(tucker, function)
    param, optimizer = build(cls, random(*shape), stacked=len(shape) == 3, **SOON)
    before, changed = bases(optimizer.init_state(param)), []
    for call, grad in enumerate(gradients(shape, 14), start=1):
        (after,) = [bases(state) for state in train(param, optimizer, [grad])]
        if not same(before, after):
            changed.append(call)
        before = after
    assert changed == [1, 4, 7, 10, 13]
    if len(shape) == 4:
        assert made == {"decompose": [1, 7, 13], "corrected_factors": [4, 10]}
    else:
        assert made == {"first_basis": [1], "recomputed_basis": [7, 13], "corrected_basis": [4, 10]}


def nearness(shape: tuple[int, ...], align: str) -> list[tuple[Tensor, Tensor]]:
    """(old, new) of each basis at the first recompute."""
    param, optimizer = build(CoapAdamW, random(*shape), align=align, rank_ratio=2, **EACH)
    history = [bases(state) for state in train(param, optimizer, gradients(shape, 4))]
    return list(zip(history[2], history[3], strict=True))


@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_recomputed_basis_is_matched_to_the_old_one(shape: tuple[int, ...]) -> None:
    by = {align: nearness(shape, align) for align in ("none", "sign", "procrustes")}
    flipped = 0
    for (old, free), (_, signed), (_, turned) in zip(*by.values(), strict=True):
        assert (signed * old).sum(-1).min() >= 0
        assert torch.equal(signed.abs(), free.abs())
        flipped += int(((free * old).sum(-1) < 0).sum())
        torch.testing.assert_close(turned.mT @ turned, free.mT @ free, rtol=0, atol=1e-5)  # spans the same
        agreement = turned @ old.mT  # symmetric and not negative: no rotation of the rows comes nearer
        torch.testing.assert_close(agreement, agreement.mT, rtol=0, atol=1e-5)
        assert torch.linalg.eigvalsh(agreement).min() > -1e-5
        assert (turned - old).norm() <= (signed - old).norm() <= (free - old).norm()
    assert flipped, "no row had the other sign: this shows nothing"


# -- moments over a change of basis ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("call", [4, 7])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (2, 96, 64), CONV], ids=str)
@pytest.mark.parametrize("restore", [False, True, "reference"])
def test_moments_over_a_change_of_basis(
    cls: type, bits: int, call: int, shape: tuple[int, ...], restore: bool | str
) -> None:
    stored = {"state_bits": bits, "min_8bit_size": 0, "proj_bits": 32}
    options = {"rank_ratio": 2, "restore_state": restore, "eq5_scale": "rms", "stacked": len(shape) == 3, **SOON}
    param, optimizer = build(cls, random(*shape), **options, **stored)
    grads = gradients(shape, call)
    for _ in train(param, optimizer, grads[:-1]):
        pass
    names = ["exp_avg"] + (["exp_avg_sq"] if cls is CoapAdamW else [])
    before = {name: moment(optimizer, param, name) for name in names}
    old = bases(optimizer.state[param])
    for _ in train(param, optimizer, grads[-1:]):
        pass
    new = bases(optimizer.state[param])

    def carried(value: Tensor, name: str) -> Tensor:
        rotations = [p_old @ p_new.mT for p_old, p_new in zip(old, new, strict=True)]
        root = restore == "reference" and name == "exp_avg_sq"
        if not restore:
            return value
        if name == "exp_avg_sq" and not root:
            rotations = [rotation.square() for rotation in rotations]
        value = value.sqrt() if root else value
        if len(shape) == 4:
            core = value.view(len(new[0]), len(new[1]), *shape[2:])
            value = torch.einsum("abhw,ac,bd->cdhw", core, *rotations).flatten(1)
        else:
            value = value @ rotations[0] if shape[-2] >= shape[-1] else rotations[0].mT @ value
        return value.square() if root else value

    if cls is CoapAdafactor:  # its average is of finished updates: zero, once its learning rate is
        repeat_param, repeat = build(cls, random(*shape), **options, **stored)
        for _ in train(repeat_param, repeat, grads[:-1]):
            pass
        repeat.param_groups[0]["lr"] = 0.0
        for _ in train(repeat_param, repeat, grads[-1:]):
            pass
        expected, found = 0.9 * carried(before["exp_avg"], "exp_avg"), moment(repeat, repeat_param, "exp_avg")
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=(0.02 if bits == 8 else 1e-6) * expected.abs().max()
        )
        return
    g = projected(optimizer, param, grads[-1])
    for name, beta, value in (("exp_avg", 0.9, g), ("exp_avg_sq", 0.95, g.square())):
        expected = beta * carried(before[name], name) + (1 - beta) * value
        found = moment(optimizer, param, name)
        if name == "exp_avg_sq":  # stored as its root
            expected, found = expected.sqrt(), found.sqrt()
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=(0.02 if bits == 8 else 1e-5) * expected.abs().max()
        )


# -- gradients that a basis cannot be made of -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_zero_first_gradient_defers_the_basis(cls: type, shape: tuple[int, ...]) -> None:
    start, zero = random(*shape), torch.zeros(shape)
    param, optimizer = build(cls, start, **SOON)
    for state in train(param, optimizer, [zero] * 4):  # call 4 would be Eq. 5's
        assert state["proj_count"] == 0
        assert not any(basis.any() for basis in bases(state))
    torch.testing.assert_close(param.detach(), start * (1 - 1e-2 * 0.1) ** 4)
    for state in train(param, optimizer, gradients(shape, 1)):
        assert state["proj_count"] == 1
        for basis in bases(state):
            assert_orthonormal(basis)
    assert (param.detach() - start).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("shape", [RIGHT, LEFT])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_waits_for_a_gradient_of_its_own(cls: type, shape: tuple[int, int], transposed: bool) -> None:
    grads = gradients((4, *shape), 7)
    grads[0][[1, 3]] = 0
    grads[1][1] = 0
    for grad in grads:
        grad[3] = 0
    param, optimizer = build(cls, random(4, *shape), stacked=True, transposed=transposed, **SOON)
    history = [(state["proj"].clone(), int(state["proj_count"])) for state in train(param, optimizer, grads)]
    assert [count for _, count in history] == [2, 2, 3, 3, 3, 3, 3]
    assert not history[1][0][[1, 3]].any()
    assert torch.equal(history[0][0][[0, 2]], history[2][0][[0, 2]])
    assert_orthonormal(history[2][0][:3])
    assert not history[-1][0][3].any()
    torch.testing.assert_close(param.detach()[3], random(4, *shape)[3] * (1 - 1e-2 * 0.1) ** 7)


@BOTH
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("call", [4, 7])
@pytest.mark.parametrize("shape", [RIGHT, LEFT, (2, *RIGHT), CONV], ids=str)
def test_a_gradient_that_is_zero_or_not_finite_keeps_the_basis(
    cls: type, bad: float, call: int, shape: tuple[int, ...]
) -> None:
    grads = gradients(shape, call)
    spoilt = grads[-1][0] if len(shape) == 3 else grads[-1]  # of the stack, the first matrix only
    spoilt.view(-1)[0 if bad else slice(None)] = bad
    param, optimizer = build(cls, random(*shape), stacked=len(shape) == 3, restore_state=True, **SOON)
    history = [bases(state) for state in train(param, optimizer, grads)]
    assert all(basis.isfinite().all() for basis in history[-1])
    if len(shape) == 3:
        assert torch.equal(history[-1][0][0], history[-2][0][0])
        assert not torch.equal(history[-1][0][1], history[-2][0][1])
        assert param[1].isfinite().all()
    else:
        assert same(history[-1], history[-2])
    assert bad or param.isfinite().all()


def test_a_first_gradient_that_is_not_finite_defers_the_basis() -> None:
    grad = random(*RIGHT)
    grad[0, 0] = math.nan
    _, state = run(CoapAdamW, random(*RIGHT), [grad])
    assert not state["proj"].any()
    assert state["proj_count"] == 0


@pytest.mark.parametrize("size", [1e20, 3e37])
@pytest.mark.parametrize("call", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", [RIGHT, LEFT, CONV], ids=str)
def test_a_finite_gradient_whose_square_is_not_leaves_the_weight_finite(
    shape: tuple[int, ...], call: int, size: float
) -> None:
    """As AdamW does, to which such entries are lost but not the weights."""
    grads = gradients(shape, 8)
    grads[call - 1] = size * grads[call - 1].clamp(-1, 1)
    adamw, _ = run(torch.optim.AdamW, random(*shape), grads)
    assert adamw.isfinite().all()
    weight, state = run(CoapAdamW, random(*shape), grads, **SOON)
    assert all(basis.isfinite().all() for basis in bases(state))
    assert weight.isfinite().all()
