"""Which tensors hold their entries in plain storage, so that a kernel may take their address."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is not a wrapper subclass, which only its own functions can read and write."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def is_stored(tensor: Tensor) -> bool:
    """Return whether a plain tensor's storage holds all of its entries; storage may have been freed or shortened."""
    if tensor.is_meta or tensor._is_zerotensor() or not tensor.numel():
        return True
    # A functional tensor reports the size of its storage but has none.
    return _end(tensor) <= tensor.untyped_storage().nbytes() and tensor.data_ptr() != 0


def is_dense(tensor: Tensor) -> bool:
    """Return whether the storage holds the tensor's entries as they are, so that a kernel may take their address.

    It does not in wrapper subclasses, sparse layouts, zero tensors without storage, views with a negative or conjugate
    bit, and tensors whose storage is missing.
    """
    if not is_plain(tensor) or tensor.layout is not torch.strided or tensor._is_zerotensor():
        return False
    return not tensor.is_neg() and not tensor.is_conj() and is_stored(tensor)


def _end(tensor: Tensor) -> int:
    """Return the byte offset in the storage at which the tensor's last entry ends."""
    return int((tensor.storage_offset() + last_entry(tensor)) * tensor.itemsize)


def last_entry(tensor: Tensor) -> int:
    """Return the number of entries from the tensor's first to its last in memory, both counted; 0 if it has none."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def densified(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a plain, contiguous copy of a tensor of any class.

    Raises:
        RuntimeError: the tensor's class cannot be copied to a dense tensor.
    """
    dense = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
    try:
        return dense.copy_(tensor)
    except Exception as error:
        raise RuntimeError(
            f"A {type(tensor).__name__} of shape {tuple(tensor.shape)} cannot be read as a dense tensor ({error}): "
            "give it to another optimizer."
        ) from error
