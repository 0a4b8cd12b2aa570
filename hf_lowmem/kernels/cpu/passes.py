"""The compiled kernels of rules whose step needs sums over the whole weight."""

from __future__ import annotations

from hf_lowmem.kernels.cpu.fadam import FADAM
from hf_lowmem.kernels.cpu.h_fac import H_FAC
from hf_lowmem.kernels.cpu.library import library
from hf_lowmem.kernels.cpu.micro_adam import MICRO_ADAM
from hf_lowmem.kernels.cpu.smmf import SMMF
from hf_lowmem.kernels.passes import InPasses


class CpuPasses(InPasses):
    """Steps in passes that the library takes over contiguous weights."""

    def available(self) -> bool:
        return library() is not None


CPU_PASSES = CpuPasses(
    "cpu_passes", {"smmf": SMMF, "micro_adam": MICRO_ADAM, "fadam": FADAM, "h_fac": H_FAC}, devices=("cpu",)
)
