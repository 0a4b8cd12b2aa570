"""Fused steps, found by exact key.

A kernel takes parameters that share a key and updates them and their state in place. It computes what `update_rules`
defines; without one the rule itself runs, and the tests compare the two for every key.
"""

from hf_lowmem.kernels import eager
from hf_lowmem.kernels.seam import Hyper, Kernel, KernelKey, Slot, key_of

_ANY = "any device"
KERNELS: dict[KernelKey, Kernel] = {}
for _codec in ("Float32", "BFloat16", "Int8Blockwise"):
    KERNELS[KernelKey("signum", "none", _codec, _ANY)] = eager.signum
    KERNELS[KernelKey("adamw", "Full", _codec, _ANY)] = eager.adamw_full
    KERNELS[KernelKey("adamw", "GroupMean", _codec, _ANY)] = eager.adamw_mean
KERNELS[KernelKey("adamw", "Full", "Float32", "cpu")] = eager.adamw_full_float32


def find_kernel(key: KernelKey) -> Kernel | None:
    """The kernel for `key`, one written for its device before one that runs on any; None if there is none."""
    return KERNELS.get(key) or KERNELS.get(key._replace(device=_ANY))


__all__ = ["KERNELS", "Hyper", "Kernel", "KernelKey", "Slot", "find_kernel", "key_of"]
