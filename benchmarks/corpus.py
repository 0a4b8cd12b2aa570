"""Text to train on that every machine with the pinned packages has: the Python files of torch and transformers."""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

LEARNED_FROM = 4_000_000  # characters that the tokenizer is trained on
HELD_OUT_PERCENT = 5


class Corpus(NamedTuple):
    """Rows of tokens, int64 (rows, length), of which the held-out ones are from other files."""

    train: Tensor
    held_out: Tensor
    vocab_size: int


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


def python_corpus(characters: int, vocab_size: int, length: int) -> Corpus:
    """Return about so many characters of Python files as rows of `length` tokens; they are kept in a temporary file."""
    versions = [version("torch"), version("transformers"), version("tokenizers")]
    key = digest_of(f"{characters} {vocab_size} {length} {versions}")[:16]
    cached = Path(tempfile.gettempdir()) / f"hf_lowmem_corpus_{key}.pt"
    if cached.exists():
        return Corpus(**torch.load(cached, weights_only=True))
    train: list[str] = []
    held_out: list[str] = []
    taken = 0
    for name, text in sources():
        if taken >= characters:
            break
        taken += len(text)
        (held_out if int(digest_of(name)[-8:], 16) % 100 < HELD_OUT_PERCENT else train).append(text)
    tokenizer = train_tokenizer(train, vocab_size)
    corpus = Corpus(rows_of(tokenizer, train, length), rows_of(tokenizer, held_out, length), vocab_size)
    unfinished = cached.with_suffix(f".{torch.initial_seed()}.tmp")
    torch.save(corpus._asdict(), unfinished)
    unfinished.replace(cached)
    return corpus


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
