"""Fused steps, found by exact key.

A kernel takes parameters that share a key and updates them and their state in place. It computes what `update_rules`
defines; without one the rule itself runs, and the tests compare the two for every key.
"""

from functools import partial

from hf_lowmem.kernels import eager, gpu, native
from hf_lowmem.kernels.seam import Hyper, Kernel, KernelKey, Slot, key_of

_ANY = "any device"
_FORMS = {"adamw": eager.adamw_form, "transformers_adamw": eager.transformers_adamw_form}
KERNELS: dict[KernelKey, Kernel] = {}
for _codec in ("Float32", "BFloat16", "Int8Blockwise"):
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", _ANY)] = eager.signum
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", _ANY)] = eager.adamw_mean
    KERNELS[KernelKey("adafactor", "RowColMean", _codec, "FullSpace", _ANY)] = eager.adafactor
    for _space in ("FullSpace", "Eigenbasis"):
        KERNELS[KernelKey("soap", "Full", _codec, _space, _ANY)] = eager.soap
    for _rule, _form in _FORMS.items():
        KERNELS[KernelKey(_rule, "Full", _codec, "FullSpace", _ANY)] = partial(eager.adamw_full, form=_form)
    for _space in ("LowRank", "Tucker"):
        _in_subspace = eager.transformers_adamw_in_subspace
        KERNELS[KernelKey("transformers_adamw", "Full", _codec, _space, _ANY)] = _in_subspace
        KERNELS[KernelKey("adafactor", "RowColMean", _codec, _space, _ANY)] = eager.adafactor

for _codec in ("Float32", "BFloat16", "Int8Blockwise"):
    _signum = native.kernel(native.SIGNUM, eager.signum, eager.signum_form)
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", "cpu")] = _signum
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", "cuda")] = gpu.kernel(eager.signum, eager.signum_form)
    _mean = native.kernel(native.ADAMW_MEAN, eager.adamw_mean)
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", "cpu")] = _mean
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", "cuda")] = gpu.kernel(eager.adamw_mean)
    for _rule, _form in _FORMS.items():
        _full = partial(eager.adamw_full, form=_form)
        _on_cpu = partial(eager.adamw_full_float32, form=_form) if _codec == "Float32" else _full
        KERNELS[KernelKey(_rule, "Full", _codec, "FullSpace", "cpu")] = native.kernel(
            native.ADAMW_FULL, _on_cpu, _form
        )
        KERNELS[KernelKey(_rule, "Full", _codec, "FullSpace", "cuda")] = gpu.kernel(_full, _form)


def find_kernel(key: KernelKey) -> Kernel | None:
    """The kernel for `key`, one written for its device before one that runs on any; None if there is none."""
    return KERNELS.get(key) or KERNELS.get(key._replace(device=_ANY))


__all__ = ["KERNELS", "Hyper", "Kernel", "KernelKey", "Slot", "find_kernel", "key_of"]
