"""What the RLHF demo learns from: short answers, preference pairs made of them, and a reward that needs no model.

Everything here is a plain function of the documentation pairs, so it is the same on every run. Messages are in TRL's
conversational form, a list of `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from hf_lowmem.demo.data import Pair

ANSWER_CHARS = 140
FEWEST_WORDS = 5

# The two kinds of rejected answer.
ANOTHER, SHUFFLED = "another", "shuffled"
KINDS = (ANOTHER, SHUFFLED)

# The text of `data.build_pairs`, with an end after every answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'Question: ' + message['content'] + '\\nAnswer:' }}
{%- else -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif -%}
{%- endfor -%}"""

Messages = list[dict[str, str]]
Example = dict[str, Any]


def short_answers(pairs: list[Pair]) -> list[Example]:
    """Each entry's question with the answer's first words, as `prompt` and `completion` messages.

    An answer is cut at the last word that ends within ANSWER_CHARS. Later parts of an entry are left out, since
    nothing in their question says what they hold, and so are answers of fewer than FEWEST_WORDS different words and
    those that begin like an earlier one.
    """
    examples, seen = [], set()
    for pair in pairs:
        question = pair["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        answer = textwrap.shorten(pair["completion"], ANSWER_CHARS, placeholder="", break_on_hyphens=False)
        if question.endswith(")") or len(set(answer.split())) < FEWEST_WORDS or answer in seen:
            continue
        seen.add(answer)
        examples.append({"prompt": [message("user", question)], "completion": [message("assistant", answer)]})
    return examples


def preference_pairs(examples: list[Example]) -> list[Example]:
    """Two preference pairs of each example, `prompt`, `chosen`, `rejected` and the `kind` of the rejected answer.

    ANOTHER rejects the next example's answer, which is that of any other entry since the examples are in the order of
    a hash. SHUFFLED rejects the right answer's own words in another order. Both come from `examples` alone.
    """
    following = examples[1:] + examples[:1]
    pairs = []
    for example, other in zip(examples, following, strict=True):
        rejected = {ANOTHER: text(other["completion"]), SHUFFLED: shuffled(text(example["completion"]))}
        for kind in KINDS:
            answer = [message("assistant", rejected[kind])]
            chosen = {"prompt": example["prompt"], "chosen": example["completion"]}
            pairs.append(chosen | {"rejected": answer, "kind": kind})
    return pairs


def shuffled(answer: str) -> str:
    """The words in another order, the same one for the same answer."""
    words = answer.split()
    order = random.Random(answer)
    while (result := " ".join(words)) == answer:
        order.shuffle(words)
    return result


def name_mentioned(prompts: list[Messages], completions: list[Messages], **columns: Any) -> list[float]:
    """A reward function for TRL's trainers: how much of the name in the question each answer mentions, 0 to 1."""
    return [share_mentioned(text(p), text(c)) for p, c in zip(prompts, completions, strict=True)]


def share_mentioned(question: str, answer: str) -> float:
    """The share of the words of the asked name that occur as words in the answer.

    "What does `shelve.Shelf.close` do?" asks for three words: shelve, shelf and close.
    """
    asked = re.search(r"[`\"](.+)[`\"]", question)
    wanted = set(words_in(asked.group(1))) if asked else set()
    return len(wanted & set(words_in(answer))) / len(wanted) if wanted else 0.0


def words_in(content: str) -> Iterator[str]:
    return (match.group() for match in re.finditer(r"[a-z0-9]+", content.lower()))


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def text(messages: Messages) -> str:
    return messages[-1]["content"]
