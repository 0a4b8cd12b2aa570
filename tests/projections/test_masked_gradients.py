"""Which masks of a gradient keep a weight's entries still under a projection, and that the others are said once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW, Soap
from hf_lowmem.projections import basis

MASKS = ("rows", "columns", "scattered", "crossings", "few", "none")
COAP = {"update_interval": 3, "reproject_factor": 2}
SOAP = {"precondition_frequency": 3, "eps": 1e-8}


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    basis._warn_of_mask.cache_clear()
    yield
    basis._warn_of_mask.cache_clear()


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor:
    """One where a gradient passes; rows and columns are a convolution's channels, and a stack's last two axes."""
    mask = torch.ones(shape)
    stack = (slice(None),) * (len(shape) == 3)
    some_rows, some_columns = (slice(0, size, 3) for size in shape[len(stack) :][:2])
    if kind == "rows":
        mask[(*stack, some_rows)] = 0
    elif kind == "columns":
        mask[(*stack, slice(None), some_columns)] = 0
    elif kind == "crossings":
        mask[(*stack, some_rows, some_columns)] = 0
    elif kind in ("scattered", "few"):
        share = 0.25 if kind == "scattered" else 0.002
        mask[torch.rand(shape, generator=torch.Generator().manual_seed(5)) < share] = 0
    return mask


def largest_masked_move(cls: type, mask: Tensor, steps: int = 8, **options: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(mask.shape, generator=generator))
    start = param.detach().clone()
    optimizer = cls([param], lr=1e-2, weight_decay=0.0, **{**(SOAP if cls is Soap else COAP), **options})
    for _ in range(steps):
        param.grad = torch.randn(mask.shape, generator=generator) * mask
        optimizer.step()
    moved = (param.detach() - start).abs()
    assert moved[mask == 1].median() > 0
    return moved[mask == 0].max().item() if (mask == 0).any() else 0.0


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("cls", "shape", "options"),
    [
        (CoapAdamW, (48, 24), {}),
        (CoapAdamW, (24, 48), {}),
        (CoapAdamW, (48, 24), {"transposed": True}),
        (CoapAdafactor, (3, 24, 48), {"stacked": True}),
        (CoapAdamW, (40, 30, 3, 3), {"update_interval": 100}),
        (CoapAdafactor, (64, 50, 3, 1), {"update_interval": 100}),
        (Soap, (48, 24), {}),
        (Soap, (3, 24, 48), {"stacked": True}),
        (Soap, (24, 24), {"sides": "both"}),
    ],
    ids=str,
)
def test_masked_entries_that_move_are_said_and_others_are_not(
    cls: type, shape: tuple[int, ...], options: dict[str, Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A few zeros, as a narrow dtype makes them, are not taken for a mask, though they move as well."""
    largest = largest_masked_move(cls, mask_of(kind, shape), **options)
    said = [record.message for record in caplog.records if "If a mask is meant to keep" in record.message]
    if kind == "few":
        assert not said
    else:
        assert len(said) == (largest > 1e-6), largest
    if kind in ("scattered", "crossings"):
        assert largest > 1e-3


def test_it_is_said_once_of_many_weights(caplog: pytest.LogCaptureFixture) -> None:
    params = [nn.Parameter(torch.zeros(16, 8)) for _ in range(3)]
    optimizer = CoapAdamW(params, **COAP)
    for step in range(8):
        for param in params:
            param.grad = torch.randn(16, 8) * (mask_of("scattered", (16, 8)) if step >= 3 else 1)  # pruned in mid-run
        optimizer.step()
    assert len(caplog.records) == 1


def test_an_expert_without_tokens_is_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    for cls, own in ((CoapAdamW, COAP), (Soap, SOAP)):
        param = nn.Parameter(torch.zeros(3, 16, 8))
        optimizer = cls([param], stacked=True, **own)
        for step in range(8):
            param.grad = torch.randn(3, 16, 8)
            param.grad[step % 3] = 0
            optimizer.step()
    assert not caplog.records
