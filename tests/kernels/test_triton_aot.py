"""What the compiler makes of the Triton kernels, for GPUs that need not be here: registers, spills, wide loads, and
instructions per entry, which bound the 8-bit kernels where bytes bound the others."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, FactoredAdamW, SlimAdamW
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.columns import Geometry
from hf_lowmem.kernels.parts import elementwise, geometries
from hf_lowmem.kernels.triton import fadam, fadam_kernels, micro_adam, micro_adam_kernels, smmf, smmf_kernels
from hf_lowmem.kernels.triton import step as kernels
from hf_lowmem.kernels.triton.tuning import current_arch, tile_for, warps_of
from hf_lowmem.kernels.triton.variants import Layout, Variant, layout_of, triton_kernels, warps
from tests.support.slow import slow

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIGNATURE = {"parts": "*i64", "all_scalars": "*fp64", "part_numbers": "*i32"}
SIGNATURE |= dict.fromkeys(("grad_scale", "group_means", "sums", "totals"), "*fp32")
SIGNATURE |= {"weights": "*bf16", "comps": "*i16", "updates": "*fp32", "decays": "*fp32"}  # of `add`
SIGNATURE |= {"scale": "fp32", "key": "i32", "entries": "i32"}
# Of SMMF's kernels.
FACTORS = [f"{side}{sums}{sq}" for side in ("row", "col") for sums in ("", "_sums") for sq in ("", "_sq")]
SIGNATURE |= dict.fromkeys(FACTORS, "*fp32") | dict.fromkeys(("signs", "positives"), "*u8")
SIGNATURE |= {"grads": "*bf16", "numbers": "*fp64", "n": "i32", "m": "i32", "rows_each": "i32"}
# Of FAdam's kernels, whose moments are 8-bit codes or floats.
SIGNATURE |= dict.fromkeys(("fim_scales", "average_scales", "energies", "natural_sums", "decay_sums"), "*fp32")
# Of MicroAdam's.
SIGNATURE |= {"index": "*i16", "codes": "*u8"} | dict.fromkeys(("values", "lows", "highs"), "*bf16")
SIGNATURE |= dict.fromkeys(("errors", "powers", "first", "second"), "*fp32") | {"start": "i64", "share": "fp32"}
SIGNATURE |= dict.fromkeys(("decay", "lr", "eps", "first_correction", "second_correction", "alpha"), "fp32")
SIGNATURE |= dict.fromkeys(("stride", "columns", "length", "kept", "block_size"), "i32")
CODES, FLOATS = (tl.uint8, 256), (tl.float32, None)


# An A100 has its own tiles; the fast tests compile for an H100 alone.
each_arch = pytest.mark.parametrize("arch", [slow(80), 90])


def means(cls: Any, shape: tuple[int, ...], **options: Any) -> Geometry:
    plan = cls.make_plan(shape, **{**cls.plan_options(), **options})
    (found,) = geometries(plan.moments["exp_avg_sq"], shape, 1)
    return found


# The shapes of a large model: (second moment, geometry) of a launch.
SHAPES = {
    "signum": ("none", elementwise(1 << 24)),
    "adamw": ("full", elementwise(1 << 24)),
    "rows": ("group", means(SlimAdamW, (4096, 4096), axes=(1,))),
    "packed rows": ("group", means(SlimAdamW, (4096, 1024), axes=(1,))),
    "short rows": ("group", means(SlimAdamW, (50000, 64), axes=(1,))),
    "wide rows": ("group", means(SlimAdamW, (4096, 8192), axes=(1,))),
    "long rows": ("group", means(SlimAdamW, (4096, 14336), axes=(1,))),
    "heads": ("group", means(AdamMini, (4096, 4096), axes=(1,), rows_per_block=128)),
    "columns": ("column", means(SlimAdamW, (4096, 4096), axes=(0,))),
    "factored": ("column", means(FactoredAdamW, (4096, 4096))),
}
# Instructions per entry of floats and of 8-bit codes, the most of triton 3.6 and 3.9 on both GPUs; bfloat16 weights,
# rounded to the nearest. An H200 has time for 7.8 per byte that must move: 171 and 78 for "adamw", 109 and 62 for the
# others.
MEASURED = {
    "signum": (20.1, 45.1),
    "adamw": (28.5, 76.0),
    "rows": (22.6, 49.2),
    "packed rows": (26.4, 51.9),
    "short rows": (25.9, 48.7),
    "wide rows": (22.9, 48.7),
    "long rows": (31.0, 56.4),
    "heads": (19.2, 44.6),
    "columns": (23.1, 49.4),
    "factored": (33.0, 58.0),
}
ROOM = 1.12  # for other compilers
MORE_TO_ROUND = 23


def variant(
    shape: str, moment: tuple[Any, int | None], weight: Any, rounding: str = "nearest", arch: int = 90
) -> Variant:
    second, geometry = SHAPES[shape]
    layout, cut = tiles(geometry, second, moment[1], arch)
    assert layout.aligned
    factored = shape == "factored"
    return Variant(weight, moment[0], rounding, second, *cut, 16, factored=factored, limited=factored)


def tiles(geometry: Geometry, second: str, block: int | None, arch: int) -> tuple[Layout, tuple[Any, ...]]:
    """The layout of a part, and what a variant has of it."""
    tile = tile_for(f"{second} 8-bit" if block else second, arch)
    layout = layout_of(geometry, second, block, tile)
    return layout, (layout.means, layout.nest, layout.block, layout.blocks, layout.groups, tile.per_thread)


def constants(v: Variant) -> Variant:
    """As `variants.compiled_for`, which needs a device."""
    return Variant(*map(tl.constexpr, v))


class Report:
    """What one kernel was compiled to."""

    def __init__(self, kernel: Any, folder: Path, arch: int, warps: int, **constants: Any) -> None:
        names = kernel.arg_names
        moments = dict.fromkeys(("fims", "averages"), constants.pop("moments", "*fp32"))
        signature = {name: (SIGNATURE | moments).get(name, "constexpr") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        even = [name for name, kind in signature.items() if kind.startswith("*") or name in ("entries", "n", "m")]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
        target, options = GPUTarget("cuda", arch, 32), dict(num_warps=warps, enable_fp_fusion=True)
        compiled = triton.compile(ASTSource(kernel, signature, places, aligned), target=target, options=options)
        (folder / "cubin").write_bytes(compiled.asm["cubin"])
        usage, sass = self._run("cuobjdump", "-res-usage", folder), self._run("nvdisasm", "-c", folder)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert found
        self.registers, self.stack, _, self.local = map(int, found.groups())
        self.instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
        self.count = sum(name != "NOP" for name in self.instructions)
        self.spills = sum(name.startswith(("LDL", "STL")) for name in self.instructions)

    @staticmethod
    def _run(tool: str, flag: str, folder: Path) -> str:
        done = subprocess.run([TOOLS / tool, flag, folder / "cubin"], check=True, capture_output=True, text=True)
        return done.stdout

    def accesses(self, *names: str) -> list[int]:
        """Bits of each access to global memory."""
        widths = [
            re.search(r"\.(?:U|S)?(8|16|64|128)\b", name) for name in self.instructions if name.startswith(names)
        ]
        return [int(found[1]) if found else 32 for found in widths]


def check(report: Report, v: Variant) -> float:
    """No spill to speak of, and wide loads and stores: 16 bytes of floats, 8 of codes. Returns instructions per entry.

    For float32 weights of columns, triton 3.6 spills two registers once, by which an SM holds 16 warps instead of 12.
    """
    assert report.spills <= 2
    per_thread = v.block * v.blocks // (32 * warps(v))
    wide = sum(width for width in report.accesses("LDG", "STG") if width >= 64)
    bits = 3 * v.weight.primitive_bitwidth + 2 * v.moment.primitive_bitwidth
    assert wide >= per_thread * bits
    assert not [width for width in report.accesses("LDG", "STG") if width < 32]
    assert 128 in report.accesses("LDG")
    assert 128 in report.accesses("STG")
    return report.count / per_thread


def most_registers(v: Variant, arch: int) -> int:
    """With 128 an SM holds 16 warps, with 168 it holds 12; triton 3.6 takes up to 152 for an A100.

    It also does for factored moments in 8 bits, of which later versions take 128.
    """
    return 168 if v.second == "full" or v.factored or arch == 80 else 128


@each_arch
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_stay_in_their_budget(shape: str, arch: int, tmp_path: Path) -> None:
    for moment, measured in zip((FLOATS, CODES), MEASURED[shape], strict=True):
        v = variant(shape, moment, tl.bfloat16, arch=arch)
        report = Report(kernels.step, tmp_path, arch, warps(v), v=constants(v))
        per_entry = check(report, v)
        figures = f"{shape} sm_{arch} {v.moment}: {per_entry:.1f} instructions per entry, {report.registers} registers"
        assert per_entry <= ROOM * measured, figures
        assert report.registers <= most_registers(v, arch), figures


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_clipping_takes_an_instruction_per_entry(shape: str, tmp_path: Path) -> None:
    for moment, measured in zip((FLOATS, CODES), MEASURED[shape], strict=True):
        v = variant(shape, moment, tl.bfloat16)._replace(clip=True)
        twice = 2 if v.means == "loop" else 1
        per_entry = check(Report(kernels.step, tmp_path, 90, warps(v), v=constants(v)), v)
        assert per_entry <= ROOM * measured + twice


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for shape, (second, _) in SHAPES.items() if second in ("group", "column")])
def test_a_limit_of_updates_takes_a_few_instructions(shape: str, tmp_path: Path) -> None:
    """The other variants are factored with a limit, and averaged without one."""
    for moment, measured in zip((FLOATS, CODES), MEASURED[shape], strict=True):
        usual = variant(shape, moment, tl.bfloat16)
        v = usual._replace(limited=not usual.limited)
        per_entry = check(Report(kernels.step, tmp_path, 90, warps(v), v=constants(v)), v)
        assert per_entry <= ROOM * measured + (6 if v.limited else 0), (v.moment, per_entry)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [FLOATS, (tl.bfloat16, None), CODES], ids=lambda moment: str(moment[0]))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_compiles_without_spills(shape: str, moment: tuple[Any, int | None], tmp_path: Path) -> None:
    most = ROOM * MEASURED[shape][moment is CODES] + MORE_TO_ROUND
    weights = [(tl.float32, "nearest"), *product((tl.bfloat16, tl.float16), ("nearest", "stochastic", "kahan"))]
    for (weight, rounding), arch in product(weights, (80, 90)):
        v = variant(shape, moment, weight, rounding, arch)
        per_entry = check(Report(kernels.step, tmp_path, arch, warps(v), v=constants(v)), v)
        assert per_entry <= most, (weight, rounding, arch, per_entry)


@each_arch
@pytest.mark.parametrize("shape", ["heads", "columns", "factored"])
def test_the_passes_before_a_step(shape: str, arch: int, tmp_path: Path) -> None:
    v = variant(shape, FLOATS, tl.bfloat16, arch=arch)._replace(moment=None, rounding="")
    assert v.means == "before"
    sums = Report(kernels.sum_squares, tmp_path, arch, warps(v), TOTALS=True, v=constants(v))
    assert (sums.stack, sums.local) == (0, 0)
    assert 128 in sums.accesses("LDG")
    combine = Report(kernels.combine, tmp_path, arch, 1, v=constants(v))
    assert (combine.stack, combine.local) == (0, 0)
    if v.factored:
        mean = Report(kernels.mean_of_rows, tmp_path, arch, 8)
        assert (mean.stack, mean.local) == (0, 0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_adding_an_update_is_one_pass(rounding: str, tmp_path: Path) -> None:
    tile = tile_for("add", 90)
    count = warps_of(tile.entries, tile.per_thread)
    report = Report(kernels.add, tmp_path, 90, count, ROUNDING=rounding, TILE=tile.entries)
    assert (report.stack, report.local) == (0, 0)
    assert report.registers <= 128
    per_thread, comp = tile.per_thread, 32 if rounding == "kahan" else 0
    assert sum(report.accesses("LDG", "STG")) - 32 == per_thread * (16 + 32 + 16 + comp)  # and the decay
    assert report.count / per_thread <= 30


def test_weights_that_are_not_aligned_compile(tmp_path: Path) -> None:
    v = variant("rows", CODES, tl.bfloat16)._replace(align=1)
    report = Report(kernels.step, tmp_path, 90, warps(v), v=constants(v))
    assert (report.stack, report.local) == (0, 0)
    assert torch.finfo(torch.bfloat16).bits in report.accesses("LDG")


RAGGED = {
    "adamw": ("full", elementwise(1152 * 4304, 4304)),
    "signum": ("none", elementwise(1153 * 4303, 4303)),
    "depthwise": ("full", elementwise(3072 * 4, 4)),
    "rows": ("group", means(SlimAdamW, (1152, 4304), axes=(1,))),
    "columns": ("column", means(SlimAdamW, (1152, 4304), axes=(0,))),
    "factored": ("column", means(FactoredAdamW, (1152, 4304))),
}


@each_arch
@pytest.mark.parametrize("shape", RAGGED)
def test_rows_that_end_in_a_short_block_compile_without_spills(shape: str, arch: int, tmp_path: Path) -> None:
    second, geometry = RAGGED[shape]
    layout, cut = tiles(geometry, second, 256 if geometry.columns > 256 else geometry.columns, arch)
    align = 16 if layout.aligned else 1
    factored = shape == "factored"
    v = Variant(tl.bfloat16, tl.uint8, "stochastic", second, *cut, align, False, True, factored, limited=factored)
    report = Report(kernels.step, tmp_path, arch, warps(v), v=constants(v))
    assert (report.stack, report.local) == (0, 0)
    assert (128 in report.accesses("LDG")) == layout.aligned


class NoDevice:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # not one whose kernels other tests run

    def get_current_stream(self, device: int) -> int:
        return 0


def test_what_the_optimizer_launches_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a launch but the launch itself: each is compiled for the arguments that it is given."""
    compiled: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(self.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    triton_kernels.cache_clear()
    current_arch.cache_clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    try:
        layers = [torch.nn.Embedding(64, 512), torch.nn.Linear(512, 512), torch.nn.LayerNorm(512)]
        model = torch.nn.ModuleList(layers).bfloat16()
        for options in ({"axes": (1,)}, {"axes": (0,)}):
            weights = [param for param in model.parameters() if param.ndim == 2]
            optimizer = SlimAdamW(weights, lr=1e-3, state_bits=8, rounding="stochastic", **options)
            for param in weights:
                param.grad = torch.ones_like(param)
            with forced("triton"):
                optimizer.step()
        factored = FactoredAdamW([layers[1].weight], lr=1e-3)
        with forced("triton"):
            factored.step()
        vectors = hf_lowmem.build_optimizer(layers[2], "lowmem_adamw", lr=1e-3)
        layers[2].weight.grad = torch.ones(512).bfloat16()
        with forced("triton"):
            vectors.step()
        captured = SlimAdamW([layers[1].weight], lr=1e-3, axes=(0,), capturable=True)
        with forced("triton"):
            captured.clip_grad_norm_(1.0)
            captured.step()
    finally:
        triton_kernels.cache_clear()
        current_arch.cache_clear()
    assert compiled[:5] == ["step", "sum_squares", "combine", "step", "sum_squares"]
    assert compiled[5:9] == ["combine", "mean_of_rows", "step", "step"]
    assert compiled[9:] == ["write_grads", "sum_squares", "write_grads", "combine", "step"]


@each_arch
def test_smmf_goes_over_a_weight_without_spills(arch: int, tmp_path: Path) -> None:
    sizes = {"ROWS": smmf.TILE // smmf.COLUMNS, "COLUMNS": smmf.COLUMNS}
    flags = {"ROUNDING": "nearest", "CLIP": False, "MASK_ZEROS": True}
    for whole_bytes in (True, False):
        report = Report(smmf_kernels.go_over, tmp_path, arch, 4, **flags, **sizes, WHOLE_BYTES=whole_bytes)
        assert (report.spills, report.stack) == (0, 0)
    packing = Report(smmf_kernels.pack, tmp_path, arch, 4, BYTES=smmf.PACKED)
    assert (packing.spills, packing.stack) == (0, 0)


@each_arch
@pytest.mark.parametrize("bits", [32, 8])
def test_fadam_goes_over_a_weight_without_spills(bits: int, arch: int, tmp_path: Path) -> None:
    sizes = {"BLOCKS": fadam.TILE // 256, "BLOCK": 256, "CLIP": False}
    flags = {"ROUNDING": "nearest", "DECAYS": True, "MASK_DECAY": True, "moments": "*u8" if bits == 8 else "*fp32"}
    reports = [Report(fadam_kernels.sum_gradient, tmp_path, arch, fadam.WARPS, **sizes)]
    for kernel in (fadam_kernels.sum_quotients, fadam_kernels.update):
        reports.append(Report(kernel, tmp_path, arch, fadam.WARPS, **sizes, **flags))
    assert all((report.spills, report.stack) == (0, 0) for report in reports)


@each_arch
def test_micro_adam_spills_nothing(arch: int, tmp_path: Path) -> None:
    flags = {"BUCKET": 64, "SIZE": micro_adam.SIZE}
    constants: dict[Any, dict[str, Any]] = {
        micro_adam_kernels.accumulate: {**flags, "CLIP": True},
        micro_adam_kernels.encode: {"BUCKET": 64, "WIDTH": 32, "ROWS": micro_adam.SIZE // 64},
        micro_adam_kernels.add_window: {},
        micro_adam_kernels.update: {**flags, "FOLLOWS": False, "ALPHA": True, "ROUNDING": "kahan"},
        micro_adam_kernels.shrink: flags,
    }
    for kernel, values in constants.items():
        report = Report(kernel, tmp_path, arch, 4, **values)
        assert (report.spills, report.stack) == (0, 0), kernel
        assert kernel is not micro_adam_kernels.add_window or "BAR.SYNC.DEFER_BLOCKING" in report.instructions
