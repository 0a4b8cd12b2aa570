"""Products with a bfloat16 basis, as CUDA takes them: which they are, and how near they are to float32's.

Here the CPU takes them: a product of two bfloat16 numbers is exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.algorithms import CoapAdafactor, CoapAdamW, Soap
from hf_lowmem.projections import low_rank, precision
from hf_lowmem.projections.eigenbasis import outer_product
from hf_lowmem.projections.precision import product, product_dtype
from hf_lowmem.state import Projection

SPACES: dict[str, tuple[type, tuple[int, ...], dict[str, Any]]] = {
    "right": (CoapAdamW, (96, 64), {}),
    "left": (CoapAdamW, (64, 96), {}),
    "right, transposed": (CoapAdamW, (64, 96), {"transposed": True}),
    "stacked": (CoapAdafactor, (2, 96, 64), {"stacked": True}),
    "stacked, transposed": (CoapAdamW, (2, 96, 64), {"stacked": True, "transposed": True}),
    "Tucker": (CoapAdamW, (64, 50, 3, 1), {}),
    "SOAP": (Soap, (96, 64), {"betas": (0.9, 0.9)}),
    "SOAP, both sides": (Soap, (64, 64), {"betas": (0.9, 0.9), "sides": "both"}),
    "SOAP, stacked": (Soap, (2, 64, 96), {"betas": (0.9, 0.9), "stacked": True}),
}
every_space = pytest.mark.parametrize("space", SPACES)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every device multiplies bfloat16."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: True)


@pytest.fixture
def products(on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The CPU takes CUDA's products; returns the shapes that it was asked for."""
    asked: list[tuple[int, ...]] = []

    def emulated(left: Tensor, right: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        found = left.float() @ right.float()
        asked.append(tuple(found.shape))
        return found

    monkeypatch.setattr(precision, "bfloat16_product", emulated)
    return asked


def run(space: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor]:
    """A weight before and after three steps, with an epsilon under which no entry's sign decides its update."""
    cls, shape, own = SPACES[space]
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    param = nn.Parameter(start.clone())
    optimizer = cls([param], lr=1e-2, eps=1.0, **{"min_8bit_size": 0, **own, **options})
    for param.grad in grads:
        optimizer.step()
    return start, param.detach()


@every_space
def test_a_step_is_nearly_that_of_float32(space: str, request: pytest.FixtureRequest) -> None:
    start, expected = run(space, proj_bits=16)
    asked = request.getfixturevalue("products")
    _, actual = run(space, proj_bits=16)
    assert len(asked) >= 6, "to the space and back in each step"
    error = (actual - expected).norm() / (expected - start).norm()
    assert 1e-5 < error < 6e-3


@every_space
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_basis_is_not_rounded(space: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    _, expected = run(space, dtype)
    asked = request.getfixturevalue("products")
    _, actual = run(space, dtype)
    grams = 3 if SPACES[space][0] is Soap and dtype == torch.bfloat16 else 0  # gradients by themselves, which is exact
    assert len(asked) == grams * (2 if "both" in space else 1)
    assert torch.equal(actual, expected)


@every_space
def test_float64_weights_are_stepped_in_float64(
    space: str, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, actual = run(space, torch.float64, proj_bits=16)
    assert not products
    monkeypatch.undo()
    _, expected = run(space, torch.float64, proj_bits=16)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("space", ["right", "stacked, transposed", "Tucker"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_bfloat16_weight_is_rounded_once(
    space: str, rounding: str, products: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"proj_bits": 16, "state_bits": 8, "rounding": rounding, "weight_decay": 0.1}
    _, actual = run(space, torch.bfloat16, **options)
    monkeypatch.setattr(low_rank.LowRank, "add_back", lambda *args: False)  # a float32 product, and then the rounding
    straight = len(products)
    _, expected = run(space, torch.bfloat16, **options)
    directly = rounding == "nearest" and space != "Tucker"
    assert straight == len(products) - straight - (3 if directly else 0)
    same = (actual == expected).float().mean()
    assert same > 0.998 if directly else same == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_soaps_factors_are_exact(dtype: torch.dtype, products: list[Any]) -> None:
    """Gradients in bfloat16 lose nothing in a bfloat16 product; in float32 they are multiplied as they are."""
    grads = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for axis in (1, 2):
        outer = outer_product(grads, axis)
        unfolded = grads.double().movedim(axis, -1)
        torch.testing.assert_close(outer, (unfolded.mT @ unfolded).float(), rtol=1e-5, atol=1e-5)
    assert len(products) == (2 if dtype == torch.bfloat16 else 0)


def space_of(cls: type, shape: tuple[int, ...], **options: Any) -> Projection:
    return cls.make_plan(shape, **{**cls.plan_options(), **options}).projection


class Operators(TorchDispatchMode):
    """Which operators are called, with the dtypes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, Tensor):
            self.seen.append((func, found.dtype))
        return found

    def copies(self) -> list[torch.dtype]:
        return [dtype for func, dtype in self.seen if func is torch.ops.aten._to_copy.default]


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_cuda_is_asked_for(
    dtype: torch.dtype, shape: tuple[int, int], transposed: bool, stack: tuple[int, ...], on_cuda: None
) -> None:
    shape, aten = (*stack, *shape), torch.ops.aten
    space = space_of(CoapAdamW, shape, rank=4, transposed=transposed, stacked=bool(stack), proj_bits=16)
    with FakeTensorMode():
        state = {"proj": torch.empty(space.specs(shape)["proj"].shape, dtype=torch.bfloat16, device="cuda")}
        grad = torch.empty(shape, dtype=dtype, device="cuda")
        param = torch.empty_like(grad)
        with Operators() as projecting:
            update = space.project(state, grad)
        with Operators() as adding:
            added = space.add_back(state, param, update, 0.9)
        with Operators() as back:
            product = space.project_back(state, update)
    assert (update.shape, update.dtype) == (space.space(shape, "exp_avg")[0], torch.float32)
    assert (product.shape, product.dtype) == (shape, torch.float32)
    assert projecting.copies() == ([] if dtype == torch.bfloat16 else [torch.bfloat16]), (
        "no copy of a bfloat16 gradient"
    )
    multiply = (aten.bmm.dtype, torch.float32) if stack else (aten.mm.dtype, torch.float32)
    assert multiply in projecting.seen
    assert multiply in back.seen
    assert added
    if dtype == torch.bfloat16:
        assert (aten.baddbmm_.default if stack else aten.addmm_.default, torch.bfloat16) in adding.seen
        assert adding.copies() == [torch.bfloat16], "of the update, in its own space"


def test_the_decision() -> None:
    narrow, wide, double = (torch.zeros(2, 2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert product_dtype(narrow, narrow, narrow) == product_dtype(wide, narrow, narrow) == torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "multiplies_bfloat16", lambda device: True)
        assert product_dtype(wide, narrow, narrow) == product_dtype(narrow, wide, narrow) == torch.bfloat16
        assert product_dtype(narrow, wide, wide) == product_dtype(wide.half(), wide, wide) == torch.float32
        assert product_dtype(double, narrow, narrow) == product_dtype(narrow, double, double) == torch.float64


def test_which_devices_multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {0: (7, 5), 1: (8, 0), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    found = [precision.multiplies_bfloat16(torch.device("cuda", index)) for index in capability]
    assert found == [False, True, True]
    assert not precision.multiplies_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not precision.multiplies_bfloat16(torch.device("cuda", 2))


@pytest.mark.parametrize("allowed", [True, False])
def test_cublas_rounds_once_while_a_weight_is_written(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = allowed
    try:
        with precision.rounded_once():
            assert not matmul.allow_bf16_reduced_precision_reduction
        assert matmul.allow_bf16_reduced_precision_reduction == allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shapes", [((300, 70), (70, 200)), ((2, 300, 70), (2, 70, 200)), ((9, 5, 300, 70), (70, 200))]
)
def test_cudas_product_is_exact_but_for_its_sums(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    left, right = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    actual = product(left, right, right)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 256), (2, 256, 512)], ids=str)
def test_cuda_rounds_a_bfloat16_weight_once(shape: tuple[int, ...]) -> None:
    space = space_of(CoapAdamW, shape, rank=64, stacked=len(shape) == 3, proj_bits=16)
    state = {"proj": torch.randn(space.specs(shape)["proj"].shape, device="cuda").div(16).bfloat16()}
    update = torch.randn(space.space(shape, "exp_avg")[0], device="cuda").mul(1e-2).bfloat16().float()
    start = torch.randn(shape, device="cuda").bfloat16()
    expected = 0.999 * start.double() + space.project_back({"proj": state["proj"].double()}, update.double())
    actual = start.clone()
    assert space.add_back(state, actual, update, 0.999)
    assert (actual == expected.bfloat16()).float().mean() > 0.999
