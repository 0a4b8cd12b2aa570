"""The data of the RLHF demo: short answers, preference pairs made of them, and a reward that needs no model.

All of it is computed from the documentation pairs alone, so the same pairs give the same data. Messages have TRL's
conversational form, a list of `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from hf_lowmem.demo.data import Pair

ANSWER_WORDS = 20
FEWEST_WORDS = 5

KINDS = ANOTHER, SHUFFLED = "another", "shuffled"  # the kinds of rejected answers

# A line with the question, then the answer and the end-of-text token.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ ' ' + message['content'] | trim + ('\\n' if message['role'] == 'user' else eos_token) }}
{%- endfor -%}"""

Messages = list[dict[str, str]]
Example = dict[str, Any]


def short_answers(pairs: list[Pair], unlike: Sequence[Example] = ()) -> list[Example]:
    """Return the question and the first ANSWER_WORDS words of the answer of each entry of the documentation.

    The columns are `prompt` and `completion`, both messages, and `answer`, the text of the latter. They hold plain
    words, which are the same tokens in a name, at the start of a sentence and within one; this helps a small model to
    relate them. Left out are the later parts of an entry, since their question does not say what they hold, answers of
    fewer than FEWEST_WORDS different words, answers that begin like an earlier one, and whatever has the question or
    the answer of an example in `unlike`.
    """
    questions, answers = {text(e["prompt"]) for e in unlike}, {e["answer"] for e in unlike}
    examples = []
    for pair in pairs:
        heading = pair["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        question, words = " ".join(words_in(heading)), words_in(pair["completion"])[:ANSWER_WORDS]
        answer = " ".join(words)
        if heading.endswith(")") or len(set(words)) < FEWEST_WORDS or answer in answers:
            continue
        answers.add(answer)
        if question not in questions:
            columns = {"prompt": message("user", question), "completion": message("assistant", answer)}
            examples.append(columns | {"answer": answer})
    return examples


def preference_pairs(examples: list[Example], rounds: int = 1) -> list[Example]:
    """Return two preference pairs per example and round: `prompt`, `chosen`, `rejected` and the `kind` of the latter.

    ANOTHER rejects the answer of the next example in the first round, of the next but one in the second, and so on.
    The examples are in the order of a hash, so that is the answer of an unrelated entry. SHUFFLED rejects the words of
    the right answer in another order.
    """
    pairs = []
    for distance in range(1, rounds + 1):
        for example, other in zip(examples, examples[distance:] + examples[:distance], strict=True):
            chosen = {"prompt": example["prompt"], "chosen": example["completion"]}
            rejected = {ANOTHER: text(other["completion"]), SHUFFLED: shuffled(text(example["completion"]), distance)}
            pairs += [chosen | {"rejected": message("assistant", rejected[kind]), "kind": kind} for kind in KINDS]
    return pairs


def shuffled(answer: str, seed: int) -> str:
    """Return the words in another order, which is the same for the same answer and seed."""
    words = answer.split()
    order = random.Random(f"{seed} {answer}")
    while (result := " ".join(words)) == answer:
        order.shuffle(words)
    return result


def answer_overlap(completions: list[Messages], answer: list[str], **columns: Any) -> list[float]:
    """Return for each completion its `overlap` with the right answer; a reward function for TRL's trainers."""
    return [overlap(text(completion), right) for completion, right in zip(completions, answer, strict=True)]


def overlap(given: str, right: str) -> float:
    """Return the harmonic mean of precision and recall (F1) of the different words of an answer, from 0 to 1."""
    words, wanted = set(words_in(given)), set(words_in(right))
    return 2 * len(words & wanted) / (len(words) + len(wanted))


def words_in(content: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", content.lower())


def message(role: str, content: str) -> Messages:
    return [{"role": role, "content": content}]


def text(messages: Messages) -> str:
    return messages[-1]["content"]
