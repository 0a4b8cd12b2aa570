#!/usr/bin/env bash
# The tests on a fresh machine: makes .venv-test, installs the package and its tools there, and runs pytest.
#
#     bash scripts/test.sh [PYTEST ARGS]        all but the slow ones; for example: bash scripts/test.sh -x
#     bash scripts/test.sh -m slow              those that take more than about ten seconds each
#     bash scripts/test.sh -m gpu               what needs a GPU alone
#
# Each of up to four cores takes a file of tests at a time; `-n 0` runs them one after another. PYTHON picks the
# interpreter (3.10 or later). Tests marked `gpu` are left out, or skipped where they are asked for, where there is no
# CUDA device.
set -euo pipefail

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$folder/.venv-test"
wanted="$(cat "$folder"/{setup.cfg,pyproject.toml,constraints.txt} | cksum)"

if [[ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]]; then
    echo "Installing into $venv (once; takes a few minutes)"
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --constraint "$folder/constraints.txt" --editable "$folder[dev]"
    echo "$wanted" >"$venv/installed"
fi

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
markers="not slow"
if ! "$venv/bin/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    markers="not slow and not gpu"
    echo "There is no CUDA device here: tests marked gpu do not run"
fi
cd "$folder"
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile -m "$markers" "$@"
