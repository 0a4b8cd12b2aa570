"""The optim names and what each stands for. This module imports neither torch nor transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple


class OptimName(NamedTuple):
    """What one optim name stands for.

    `state_bits` is None if `optim_args` may choose it. `bytes_per_param` is the optimizer state per parameter of
    Llama 2 7B at the default options. `summary` is a line for people.
    """

    algorithm: str
    state_bits: int | None
    bytes_per_param: float
    summary: str


OPTIM_NAMES: dict[str, OptimName] = {
    "lowmem_adamw": OptimName("lowmem_adamw", None, 8.000, "AdamW with the storage options of the others"),
    "lowmem_adamw_8bit": OptimName("lowmem_adamw", 8, 2.031, "AdamW, both moments in 8 bit"),
    "factored_adamw": OptimName("factored_adamw", None, 4.002, "AdamW, second moment as rows times columns"),
    "factored_adamw_8bit": OptimName("factored_adamw", 8, 1.017, "The same, first moment in 8 bit"),
    "slim_adamw": OptimName("slim_adamw", None, 4.001, "SlimAdam: one second moment per row, per column, or both"),
    "slim_adamw_8bit": OptimName("slim_adamw", 8, 1.017, "SlimAdam, first moment in 8 bit"),
    "adam_mini": OptimName("adam_mini", None, 4.001, "Adam-mini: one second moment per head, or row and column"),
    "adam_mini_8bit": OptimName("adam_mini", 8, 1.017, "Adam-mini, first moment in 8 bit"),
    "adalayer": OptimName("adalayer", None, 4.000, "Adalayer: one second moment per tensor of the body"),
    "adalayer_8bit": OptimName("adalayer", 8, 1.016, "Adalayer, first moment in 8 bit"),
    "signum": OptimName("signum", None, 4.000, "Signum: the sign of the first moment"),
    "signum_8bit": OptimName("signum", 8, 1.016, "Signum, first moment in 8 bit"),
    "coap_adamw": OptimName("coap_adamw", None, 2.791, "COAP: AdamW in a quarter of each weight's smaller side"),
    "coap_adamw_8bit": OptimName("coap_adamw", 8, 0.846, "COAP, both moments in 8 bit"),
    "coap_adafactor": OptimName("coap_adafactor", None, 1.676, "COAP with Adafactor's second moment"),
    "coap_adafactor_8bit": OptimName("coap_adafactor", 8, 0.564, "COAP with Adafactor's, first moment in 8 bit"),
    "soap": OptimName("soap", None, 12.462, "SOAP: Adam in Shampoo's eigenbasis; for quality, not for memory"),
    "soap_8bit": OptimName("soap", 8, 5.378, "SOAP, both moments in 8 bit"),
    "smmf": OptimName("smmf", None, 0.128, "SMMF: rank-1 factors of both moments and one bit for each sign"),
    "micro_adam": OptimName("micro_adam", None, 0.963, "MicroAdam: the largest 1 % of the last 10 gradients"),
    "fadam": OptimName("fadam", None, 8.000, "FAdam: a natural gradient step; for quality, not for memory"),
    "fadam_8bit": OptimName("fadam", 8, 2.031, "FAdam, both moments in 8 bit"),
    "h_fac": OptimName("h_fac", None, 0.003, "H-Fac: row and column means only; experimental"),
}


LAYERWISE = "_layerwise"  # at the end of a name it releases gradients, as it does in transformers' own names
ADAMW_NAMES = ("adamw_torch", "adamw_torch_fused")  # transformers' own names, with which ours are compared


def optim_names() -> list[str]:
    """Return the names that `register()` adds to transformers' `optim` choices.

    It also adds each of them with `_layerwise` at its end, which stands for `release=true`.

    >>> hf_lowmem.optim_names()
    ['lowmem_adamw', 'lowmem_adamw_8bit', ..., 'fadam_8bit', 'h_fac']
    """
    return list(OPTIM_NAMES)


def legal_names() -> list[str]:
    """Return all of our names, without and with `_layerwise` at the end."""
    return [*OPTIM_NAMES, *(name + LAYERWISE for name in OPTIM_NAMES)]


def optim_name(name: str) -> OptimName | None:
    """Return what one of our names stands for, with or without `_layerwise` at its end, or None for any other."""
    return OPTIM_NAMES.get(name.removesuffix(LAYERWISE))


def unknown_optim(name: str, known: Iterable[str] | None = None) -> str:
    """Return a sentence about an optim name that is not in `known`, by default ours, with the nearest that are."""
    known = legal_names() if known is None else list(known)
    near = nearest(str(name), known, cutoff=0.5)
    which = "nearest" if near else "legal"
    return f"Unknown optim name {name!r}; the {which} names: {', '.join(near or known)}."


def nearest(name: str, known: Sequence[str], n: int = 3, cutoff: float = 0.0) -> list[str]:
    """Return the known names that `name` may mean: those that it abbreviates, then those that are spelt like it.

    Args:
        name: the name as it was written.
        known: the legal names. Among those that `name` abbreviates, earlier ones come first.
        n: the largest number of names to return.
        cutoff: the least similarity of spelling, from 0 to 1, as for `difflib.get_close_matches`.
    """
    meant = [legal for legal in known if _shortens(_words(name), _words(legal))]
    others = [legal for legal in known if legal not in meant]
    similar = get_close_matches(name, others, n=n, cutoff=max(cutoff, 0.6) if meant else cutoff)
    return [*meant, *similar][:n]


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _shortens(short: list[str], full: list[str]) -> bool:
    """Return whether `short` abbreviates `full`: by the beginnings of words (grad_accum), or by all initials (lr).

    A word may also be longer than in the full name, such as optimizer for optim.
    """

    def same(part: str, word: str) -> bool:
        return word.startswith(part) or (len(word) > 3 and part.startswith(word))

    words = iter(full)
    in_order = all(any(same(part, word) for word in words) for part in short)
    return bool(short) and (in_order or short == ["".join(word[0] for word in full)])
