"""Cases of a test that the fast tests leave out, because others stand for them there."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return one case of `pytest.mark.parametrize`, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def fast_only(cases: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """Return all cases, of which those that `fast` does not contain are marked slow."""
    return [case if case in fast else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
