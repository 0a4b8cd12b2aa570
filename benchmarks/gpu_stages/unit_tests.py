"""Runs the project's own tests that need a GPU; on a CPU, it runs a few in Triton's interpreter."""

from __future__ import annotations

import os
import signal
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec

import pytest
from peers import ROOT

from gpu_stages.session import Session

FILES = (
    "tests/kernels/test_gpu_kernels.py",
    "tests/optimizer/test_capturable.py",
    "tests/golden/test_golden.py",
    "tests/optimizer/test_offload.py",
    "tests/golden/test_golden_projected.py",
    "tests/optimizer/test_rounding.py",
    "tests/projections/test_bfloat16_products.py",
)
MOST_FAILURES = 40


def run(session: Session) -> None:
    report = session.out / "tests.xml"
    report.unlink(missing_ok=True)
    arguments = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if session.on_gpu:
        arguments += [*FILES, "-m", "gpu and not compiler"]
        arguments += [f"--maxfail={MOST_FAILURES}"]
        arguments += ["-n", str(min(12, os.cpu_count() or 1))] if find_spec("xdist") else []
        arguments += ["--timeout=60"] if find_spec("pytest_timeout") else []
    else:
        arguments += [FILES[0], "-k", "one_code or an_update_is_added", "-n0", "--noconftest"]
    os.chdir(ROOT)
    # The alarm acts like Ctrl-C, after which pytest reports what has run.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(session.seconds_left, 1))
    status = pytest.main(arguments)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not report.exists():
        raise RuntimeError(f"pytest ended with status {status} and without a report")
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
    if status == pytest.ExitCode.INTERRUPTED:
        raise RuntimeError(f"only {counts['tests']} tests have run: no time was left for the others")
