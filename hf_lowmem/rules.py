"""Rules files: which axes the second moment of a parameter is averaged over, by name, against what was detected."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowmem.roles import canonical_name

Axes = tuple[int, ...]  # empty: the full second moment


@dataclass(frozen=True)
class Rules:
    """The content of a rules file; axes are in the tensor's own layout.

    Args:
        exact: parameter name -> axes.
        regex: (pattern, axes), searched in the name; the first that is found wins.
        unknown: axes for parameters of unknown role, or None for the algorithm's own choice.
    """

    exact: dict[str, Axes]
    regex: tuple[tuple[str, Axes], ...] = ()
    unknown: Axes | None = None

    def axes_of(self, names: Sequence[str], role: str) -> tuple[Axes, str] | None:
        """(axes, the rule that says so) for a parameter with these names (several if tied), or None."""
        for name in names:
            if name in self.exact:
                return self.exact[name], "rules file, by name"
        for pattern, axes in self.regex:
            if any(re.search(pattern, name) for name in names):
                return axes, f"rules file, {pattern!r}"
        if role == "unknown" and self.unknown is not None:
            return self.unknown, "rules file, unknown role"
        return None

    def check_used(self, names: Sequence[str]) -> None:
        """Raise ValueError if a name or pattern matches none of the model's parameters."""
        known = set(names)
        for name in self.exact:
            if name not in known:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
                raise ValueError(f"Rule {name!r} matches no parameter: did you mean {' or '.join(near) or names[0]}?")
        for pattern, _ in self.regex:
            if not any(re.search(pattern, name) for name in names):
                plain = re.sub(r"\\(.)|[$^]", r"\1", pattern)
                near = difflib.get_close_matches(plain, names, n=3, cutoff=0.1)
                raise ValueError(
                    f"Rule pattern {pattern!r} matches no parameter: names look like {' or '.join(near) or names[0]}."
                )


def load_rules(path: str) -> Rules:
    """Read a rules file.

    It holds `{"exact": {name: axes}, "regex": [[pattern, axes], ...], "unknown": axes}`, or a flat `{name: axes}`.
    Axes are a list of ints; null, [] and "full" keep the full second moment.

    Raises:
        ValueError: the file cannot be read, is not JSON, or does not have this form.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"rules={path!r} is not a readable JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"rules={path!r} must hold a JSON object, not {type(content).__name__}.")
    if not set(content) <= {"exact", "regex", "unknown"}:
        content = {"exact": content}
    regex = content.get("regex", [])
    exact = content.get("exact", {})
    if not isinstance(exact, dict) or not isinstance(regex, list):
        raise ValueError(f'rules={path!r}: "exact" must be an object and "regex" a list.')
    if not all(isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) for rule in regex):
        raise ValueError(f'rules={path!r}: "regex" must be a list of [pattern, axes] pairs.')
    for pattern, _ in regex:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rules={path!r}: {pattern!r} is not a regular expression: {error}.") from error
    return Rules(
        exact={canonical_name(name): _axes(value, name, path) for name, value in exact.items()},
        regex=tuple((pattern, _axes(value, pattern, path)) for pattern, value in regex),
        unknown=_axes(content["unknown"], "unknown", path) if "unknown" in content else None,
    )


def _axes(value: Any, rule: str, path: str) -> Axes:
    if value is None or value == "full":
        return ()
    if isinstance(value, list) and all(type(axis) is int for axis in value):
        return tuple(value)
    raise ValueError(f'rules={path!r}: {rule!r} has {value!r}, expected a list of axes, null or "full".')
