"""Which checkpoints were written to the end."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)


def last_whole_checkpoint(output_dir: str) -> str | None:
    """The newest `checkpoint-N` folder in `output_dir` that was written to the end, or None.

    The Trainer writes straight into `checkpoint-N`, with `trainer_state.json` last, so a run that is killed while it
    saves leaves a folder that cannot be resumed from. Each such folder is passed over with a warning that says why.

    Args:
        output_dir: the run's output folder.

    Raises:
        FileNotFoundError: when `output_dir` does not exist.
    """
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).iterdir()]
    steps = {int(match[1]): path for match, path in found if match and path.is_dir()}
    for step in sorted(steps, reverse=True):
        reason = _why_incomplete(steps[step])
        if reason is None:
            return str(steps[step])
        logger.warning("Passing over the incomplete checkpoint %s: %s.", steps[step], reason)
    return None


def _why_incomplete(folder: Path) -> str | None:
    """What shows that a checkpoint was not written to the end, or None where nothing does."""
    if not (folder / "trainer_state.json").is_file():
        return "trainer_state.json, which is written last, is missing"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in (".pt", ".pth", ".bin") and not _is_whole_torch_file(path):
            return f"{name} is cut short"
        if path.suffix == ".safetensors" and not _is_whole_safetensors(path):
            return f"{name} is cut short"
        if path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
            return f"{path.parent.relative_to(folder)} has no .metadata, which is written last"
        if path.name == "trainer_state.json" or path.name.endswith(".index.json"):
            try:
                content = json.loads(path.read_bytes())
            except ValueError:
                return f"{name} is cut short"
            missing = set(content.get("weight_map", {}).values()) - {file.name for file in path.parent.iterdir()}
            if missing:
                return f"{min(missing)}, which {name} lists, is missing"
    return None


def _is_whole_torch_file(path: Path) -> bool:
    """torch writes zip files, whose directory comes last; what does not start as a zip file is not judged."""
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) if start in (b"PK", b"P", b"") else True


def _is_whole_safetensors(path: Path) -> bool:
    """A safetensors file gives the length of its header, then where each tensor ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
