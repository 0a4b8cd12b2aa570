"""The project's own tests that need a GPU, by pytest; on a CPU a few in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec

from peers import ROOT

from gpu_stages.session import Session

FILES = ("gpu_kernels", "capturable", "golden", "offload", "golden_projected", "rounding")
MOST_FAILURES = 40


def run(session: Session) -> None:
    report = session.out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = dict(os.environ)
    if session.on_gpu:
        command += [f"tests/test_{name}.py" for name in FILES] + ["-m", "gpu and not compiler"]
        command += [f"--maxfail={MOST_FAILURES}"]
        command += ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
        command += ["--timeout=60"] if find_spec("pytest_timeout") else []
    else:
        command += ["tests/test_gpu_kernels.py", "-k", "one_code or an_update_is_added", "-n0"]
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment)
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {done.returncode} and without a report")
    (suite,) = ElementTree.parse(report).getroot()
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    session.row("all", **counts, pytest_s=float(suite.get("time", 0)))
    for case in suite:
        for problem in (*case.findall("failure"), *case.findall("error")):
            said = (problem.get("message") or "").strip().splitlines() or [""]
            session.row(f"{case.get('classname')}::{case.get('name')}", said=said[0][:200])
    if counts["failures"] + counts["errors"]:
        raise RuntimeError(f"{counts['failures'] + counts['errors']} of {counts['tests']} tests have failed")
    if counts["tests"] == counts["skipped"]:
        raise RuntimeError("no test has run")
