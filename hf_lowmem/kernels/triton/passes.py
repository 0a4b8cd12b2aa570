"""The Triton kernels of rules whose step needs sums over the whole weight."""

from __future__ import annotations

from hf_lowmem.kernels.passes import InPasses
from hf_lowmem.kernels.triton.fadam import FADAM
from hf_lowmem.kernels.triton.micro_adam import MICRO_ADAM
from hf_lowmem.kernels.triton.smmf import SMMF
from hf_lowmem.kernels.triton.variants import triton_kernels


class TritonPasses(InPasses):
    """Steps in passes that Triton kernels take over contiguous weights."""

    takes_numbers_on_device = True

    def available(self) -> bool:
        return triton_kernels() is not None


TRITON_PASSES = TritonPasses(
    "triton_passes", {"smmf": SMMF, "micro_adam": MICRO_ADAM, "fadam": FADAM}, devices=("cuda",)
)
