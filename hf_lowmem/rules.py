"""Rules files, which override by name what an optimizer does with a parameter."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lowmem.roles import ROLES, canonical_name

UNKNOWN = "unknown"  # the role whose rule a file may also give beside the others, as a fallback

ReadValue = Callable[[Any], Any]  # checks the value of a rule; raises ValueError with what was expected


@dataclass(frozen=True)
class Rules:
    """The content of a rules file. The algorithm defines what the values mean.

    Args:
        exact: the values by parameter name.
        regex: (pattern, value) pairs. The first pattern that is found in a parameter's name wins.
        role: the values by role, for parameters that neither a name nor a pattern finds, and for the parts of fused
            weights.
    """

    exact: dict[str, Any]
    regex: tuple[tuple[str, Any], ...] = ()
    role: dict[str, Any] = field(default_factory=dict)

    def find(self, names: Sequence[str], role: str) -> tuple[Any, str] | None:
        """Return (value, its rule) for a parameter, which has several names if it is tied, or None without a rule."""
        for name in names:
            if name in self.exact:
                return self.exact[name], "rules file, by name"
        for pattern, value in self.regex:
            if any(re.search(pattern, name) for name in names):
                return value, f"rules file, {pattern!r}"
        if role in self.role:
            return self.role[role], "rules file, by role"
        return None

    def check_used(self, names: Sequence[str], roles: Collection[str]) -> None:
        """Raise ValueError if a rule matches no parameter; that for unknown roles may, because it is a fallback.

        Args:
            names: the names of all parameters.
            roles: the roles of all parameters, and of the parts that a rule by role may reach.
        """
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
        for role in self.role:
            if role not in roles and role != UNKNOWN:
                raise ValueError(
                    f"The rule of the role {role!r} matches no parameter: the roles here are "
                    f"{', '.join(sorted(roles))}."
                )


def load_rules(path: str, read_value: ReadValue) -> Rules:
    """Read a rules file.

    The file holds `{"exact": {name: value}, "regex": [[pattern, value], ...], "role": {role: value},
    "unknown": value}` or a flat `{name: value}`. "unknown" stands for the role of that name.

    Raises:
        ValueError: the file cannot be read, is not JSON, or has another structure.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"rules={path!r} is not a readable JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"rules={path!r} must hold a JSON object, not {type(content).__name__}.")
    if not set(content) <= {"exact", "regex", "role", "unknown"}:
        content = {"exact": content}
    regex = content.get("regex", [])
    exact, by_role = content.get("exact", {}), content.get("role", {})
    if not (isinstance(exact, dict) and isinstance(by_role, dict) and isinstance(regex, list)):
        raise ValueError(f'rules={path!r}: each of "exact" and "role" must be an object, and "regex" a list.')
    if UNKNOWN in content:
        if UNKNOWN in by_role:
            raise ValueError(f'rules={path!r} has a rule for "unknown" twice, by itself and by role: keep one.')
        by_role = {**by_role, UNKNOWN: content[UNKNOWN]}
    for role in by_role:
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=3, cutoff=0.3)
            raise ValueError(
                f"rules={path!r}: {role!r} is no role: did you mean {' or '.join(near) or next(iter(ROLES))}?"
            )
    if not all(isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) for rule in regex):
        raise ValueError(f'rules={path!r}: "regex" must be a list of [pattern, value] pairs.')
    for pattern, _ in regex:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rules={path!r}: {pattern!r} is not a regular expression: {error}.") from error

    def read(value: Any, rule: str) -> Any:
        try:
            return read_value(value)
        except ValueError as error:
            raise ValueError(f"rules={path!r}: {rule!r} has {value!r}, expected {error}.") from None

    return Rules(
        exact={canonical_name(name): read(value, name) for name, value in exact.items()},
        regex=tuple((pattern, read(value, pattern)) for pattern, value in regex),
        role={role: read(value, role) for role, value in by_role.items()},
    )


def read_axes(value: Any, also: str = "") -> tuple[int, ...]:
    """Read the axes of the tensor that its second moment is averaged over; without axes it is kept in full.

    Args:
        also: what else a rule may be, for the message of the error.
    """
    if value is None or value == "full":
        return ()
    if isinstance(value, list) and all(type(axis) is int for axis in value):
        return tuple(value)
    others = ["a list of axes", *([also] if also else []), "null"]
    raise ValueError(f'{", ".join(others)} or "full"')
