"""Text to train on that every machine with the pinned packages has: the Python files of torch and transformers."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

LEARNED_FROM = 4_000_000  # characters that the tokenizer is trained on
HELD_OUT_PERCENT = 5
SHORTEST = 200  # characters of a function


class Corpus(NamedTuple):
    """Rows of tokens, int64 (rows, length), of which the held-out ones are from other files."""

    train: Tensor
    held_out: Tensor


def sources() -> Iterator[tuple[str, str]]:
    """Yield the (path, text) of the Python files of transformers, torch and Python itself, in the order of a hash."""
    folders = (Path(transformers.__file__).parent, Path(torch.__file__).parent, Path(sysconfig.get_path("stdlib")))
    for folder in folders:
        paths = [path for path in folder.rglob("*.py") if "site-packages" not in path.relative_to(folder).parts]
        names = {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in paths}
        for name in sorted(names, key=digest_of):
            yield name, names[name].read_text(errors="ignore")


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def kept(make: Callable[..., Any], *args: Any) -> Any:
    """Return `make(*args)`, which is kept in a temporary file for later calls with the same versions of packages."""
    versions = [version("torch"), version("transformers"), version("tokenizers")]
    name = f"hf_lowmem_{make.__name__}_{digest_of(f'{args} {versions}')[:16]}.pt"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(make(*args), unfinished)
        unfinished.replace(path)  # at once, as several processes may write it
    return torch.load(path, weights_only=True)


def python_corpus(characters: int, vocab_size: int, length: int) -> Corpus:
    """Return about so many characters of Python files as rows of `length` tokens."""
    return Corpus(*kept(python_rows, characters, vocab_size, length))


def python_rows(characters: int, vocab_size: int, length: int) -> tuple[Tensor, Tensor]:
    train: list[str] = []
    held_out: list[str] = []
    taken = 0
    for name, text in sources():
        if taken >= characters:
            break
        taken += len(text)
        (held_out if int(digest_of(name)[-8:], 16) % 100 < HELD_OUT_PERCENT else train).append(text)
    tokenizer = train_tokenizer(train, vocab_size)
    return rows_of(tokenizer, train, length), rows_of(tokenizer, held_out, length)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` tokens, trained on the beginning of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learned: list[str] = []
    for text in texts:
        if sum(map(len, learned)) >= LEARNED_FROM:
            break
        learned.append(text)
    tokenizer.train_from_iterator(learned, trainer)
    return tokenizer


def rows_of(tokenizer: Tokenizer, texts: list[str], length: int) -> Tensor:
    """Return the tokens of the texts, one after the other, as rows of `length`; the last tokens are left out."""
    tokens = torch.tensor([number for each in tokenizer.encode_batch(texts) for number in each.ids])
    return tokens[: len(tokens) // length * length].view(-1, length)


def functions_by_module(classes: int, per_class: int) -> list[tuple[str, int]]:
    """Return (source of a function, number of its module) in a fixed order, as many for each module.

    The modules are those parts of torch, such as torch/nn and torch/optim, that define the most functions.
    """
    found: dict[str, dict[str, str]] = {}
    root = Path(torch.__file__).parent
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).parts[0]
        text = path.read_text(errors="ignore")
        lines = text.splitlines(keepends=True)
        try:
            tree = ast.parse(text)
        except SyntaxError:  # of a later Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if len(source) >= SHORTEST:
                    found.setdefault(part, {})[digest_of(source)] = source
    largest = sorted(found, key=lambda part: (-len(found[part]), part))[:classes]
    rows = [
        (digest, found[part][digest], label)
        for label, part in enumerate(largest)
        for digest in sorted(found[part])[:per_class]
    ]
    # The tail of the hash, as the heads of those that were taken depend on the size of their module.
    return [(source, label) for digest, source, label in sorted(rows, key=lambda row: row[0][::-1])]
