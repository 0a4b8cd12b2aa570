"""The precision of products with a basis, and of the products that make a basis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, basis: Tensor) -> Tensor:
    """left @ right as float32, or as float64 where one of them is; `right` is a matrix, or both are stacks of them.

    Args:
        basis: the one of them that is a basis, or a view of it.
    """
    dtype = product_dtype(left, right, basis)
    left, right = left.to(dtype), right.to(dtype)
    return bfloat16_product(left, right) if dtype == torch.bfloat16 else left @ right


def product_dtype(left: Tensor, right: Tensor, basis: Tensor) -> torch.dtype:
    """Return the dtype that the operands of a product with a basis are rounded to; its sums are float32 at least.

    Where the basis is bfloat16 the other operand loses no more by rounding than the basis has lost already. A float32
    basis is not rounded, whatever the gradient's dtype is.
    """
    if torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    return torch.bfloat16 if basis.dtype == torch.bfloat16 and multiplies_bfloat16(basis.device) else torch.float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 and adds in float32, and torch returns the float32 sums.

    ROCm's torch does not return them, and CUDA devices before 8.0 have no such units.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def bfloat16_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of bfloat16 as float32."""
    found: Tensor
    if right.ndim == 3:
        found = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        found = torch.mm(left.flatten(0, -2), right, out_dtype=torch.float32).unflatten(0, left.shape[:-1])
    return found


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 on CUDA and no bfloat16 on the CPU inside: their eleven or eight bits cost a basis its orthogonality."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


@contextmanager
def rounded_once() -> Iterator[None]:
    """Inside, cuBLAS rounds a product that it writes as bfloat16 only once.

    By default it may split a sum into parts that it rounds one by one, the weight among them.
    """
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    if not (allowed and getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", True)):
        yield
        return
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed
