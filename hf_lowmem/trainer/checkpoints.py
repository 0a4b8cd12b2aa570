"""Which checkpoints are complete, so that the Trainer can resume from them."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

from hf_lowmem.log import get_logger

logger = get_logger(__name__)

TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|training_args\.bin")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
NEVER_BLANK = ("vocab.txt", "merges.txt", ".metadata")  # and all weights and tokenizer models


def last_whole_checkpoint(output_dir: str) -> str | None:
    """Return the newest `checkpoint-N` folder in `output_dir` that is complete, or None if there is none.

    The Trainer writes directly into `checkpoint-N`, `trainer_state.json` last, so a run that is killed while it saves
    leaves a folder that cannot be resumed from. Such a folder is skipped with a warning that says why.

    Args:
        output_dir: the run's output folder.

    Raises:
        FileNotFoundError: `output_dir` does not exist.
    """
    for folder in _newest_first(Path(output_dir)):
        reason = _why_incomplete(folder)
        if reason is None:
            return str(folder)
        logger.warning("Passing over the incomplete checkpoint %s: %s.", folder, reason)
    return None


def refuse_incomplete(checkpoint: str | os.PathLike[str]) -> None:
    """Raise ValueError, which names another checkpoint if one is complete, if this one cannot be resumed from.

    Args:
        checkpoint: the folder, as the user has written it.
    """
    folder = Path(checkpoint)
    reason = _why_incomplete(folder) if folder.is_dir() else "there is no such folder"
    if reason is None:
        return
    beside = folder.absolute().parent
    others = _newest_first(beside) if beside.is_dir() else []
    whole = next((other for other in others if other.name != folder.name and not _why_incomplete(other)), None)
    remedy = f"resume from {whole}, the newest whole one beside it" if whole else "no checkpoint beside it is whole"
    raise ValueError(f"The checkpoint {os.fspath(checkpoint)!r} cannot be resumed from: {reason}; {remedy}.")


def _newest_first(output_dir: Path) -> list[Path]:
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.iterdir()]
    steps = {int(match[1]): path for match, path in found if match and path.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _why_incomplete(folder: Path) -> str | None:
    """Return what shows that a checkpoint is incomplete, or None if nothing does."""
    if not (folder / "trainer_state.json").is_file():
        return "trainer_state.json, which is written last, is missing"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not any(path.suffix in WEIGHTS and not TRAINER_FILES.fullmatch(path.name) for path in files):
        return "it holds no weights"
    if reason := _why_unpaired({path.name for path in folder.iterdir()}):
        return reason
    for path in files:
        name = path.relative_to(folder)
        if reason := _why_torn(path):
            return f"{name} {reason}"
        if path.suffix == ".distcp" and not (path.parent / ".metadata").is_file():
            return f"{path.parent.relative_to(folder)} has no .metadata, which is written last"
        if path.name.endswith(".index.json"):
            shards = json.loads(path.read_bytes()).get("weight_map", {}).values()
            if missing := set(shards) - {file.name for file in path.parent.iterdir()}:
                return f"{min(missing)}, which {name} lists, is missing"
    return None


def _why_unpaired(names: set[str]) -> str | None:
    """Return which of the optimizer and the scheduler is missing if the other is there, or None.

    The Trainer loads both or, without a warning, neither. Both are missing under `save_only_model`, and where the user
    has deleted them to start them anew.
    """
    optimizer = any("optimizer" in name or name.startswith("global_step") for name in names)  # FSDP, DeepSpeed
    if "scheduler.pt" in names and not optimizer:
        return "optimizer.pt is missing (to start the optimizer and its schedule anew, delete scheduler.pt too)"
    if "optimizer.pt" in names and "scheduler.pt" not in names:
        return "scheduler.pt is missing (to start the optimizer and its schedule anew, delete optimizer.pt too)"
    return None


def _why_torn(path: Path) -> str | None:
    """Return what is wrong with a file by its format, or None, also for formats that are not checked."""
    judged = path.suffix in (*WEIGHTS, ".model", ".json") or path.name in NEVER_BLANK
    if judged and _is_blank(path):
        return "holds nothing but zeros" if path.stat().st_size else "is empty"
    if path.suffix in (".pt", ".pth", ".bin"):
        return _why_torn_torch_file(path)
    whole = True
    if path.suffix == ".safetensors":
        whole = _is_whole_safetensors(path)
    elif path.suffix == ".json":
        whole = _is_whole_json(path)
    return None if whole else "is cut short"


def _is_blank(path: Path, start: int = 0) -> bool:
    """Return whether all bytes from `start` on are zero, as when a machine dies before the data reach the disk."""
    with path.open("rb") as file:
        file.seek(start)
        return not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))


def _is_whole_json(path: Path) -> bool:
    """Return whether a file is complete JSON: an object if the Trainer reads one, or else any value or JSON Lines."""
    try:
        content, _ = json.JSONDecoder().raw_decode(path.read_text(encoding="utf-8").lstrip())
    except ValueError:
        return False
    read_as_object = path.name == "trainer_state.json" or path.name.endswith(("config.json", ".index.json"))
    return isinstance(content, dict) or not read_as_object


def _why_torn_torch_file(path: Path) -> str | None:
    """Return what is wrong with a file that torch wrote, or None, also for files that are not zip files.

    The directory of a zip file comes last, so that a truncated file has none. The contents are compared with the
    checksums in the file (a checksum of zero is none), which takes as long as loading it, about a second per GiB.
    torch does not compare them, and loads lost pages as zeros.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if not zipfile.is_zipfile(path):
        return "is cut short" if start in (b"PK", b"P") else "starts with zeros" if start[0] == 0 else None
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                with archive.open(record) as content:
                    while record.CRC and content.read(1 << 20):
                        pass
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError):
        return "is damaged: its contents are not what was written"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Return whether a safetensors file has the length that its header implies, and not only zeros as its data."""
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
    data = max(ends, default=0)
    return size == 8 + length + data and not (data and _is_blank(path, 8 + length))
