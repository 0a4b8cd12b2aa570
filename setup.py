"""The compiled CPU kernels, an optional part of the install; all else is in setup.cfg."""

from __future__ import annotations

import runpy
import zlib
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Without -fno-math-errno and -fno-trapping-math, roots and selections are not vectorized; neither changes a result.
# Python's own -fwrapv costs the 8-bit kernels half of their speed.
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fno-wrapv"]


class BuildKernels(build_ext):
    """Compile with OpenMP, or for one thread where the compiler has none.

    No OpenMP library is linked: torch's is in every process that loads the kernels (see kernels/cpu/library.py).
    """

    def build_extension(self, ext: Any) -> None:
        try:
            ext.extra_compile_args = [*FLAGS, "-fopenmp"]
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args = [*FLAGS, "-fopenmp-simd"]
            super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # one for every Python, which does not import it


class AnyPythonWheel(bdist_wheel):
    """The kernels are loaded by ctypes: the wheel depends on the platform and on no Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


ROOT, KERNELS = Path(__file__).parent, Path("hf_lowmem/kernels")
SOURCES = sorted((ROOT / KERNELS / "cpu").glob("*.[ch]"))
COLUMNS = ROOT / KERNELS / "columns.py"
# A library that was built from other sources is not loaded.
CHECKSUM = zlib.crc32(b"".join(source.read_bytes() for source in [*SOURCES, COLUMNS]))
columns = runpy.run_path(str(COLUMNS))

setup(
    ext_modules=[
        Extension(
            "hf_lowmem.kernels.cpu._native",
            [str(source.relative_to(ROOT)) for source in SOURCES if source.suffix == ".c"],
            depends=[str(source.relative_to(ROOT)) for source in SOURCES],
            define_macros=[
                ("CHECKSUM", f"{CHECKSUM}u"),
                ("PART_COLUMNS", ", ".join(columns["CPU_PART"])),
                ("SCALAR_COLUMNS", ", ".join(columns["SCALARS"])),
            ],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
)
