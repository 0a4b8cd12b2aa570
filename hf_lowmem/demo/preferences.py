"""What the RLHF demo learns from: short answers, preference pairs made of them, and a reward that needs no model.

Everything here is a plain function of the documentation pairs, so it is the same on every run. Messages are in TRL's
conversational form, a list of `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import random
import re
from typing import Any

from hf_lowmem.demo.data import Pair

ANSWER_WORDS = 20
FEWEST_WORDS = 5

# The two kinds of rejected answer.
ANOTHER, SHUFFLED = "another", "shuffled"
KINDS = (ANOTHER, SHUFFLED)

# One line of question, then the answer and its end.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ ' ' + message['content'] | trim + ('\\n' if message['role'] == 'user' else eos_token) }}
{%- endfor -%}"""

Messages = list[dict[str, str]]
Example = dict[str, Any]


def short_answers(pairs: list[Pair]) -> list[Example]:
    """Each entry's question and the first ANSWER_WORDS words of its answer.

    The columns are `prompt` and `completion`, both messages, and `answer`, the latter's text. All are in plain words,
    so that a word is the same token in a name, at the start of a sentence and within one: it helps a small model to
    relate them. Later parts of an entry are left out, since nothing in their question says what they hold, and so are
    answers of fewer than FEWEST_WORDS different words and those that begin like an earlier one.
    """
    examples, seen = [], set()
    for pair in pairs:
        question = pair["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        words = words_in(pair["completion"])[:ANSWER_WORDS]
        answer = " ".join(words)
        if question.endswith(")") or len(set(words)) < FEWEST_WORDS or answer in seen:
            continue
        seen.add(answer)
        prompt = [message("user", " ".join(words_in(question)))]
        examples.append({"prompt": prompt, "completion": [message("assistant", answer)], "answer": answer})
    return examples


def without_those_of(examples: list[Example], others: list[Example]) -> list[Example]:
    """The examples whose question and answer are not among the others': in plain words, a few of both splits agree."""
    questions = {text(example["prompt"]) for example in others}
    answers = {example["answer"] for example in others}
    return [e for e in examples if text(e["prompt"]) not in questions and e["answer"] not in answers]


def preference_pairs(examples: list[Example], rounds: int = 1) -> list[Example]:
    """Two preference pairs of each example in each round: `prompt`, `chosen`, `rejected` and the `kind` of the latter.

    ANOTHER rejects the answer of the example that follows next in the first round, next but one in the second, and so
    on; it is that of any other entry, since the examples are in the order of a hash. SHUFFLED rejects the right
    answer's own words in another order. Both come from `examples` alone.
    """
    pairs = []
    for distance in range(1, rounds + 1):
        for example, other in zip(examples, examples[distance:] + examples[:distance], strict=True):
            rejected = {ANOTHER: text(other["completion"]), SHUFFLED: shuffled(text(example["completion"]), distance)}
            for kind in KINDS:
                answer = [message("assistant", rejected[kind])]
                chosen = {"prompt": example["prompt"], "chosen": example["completion"]}
                pairs.append(chosen | {"rejected": answer, "kind": kind})
    return pairs


def shuffled(answer: str, seed: int) -> str:
    """The words in another order, the same one for the same answer and seed."""
    words = answer.split()
    order = random.Random(f"{seed} {answer}")
    while (result := " ".join(words)) == answer:
        order.shuffle(words)
    return result


def answer_overlap(completions: list[Messages], answer: list[str], **columns: Any) -> list[float]:
    """A reward function for TRL's trainers: how far each completion's words are those of the right answer, 0 to 1."""
    return [overlap(text(completion), right) for completion, right in zip(completions, answer, strict=True)]


def overlap(given: str, right: str) -> float:
    """The harmonic mean of precision and recall (F1) of the different words of an answer."""
    words, wanted = set(words_in(given)), set(words_in(right))
    return 2 * len(words & wanted) / (len(words) + len(wanted))


def words_in(content: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", content.lower())


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def text(messages: Messages) -> str:
    return messages[-1]["content"]
