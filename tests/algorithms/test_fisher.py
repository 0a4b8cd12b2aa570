"""FAdam and H-Fac where gradients are zero: LoRA's first step, idle rows, and experts that no token reached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem import kernels
from hf_lowmem.algorithms import FAdam, HFac
from hf_lowmem.moments import Full, GroupMean

BACKENDS = [(), ("in_place",), ("rule",)]


def stepped(cls: type, start: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    param = nn.Parameter(start.clone())
    optimizer = cls([param], lr=1e-3, **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("cls", "decay"), [(FAdam, 0.1), (HFac, 0.0)])
def test_a_first_gradient_of_zeros_moves_nothing(
    cls: type, decay: float, bits: int, backends: Any, force: Any
) -> None:
    """LoRA's A has one, because B is zero."""
    if backends:
        force(*backends)
    start, grads = torch.randn(8, 64), [torch.zeros(8, 64), torch.randn(8, 64)]
    options = {"weight_decay": decay, "state_bits": bits, "min_8bit_size": 0}
    still, _ = stepped(cls, start, grads[:1], **options)
    assert torch.equal(still, start)
    moved, _ = stepped(cls, start, grads, **options)
    assert moved.isfinite().all()
    assert 0 < (moved - start).abs().max() < 0.05


@pytest.mark.parametrize("backends", BACKENDS)
def test_fadam_decays_no_entry_without_fisher_information(backends: Any, force: Any) -> None:
    if backends:
        force(*backends)
    start = torch.randn(20, 64)
    grads = [torch.randn(20, 64).index_fill_(0, torch.arange(10), 0.0) for _ in range(5)]
    masked, _ = stepped(FAdam, start, grads, weight_decay=0.1)
    assert torch.equal(masked[:10], start[:10])
    erased, _ = stepped(FAdam, start, grads, weight_decay=0.1, mask_decay=False)
    assert (erased[:10] - start[:10]).abs().mean() > 1e-4


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize(("cls", "shape"), [(FAdam, (3, 8, 64)), (FAdam, (3, 64)), (HFac, (3, 8, 64))])
def test_the_experts_of_a_stack_are_stepped_as_weights_of_their_own(
    cls: type, shape: tuple[int, ...], backends: Any, force: Any
) -> None:
    """One of them has no token at first."""
    if backends:
        force(*backends)
    start, grads = torch.randn(shape), [torch.randn(shape) * torch.tensor(1e-3).pow(n) for n in range(3)]
    grads[0][1] = 0
    stacked, _ = stepped(cls, start, grads, stacked=True, weight_decay=0.1)
    alone = [
        stepped(cls, start[number], [grad[number] for grad in grads], weight_decay=0.1)[0]
        for number in range(shape[0])
    ]
    torch.testing.assert_close(stacked, torch.stack(alone), rtol=1e-6, atol=1e-7)


def test_the_correction_of_h_fac_is_larger_by_the_previous_momentum() -> None:
    """The larger part of the step is the same, and a constant gradient has no correction."""
    start, grads = torch.randn(8, 64), [torch.randn(8, 64) for _ in range(4)]
    updated, previous = (
        stepped(HFac, start, grads, momentum_in_correction=which)[0] for which in ("updated", "previous")
    )
    assert 0 < (updated - previous).abs().max() < 0.2 * (updated - start).abs().max()
    updated, previous = (
        stepped(HFac, start, grads[:1] * 3, momentum_in_correction=which)[0] for which in ("updated", "previous")
    )
    torch.testing.assert_close(updated, previous, rtol=0, atol=1e-6)


def test_what_h_fac_keeps_depends_on_the_axes() -> None:
    def kept(shape: tuple[int, ...], stacked: bool) -> set[type]:
        options = HFac.plan_options() | {"stacked": stacked}
        return {type(moment) for moment in HFac.make_plan(shape, **options).moments.values()}

    assert kept((8,), False) == kept((), False) == kept((3, 8), True) == {Full}
    assert kept((8, 4), False) == kept((8, 4, 3, 3), False) == kept((3, 8, 4), True) == {GroupMean}


@pytest.mark.parametrize("backend", ["cpu_passes", "in_place", "rule"])
@pytest.mark.parametrize("cls", [FAdam, HFac])
def test_a_gradient_whose_square_overflows_harms_no_weight(cls: type, backend: str, force: Any) -> None:
    if not kernels.BACKENDS[backend].available():
        pytest.skip("the compiled kernels are missing")
    force(backend)
    param = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer = cls([param], lr=1e-3)
    for number in range(6):
        param.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(number))
        if number == 2:
            param.grad[3, 5] = 1e20
        optimizer.step()
    assert param.abs().max() < 0.05
