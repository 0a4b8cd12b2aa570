"""Question/answer pairs from the documentation that ships with Python, and a tokenizer trained on them.

Nothing is downloaded. The text is that of the running Python: it differs a little between versions, and is the same in
every run of one version, whatever other packages are installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def _documents() -> list[tuple[str, str]]:
    """Return (question, text) for every topic, module, class, function and method, in a fixed order."""
    program = Path(__file__).with_name("documentation.py")
    found = subprocess.run([sys.executable, "-I", "-S", program], check=True, capture_output=True)
    documents: list[tuple[str, str]] = json.loads(found.stdout)
    return documents


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
