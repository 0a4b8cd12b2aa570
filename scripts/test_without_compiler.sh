#!/usr/bin/env bash
# The tests of steps on a machine without a C compiler, where the package has no compiled kernels.
#
#     bash scripts/test_without_compiler.sh [PYTEST ARGS]        after scripts/test.sh, whose packages it takes
#
# A copy of the tracked files is installed with all programs of the PATH but compilers, into a venv of its own.
set -euo pipefail

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/bin" "$scratch/clone"
(cd "$folder" && git ls-files -z | tar --null --files-from - --create) | tar --extract --directory "$scratch/clone"

IFS=: read -ra places <<<"$PATH"
for place in "${places[@]}"; do # what an earlier place has is kept
    find -H "$place" -mindepth 1 -maxdepth 1 -exec ln -s -t "$scratch/bin" {} + 2>/dev/null || true
done
find "$scratch/bin" \( -name '*cc' -o -name '*gcc*' -o -name '*[cg]++*' -o -name '*clang*' -o -name 'c[89]9*' \) -delete
unset CC CXX

"$folder/.venv-test/bin/python" -m venv --without-pip "$scratch/venv"
export PATH="$scratch/venv/bin:$scratch/bin"
site='import sysconfig; print(sysconfig.get_path("purelib"))'
"$folder/.venv-test/bin/python" -c "$site" >"$(python -c "$site")/tested.pth"

cd "$scratch/clone"
python -m pip install --verbose --no-deps --no-build-isolation --editable . >"$scratch/log" 2>&1 ||
    { cat "$scratch/log"; exit 1; }
grep 'building extension "hf_lowmem.kernels.cpu._native" failed' "$scratch/log"
python - 2>"$scratch/log" <<'END' || { cat "$scratch/log"; exit 1; }
from pathlib import Path

from hf_lowmem.kernels.cpu import library

assert Path(library.__file__).is_relative_to(Path.cwd()), library.__file__
assert library.library() is None
assert not list(Path.cwd().rglob("*.so"))
END
grep "install a C compiler" "$scratch/log"

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not gpu and not slow" -rs "$@" \
    tests/{golden,moments,codecs} tests/optimizer/test_{optimizer,steps,rounding}.py \
    tests/kernels/test_{cpu,triton,backends}.py
