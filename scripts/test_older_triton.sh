#!/usr/bin/env bash
# A selection of the Triton kernels' tests under the older Triton that comes with torch 2.11: in the interpreter, and
# compiled ahead of time.
#
#     bash scripts/test_older_triton.sh [PYTEST ARGS]        after scripts/test.sh, whose packages it takes
#
# Triton, and the last numpy that its interpreter works with, are installed once, beside .venv-test.
set -euo pipefail

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
version=3.6.0
python="$folder/.venv-test/bin/python"
site="$folder/.venv-triton-$version"

if [[ ! -e "$site/installed" ]]; then
    rm -rf "$site"
    "$python" -m pip install --quiet --no-deps --target "$site" "triton==$version" "numpy<2.4"
    touch "$site/installed"
fi

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$site"
"$python" - "$version" <<'END'
import sys

import numpy
import triton

assert triton.__version__ == sys.argv[1], f"triton {triton.__version__} from {triton.__file__}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}")
END

cd "$folder"
TRITON_INTERPRET=1 "$python" -m pytest -n auto --maxprocesses 4 --noconftest -p no:cacheprovider \
    tests/kernels/test_gpu_kernels.py -k "map or odd_sizes or share_a_tile or walk_along or update_is_added or bad_gradient or replayed" "$@"
"$python" -m pytest -n auto --maxprocesses 4 -p no:cacheprovider tests/kernels/test_triton_aot.py \
    -m "not slow" -k "(budget or before_a_step or short_block) and 90 or optimizer_launches or adding or aligned" "$@"
