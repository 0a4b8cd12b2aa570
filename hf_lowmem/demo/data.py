"""Prompt/answer pairs from the documentation that ships with Python, and a tokenizer trained on them.

Nothing is downloaded. The text is that of the running interpreter, so it differs a little between Python versions;
on one version it is the same on every run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODULES = """
abc argparse array ast asyncio base64 binascii bisect builtins bz2 calendar cmath cmd codecs collections
collections.abc colorsys concurrent.futures configparser contextlib contextvars copy copyreg csv dataclasses datetime
decimal difflib dis doctest email.message email.utils enum filecmp fileinput fnmatch fractions ftplib functools gc
gettext glob gzip hashlib heapq hmac html html.parser http.client http.cookies http.server imaplib importlib.metadata
inspect io ipaddress itertools json linecache locale logging logging.handlers lzma mailbox math mimetypes mmap
multiprocessing.pool numbers operator optparse os os.path pathlib pickle pickletools pkgutil platform plistlib poplib
pprint pstats pyclbr queue quopri random re reprlib runpy sched secrets selectors shelve shlex shutil smtplib socket
socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys tarfile tempfile textwrap threading
time timeit tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error
urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref xml.dom.minidom xml.etree.ElementTree
xml.sax xmlrpc.client xmlrpc.server zipapp zipfile zlib zoneinfo
""".split()

PIECE_CHARS = 400  # about 100 tokens
SHORTEST_CHARS = 40
HELD_OUT_PERCENT = 10

Pair = dict[str, str]


def build_pairs() -> tuple[list[Pair], list[Pair]]:
    """Return the (train, held-out) pairs, each with a `prompt` and a `completion`.

    No paragraph occurs twice. The split and the order within it depend on a hash of each answer only.
    """
    seen: set[str] = set()
    ranked = []
    for question, text in _documents():
        for part, answer in enumerate(_pieces(text, seen), start=1):
            suffix = f" (part {part})" if part > 1 else ""
            pair = {"prompt": f"Question: {question}{suffix}\nAnswer:", "completion": f" {answer}"}
            ranked.append((hashlib.sha256(answer.encode()).hexdigest(), pair))
    ranked.sort(key=lambda item: item[0])
    # The rank is the head of the hash and the split its tail, so that both splits are shuffled alike.
    is_held_out = [int(digest[-8:], 16) % 100 < HELD_OUT_PERCENT for digest, _ in ranked]
    train = [pair for (_, pair), held_out in zip(ranked, is_held_out, strict=True) if not held_out]
    held_out = [pair for (_, pair), held_out in zip(ranked, is_held_out, strict=True) if held_out]
    return train, held_out


def train_tokenizer(pairs: list[Pair], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `<pad>` and `<eos>`, trained on prompts and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((pair["prompt"] + pair["completion"] for pair in pairs), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _documents() -> Iterator[tuple[str, str]]:
    """Yield (question, text) for every topic, module, class, function and method, in a fixed order."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f'Explain "{topic}" in Python.', text
    for name in MODULES:
        with contextlib.suppress(ImportError):  # some builds come without sqlite3, ssl, bz2 or lzma
            yield from _docstrings(name, importlib.import_module(name))


def _docstrings(module_name: str, module: Any) -> Iterator[tuple[str, str]]:
    yield f"What is the module `{module_name}` for?", inspect.getdoc(module) or ""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value):
            continue
        path = f"{module_name}.{name}"
        if not inspect.isclass(value):
            yield f"What does `{path}` do?", inspect.getdoc(value) or ""
            continue
        yield f"What is `{path}`?", inspect.getdoc(value) or ""
        for member_name, member in sorted(vars(value).items()):
            if not member_name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                yield f"What does `{path}.{member_name}` do?", inspect.getdoc(member) or ""


def _pieces(text: str, seen: set[str]) -> Iterator[str]:
    """Split `text` into runs of whole paragraphs of at most PIECE_CHARS, leaving out paragraphs already seen."""
    piece = ""
    for paragraph in text.split("\n\n"):
        paragraph = paragraph.strip("\n").rstrip()
        if not paragraph or paragraph in seen:
            continue
        seen.add(paragraph)
        if piece and len(piece) + len(paragraph) > PIECE_CHARS:
            if len(piece) >= SHORTEST_CHARS:
                yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if len(piece) >= SHORTEST_CHARS:
        yield piece
