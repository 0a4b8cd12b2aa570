#!/usr/bin/env bash
# The demo on a fresh machine: makes .venv-demo, installs the package there, and runs `hf-lowmem demo`.
#
#     bash scripts/demo.sh [--steps N] [--optims NAME,NAME] [--output-dir DIR] ...
#
# PYTHON picks the interpreter (3.10 or later). Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# installs a much smaller torch.
set -euo pipefail

folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$folder/.venv-demo"
wanted="$(cat "$folder"/{setup.cfg,pyproject.toml,constraints.txt} | cksum)"

if [[ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]]; then
    echo "Installing into $venv (once; takes a few minutes)"
    "${PYTHON:-python3}" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --constraint "$folder/constraints.txt" --editable "$folder[trl,plots]"
    echo "$wanted" >"$venv/installed"
fi

# Nothing is downloaded from here on.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/hf-lowmem" demo "$@"
