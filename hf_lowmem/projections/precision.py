"""The precision of the products that apply a basis, and of those that compute one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, basis: Tensor) -> Tensor:
    """Return left @ right in float32, or in float64 if one of them is float64.

    Args:
        left: (..., k), or a stack of matrices if `right` is one.
        right: a matrix (k, n), or a stack of matrices.
        basis: whichever of the two is a basis, or the tensor that it is a view of.
    """
    dtype = product_dtype(left, right, basis)
    left, right = left.to(dtype), right.to(dtype)
    return bfloat16_product(left, right) if dtype == torch.bfloat16 else left @ right


def product_dtype(left: Tensor, right: Tensor, basis: Tensor) -> torch.dtype:
    """Return the dtype that the operands of a product with a basis are rounded to; the sums are at least float32.

    If the basis is bfloat16, rounding the other operand loses no more precision than the basis has lost already. A
    float32 basis is never rounded, whatever the dtype of the gradient.
    """
    if torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    return torch.bfloat16 if basis.dtype == torch.bfloat16 and multiplies_bfloat16(basis.device) else torch.float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 with float32 sums and torch returns these sums unrounded.

    torch for ROCm rounds them, and CUDA devices below compute capability 8.0 have no such units.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def bfloat16_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right of bfloat16 operands in float32."""
    found: Tensor
    if right.ndim == 3:
        found = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        found = torch.mm(left.flatten(0, -2), right, out_dtype=torch.float32).unflatten(0, left.shape[:-1])
    return found


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 on CUDA and bfloat16 on the CPU inside the context.

    With 11 or 8 significant bits a basis would lose its orthogonality.
    """
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
    """Make cuBLAS round a bfloat16 product only once inside the context.

    By default it may split a sum into partial sums, of which each, the added weight among them, is rounded.
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
