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
    kept = [fields for fields in _rows(path) if int(float(fields["step"])) <= step] if path.exists() and step else []
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".tmp")
    lines = [_line(COLUMNS), *(_line(fields[column] for column in COLUMNS) for fields in kept)]
    written.write_text("".join(lines), encoding="utf-8", newline="")
    os.replace(written, path)


def read_ratios(path: str | Path) -> dict[str, Measured]:
    """Return what a CSV of ratios holds by key, as this package or SlimAdam's authors write it.

    Raises:
        ValueError: the file cannot be read, lacks a column, holds no ratio, or one of what is no reduction.
    """
    found: dict[str, Measured] = {}
    for fields in _rows(Path(path)):
        key = canonical_name(fields["key"])
        measured = found.setdefault(key, Measured(key, _integers(fields["shape"])))
        text, ratio = fields["compress_dims"].strip(), _number(fields["snr"])
        how: Reduction = text.split()[0] if text.startswith((ROW_COL, HEAD)) else _integers(text)
        if not how:
            raise ValueError(
                f"{str(path)!r} has the compress_dims {text!r}, expected axes such as (0, 1), {ROW_COL!r}, or "
                f"{HEAD!r} and its entries: measure again, or correct the file."
            )
        if how == HEAD:
            measured.head_entries = math.prod(_integers(text))
        ratios = measured.ratios.setdefault(how, {})
        if math.isfinite(ratio) or (how == ROW_COL and ratio > 0):
            ratios[int(float(fields["step"]))] = ratio
    if not found:
        raise ValueError(f"{str(path)!r} holds no ratios: was the run stopped before its first measurement?")
    return found


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV by column; a line that was cut off when its run was killed is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a readable CSV of signal-to-noise ratios: {error}.") from error
    head = [name.strip() for name in _split(lines[0])] if lines else []
    missing = [column for column in COLUMNS[:5] if column not in head]
    if missing:
        raise ValueError(
            f"{str(path)!r} is no CSV of signal-to-noise ratios: its first line must name the columns "
            f"{','.join(COLUMNS)}, but lacks {', '.join(missing)}."
        )
    for line in lines[1:]:
        values = _split(line)
        if len(values) == len(head):
            yield {**dict.fromkeys(COLUMNS, ""), **dict(zip(head, values, strict=True))}


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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "None", or nothing
        return math.nan
