"""Fused steps, found by what a plan is made of.

A kernel takes parameters that share a key and updates them and their state in place. It computes what `update_rules`
defines; the rule itself runs where there is none, which is logged once, and the tests compare the two for every key.
"""

from functools import cache, partial

from hf_lowmem.kernels import eager, gpu, native
from hf_lowmem.kernels.eager import Form
from hf_lowmem.kernels.gpu import TritonKernel
from hf_lowmem.kernels.seam import Clip, Hyper, Kernel, KernelKey, Slot, key_of
from hf_lowmem.log import get_logger

logger = get_logger(__name__)


def _adamw_full(codec: str, form: Form, device: str) -> Kernel:
    if device == "cpu":
        plain = eager.adamw_full_float32 if codec == "Float32" else eager.adamw_full
        return native.kernel(native.ADAMW_FULL, partial(plain, form=form), form)
    plain = partial(eager.adamw_full, form=form)
    return gpu.TritonKernel(plain, form) if device == "cuda" else plain


_ANY = "any device"
_FORMS = {"adamw": eager.adamw_form, "transformers_adamw": eager.transformers_adamw_form}
KERNELS: dict[KernelKey, Kernel] = {}
for _codec in ("Float32", "BFloat16", "Int8Blockwise"):
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", _ANY)] = eager.signum
    _signum = native.kernel(native.SIGNUM, eager.signum, eager.signum_form)
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", "cpu")] = _signum
    KERNELS[KernelKey("signum", "none", _codec, "FullSpace", "cuda")] = gpu.TritonKernel(
        eager.signum, eager.signum_form
    )
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", _ANY)] = eager.adamw_mean
    _mean = native.kernel(native.ADAMW_MEAN, eager.adamw_mean)
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", "cpu")] = _mean
    KERNELS[KernelKey("adamw", "GroupMean", _codec, "FullSpace", "cuda")] = gpu.TritonKernel(eager.adamw_mean)
    for _space in ("FullSpace", "Eigenbasis"):
        KERNELS[KernelKey("soap", "Full", _codec, _space, _ANY)] = eager.soap
        KERNELS[KernelKey("soap", "Full", _codec, _space, "cuda")] = partial(eager.soap, add=gpu.add)
    for _space in ("FullSpace", "LowRank", "Tucker"):
        KERNELS[KernelKey("adafactor", "RowColMean", _codec, _space, _ANY)] = eager.adafactor
        _in_place = partial(eager.adafactor, add=gpu.add)
        KERNELS[KernelKey("adafactor", "RowColMean", _codec, _space, "cuda")] = _in_place
    KERNELS[KernelKey("adafactor", "Full", _codec, "FullSpace", _ANY)] = eager.adafactor_of_vectors
    for _device in (_ANY, "cpu", "cuda"):
        for _rule, _form in _FORMS.items():
            _full = _adamw_full(_codec, _form, _device)
            KERNELS[KernelKey(_rule, "Full", _codec, "FullSpace", _device)] = _full
        _inner = _adamw_full(_codec, eager.undecayed_form, _device)
        _add = gpu.add if _device == "cuda" else eager.add
        _projected = partial(eager.transformers_adamw_in_subspace, step=_inner, add=_add)
        for _space in ("LowRank", "Tucker"):
            KERNELS[KernelKey("transformers_adamw", "Full", _codec, _space, _device)] = _projected


def find_kernel(key: KernelKey) -> Kernel | None:
    """The kernel for `key`, one written for its device before one that runs on any; None, logged once, without one."""
    if key.device not in ("cpu", "cuda", "meta"):
        warn_of_plain_torch(key.device)
    kernel = KERNELS.get(key) or KERNELS.get(key._replace(device=_ANY))
    if kernel is None:
        warn_of_no_kernel(key)
    return kernel


@cache
def warn_of_plain_torch(device: str) -> None:
    logger.warning(
        "Optimizer steps on %s are taken in plain torch and take several times longer than they could: there are "
        "kernels for CUDA and the CPU only.",
        device,
    )


@cache
def warn_of_no_kernel(key: KernelKey) -> None:
    logger.warning(
        "Optimizer steps by the rule %r with exp_avg_sq as %s, %s storage and %s%s on %s are taken as the rule is "
        "written, which takes several times longer and more temporary memory: there is no kernel for them.",
        key.rule,
        key.second_moment,
        key.codec,
        key.projection,
        f" ({key.others})" if key.others else "",
        key.device,
    )


@cache
def warn_of_capturable(device: str) -> None:
    logger.warning(
        "capturable=true makes optimizer steps on %s several times slower: leave it out where no CUDA graph captures "
        "them.",
        device,
    )


__all__ = [
    "KERNELS",
    "Clip",
    "Hyper",
    "Kernel",
    "KernelKey",
    "Slot",
    "TritonKernel",
    "find_kernel",
    "key_of",
    "warn_of_capturable",
    "warn_of_no_kernel",
]
