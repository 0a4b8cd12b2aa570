"""The CSV of measured ratios, in the columns of SlimAdam's authors."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from hf_lowmem.names import canonical_name
from hf_lowmem.snr.choice import HEAD, ROW_COL

COLUMNS = ("step", "key", "shape", "compress_dims", "snr", "mean_sqr", "var")

Reduction = tuple[int, ...] | str  # the axes that are averaged over, ROW_COL or HEAD

# Authors' files may lack the quotes around (0, 1), so a comma inside brackets is no separator.
_FIELD = re.compile(r'"((?:[^"]|"")*)"|((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\[\]]*\]|[^,"])*)')


@dataclass
class Measured:
    """The ratios of one weight, or of one part of a fused weight.

    Args:
        key: the canonical name of the weight; that of a part has the part in brackets: `c_attn.weight[query]`.
        shape: the shape of the weight or of the part.
        ratios: the known ratios by reduction and by step. Only that of the factored estimate may be infinite.
        head_entries: the number of entries of one head, which the reduction "head" averages; 0 if it is not known.
    """

    key: str
    shape: tuple[int, ...]
    ratios: dict[Reduction, dict[int, float]] = field(default_factory=dict)
    head_entries: int = 0

    @property
    def name(self) -> str:
        """Return the name of the weight."""
        return self.key.partition("[")[0]

    @property
    def part(self) -> str:
        """Return the part of a fused weight, "" if it is not fused."""
        return self.key.partition("[")[2].removesuffix("]")

    @property
    def ndim(self) -> int:
        """Return the number of axes, from the ratios too, because other programs' files may leave the shape out."""
        axes = (axis for how in self.ratios if isinstance(how, tuple) for axis in how)
        return max(len(self.shape), 1 + max(axes, default=-1))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def write_rows(path: Path, rows: Iterable[tuple[object, ...]]) -> None:
    """Append the rows of a measurement to the CSV in one write, so that a run that is killed leaves no half of it."""
    text = "".join(map(_line, rows))
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def keep_until(path: Path, step: int) -> None:
    """Leave in the CSV what was measured up to `step`, where a run begins or goes on; make the file if it is missing.

    Raises:
        ValueError: there is such a file, and it is no CSV of ratios.
    """
    kept = [fields for fields in _rows(path) if _step(path, fields) <= step] if path.exists() and step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".tmp")
    lines = [_line(COLUMNS), *(_line(fields[column] for column in COLUMNS) for fields in kept)]
    written.write_text("".join(lines), encoding="utf-8", newline="")
    os.replace(written, path)


def read_ratios(path: str | Path) -> dict[str, Measured]:
    """Return what a CSV of ratios holds by key, as this package or SlimAdam's authors write it.

    Raises:
        ValueError: the file cannot be read, lacks a column, holds no ratio, or has a line that cannot be read.
    """
    path = Path(path)
    found: dict[str, Measured] = {}
    for fields in _rows(path):
        key = canonical_name(fields["key"])
        measured = found.setdefault(key, Measured(key, _shape(path, fields)))
        how, entries = _reduction(path, fields)
        measured.head_entries = entries or measured.head_entries
        step, ratio = _step(path, fields), _ratio(path, fields)
        ratios = measured.ratios.setdefault(how, {})
        if math.isfinite(ratio) or (how == ROW_COL and ratio > 0):
            ratios[step] = ratio
    if not found:
        raise ValueError(f"{str(path)!r} holds no ratios: was the run stopped before its first measurement?")
    return found


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV by column, with their number in the file as "line".

    A last line that was cut off when its run was killed is left out, and so are the first lines of files that were
    appended to this one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a readable CSV of signal-to-noise ratios: {error}.") from error
    lines = text.replace("\ufeff", "").splitlines()  # files with a byte order mark may have been joined
    head = [name.strip() for name in _split(lines[0])] if lines else []
    missing = [column for column in COLUMNS[:5] if column not in head]
    if missing:
        raise ValueError(
            f"{str(path)!r} is no CSV of signal-to-noise ratios: its first line must name the columns "
            f"{','.join(COLUMNS)}, but lacks {', '.join(missing)}."
        )
    for number, line in enumerate(lines[1:], 2):
        values = _split(line)
        if not line.strip() or [value.strip() for value in values] == head:
            continue
        if len(values) == len(head):
            yield {**dict.fromkeys(COLUMNS, ""), **dict(zip(head, values, strict=True)), "line": str(number)}
        elif number < len(lines) or text.endswith("\n"):
            raise ValueError(
                f"Line {number} of {str(path)!r} is {line!r}, expected the {len(head)} columns {','.join(head)}: "
                "correct or delete it."
            )


def _split(line: str) -> list[str]:
    values, at = [], 0
    while at <= len(line):
        match = _FIELD.match(line, at)
        assert match is not None  # it also matches nothing
        quoted, plain = match.groups()
        values.append(plain if quoted is None else quoted.replace('""', '"'))
        if match.end() < len(line) and line[match.end()] != ",":
            return []
        at = match.end() + 1
    return values


def _line(values: Iterable[object]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(list(values))
    return text.getvalue()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _shape(path: Path, fields: dict[str, str]) -> tuple[int, ...]:
    """Return the shape of a row's weight, () where the file leaves it out."""
    if re.fullmatch(r"(torch\.Size)?[\d\s,()\[\]]*|None", fields["shape"].strip()):
        return _integers(fields["shape"])
    raise _fault(path, fields, "shape", "sizes such as (64, 128), or nothing")


def _reduction(path: Path, fields: dict[str, str]) -> tuple[Reduction, int]:
    """Return what a row's ratio is of, and the number of entries of a head if it is that of heads."""
    text = fields["compress_dims"].strip()
    if text == ROW_COL:
        return ROW_COL, 0
    if match := re.fullmatch(rf"{HEAD} (\d+)", text):
        return HEAD, int(match[1])
    if re.fullmatch(r"[(\[]?\s*\d+(\s*,\s*\d+)*\s*,?\s*[)\]]?", text):
        return _integers(text), 0
    raise _fault(path, fields, "compress_dims", f"axes such as (0, 1), {ROW_COL!r}, or {HEAD!r} and its entries")


def _step(path: Path, fields: dict[str, str]) -> int:
    try:
        return int(float(fields["step"]))
    except (ValueError, OverflowError):
        raise _fault(path, fields, "step", "a number") from None


def _ratio(path: Path, fields: dict[str, str]) -> float:
    """Return the ratio of a row, NaN where there was none."""
    text = fields["snr"].strip()
    try:
        return math.nan if text in ("", "None") else float(text)
    except ValueError:
        raise _fault(path, fields, "snr", "a number, or nothing") from None


def _fault(path: Path, fields: dict[str, str], column: str, expected: str) -> ValueError:
    return ValueError(
        f"Line {fields['line']} of {str(path)!r} has the {column} {fields[column]!r}, expected {expected}: measure "
        "again, or correct the file."
    )
