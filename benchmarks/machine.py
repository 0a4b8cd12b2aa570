"""Describes the circumstances of a result: the machine, the versions, the commit and the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, ROOT, version_of

PACKAGES = dict.fromkeys(("torch", "transformers", "triton", *(peer.distribution for peer in PEERS.values())))


def describe_machine(device: str, commit: str | None = None) -> dict[str, Any]:
    """Describe this machine and run; `commit` is for copies of the tree that git does not know."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := version_of(name))},
        "commit": commit or commit_of_the_tree(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit_of_the_tree() -> str:
    """Return the commit that is checked out, and whether it has been changed; "unknown" without git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "hf_lowmem", "benchmarks/*.py")
        return git("rev-parse", "HEAD") + (", with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
