"""How steps are taken: the backends, each of which computes what `update_rules` defines.

The order is that in which they are asked; see `registry.py`.
"""

from hf_lowmem.kernels.cpu.passes import CPU_PASSES
from hf_lowmem.kernels.cpu.step import CPU
from hf_lowmem.kernels.cpu.torch_fused import TORCH_FUSED
from hf_lowmem.kernels.in_place import IN_PLACE
from hf_lowmem.kernels.registry import BACKENDS, Backend, forced, register
from hf_lowmem.kernels.rule import COMPILED, RULE
from hf_lowmem.kernels.tiles import TILES
from hf_lowmem.kernels.triton.backend import TRITON
from hf_lowmem.kernels.triton.passes import TRITON_PASSES

# COMPILED is not among them, because it is taken where the option `compile` asks for it.
for _backend in (TRITON, TRITON_PASSES, TORCH_FUSED, CPU, CPU_PASSES, IN_PLACE, TILES, RULE):
    register(_backend)

__all__ = ["BACKENDS", "COMPILED", "RULE", "Backend", "forced", "register"]
