"""Stages of a session that go wrong, for benchmarks/test_gpu_session.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any


def works(session: Any) -> None:
    session.row("works", value=1.5)


def raises(session: Any) -> None:
    session.row("before it raises", value=1)
    raise ValueError("of a stage\nand more")


def hangs(session: Any) -> None:
    """With a child that hangs too; both process numbers are in the row."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    session.row("before it hangs", pids=[os.getpid(), child.pid])
    time.sleep(600)


def dies(session: Any) -> None:
    os._exit(7)
