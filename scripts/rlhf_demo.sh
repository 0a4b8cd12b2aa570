#!/usr/bin/env bash
# The RLHF demo on a fresh machine: SFT, a reward model, GRPO and DPO with AdamW and with a low-memory optimizer.
# Installs as scripts/demo.sh does, whose notes hold here too.
#
#     bash scripts/rlhf_demo.sh [--scale small|base] [--optims NAME,NAME] [--seed N] [--output-dir DIR]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/demo.sh" --rlhf "$@"
