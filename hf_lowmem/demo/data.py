"""Question/answer pairs from the documentation that ships with Python, and a tokenizer trained on them.

Nothing is downloaded. The text is that of the running interpreter: it differs a little between Python versions, and is
the same in every run of one version.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import pydoc_data.topics
from collections.abc import Iterator

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

    No paragraph occurs twice. The split and the order depend on nothing but a hash of each answer.
    """
    seen: set[str] = set()
    pairs = {}
    for question, text in _documents():
        for part, answer in enumerate(_pieces(text, seen), start=1):
            suffix = f" (part {part})" if part > 1 else ""
            digest = hashlib.sha256(answer.encode()).hexdigest()
            pairs[digest] = {"prompt": f"Question: {question}{suffix}\nAnswer:", "completion": f" {answer}"}
    train: list[Pair] = []
    held_out: list[Pair] = []
    for digest in sorted(pairs):
        # The order follows the head of the hash and the split its tail, so that both splits are shuffled alike.
        (held_out if int(digest[-8:], 16) % 100 < HELD_OUT_PERCENT else train).append(pairs[digest])
    return train, held_out


def train_tokenizer(pairs: list[Pair], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `<pad>` and `<eos>`, trained on the prompts and completions."""
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
    for module_name in MODULES:
        with contextlib.suppress(ImportError):  # some builds come without sqlite3, ssl, bz2 or lzma
            module = importlib.import_module(module_name)
            yield f"What is the module `{module_name}` for?", inspect.getdoc(module) or ""
            for name, value in sorted(vars(module).items()):
                if not name.startswith("_") and callable(value):
                    yield from _docstrings(f"{module_name}.{name}", value)


def _docstrings(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield (question, docstring) for a function, or for a class and its public methods and properties."""
    is_class = inspect.isclass(value)
    yield f"What is `{path}`?" if is_class else f"What does `{path}` do?", inspect.getdoc(value) or ""
    for name, member in sorted(vars(value).items()) if is_class else ():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield f"What does `{path}.{name}` do?", inspect.getdoc(member) or ""


def _pieces(text: str, seen: set[str]) -> Iterator[str]:
    """Split `text` into runs of whole paragraphs of about PIECE_CHARS at most, without paragraphs already seen."""
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
