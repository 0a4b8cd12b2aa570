"""The command that rebuilds the kernels, after a compiler or another version of the source was installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

CLONE = Path(__file__).parents[3]


def reinstall_command() -> str:
    """Return the pip command that installs the package from where it came.

    pip keeps the wheels that it builds, one without kernels too, and would install that again.
    """
    return f"pip install --no-cache-dir --force-reinstall --no-deps {_origin()}"


def _origin() -> str:
    if (CLONE / "setup.py").is_file():
        return f"-e {shlex.quote(str(CLONE))}"
    try:
        recorded = json.loads(distribution("hf_lowmem").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        recorded = {}
    if "vcs_info" in recorded:
        vcs = recorded["vcs_info"]
        return shlex.quote(f"{vcs['vcs']}+{recorded['url']}@{vcs['commit_id']}")
    return shlex.quote(recorded.get("url", "hf_lowmem"))
