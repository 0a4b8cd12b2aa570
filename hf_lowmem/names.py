"""The names of parameters without the prefixes of wrappers."""

from __future__ import annotations

import re

_WRAPPER = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_DDP = re.compile(r"^(?:module\.)+")
_PEFT_MODEL = re.compile(r"(?<![^.])base_model\.model\.")
_SAVED_COPY = re.compile(r"(?<=\.)modules_to_save\.default\.")
_DEFAULT_ADAPTER = re.compile(r"(?<=\.)((?:lora_\w+|trainable_tokens_delta))\.default(?=\.|$)")


def canonical_name(name: str) -> str:
    """Return a parameter's name without the prefixes of FSDP, torch.compile, checkpointing, DDP and PEFT.

    DDP's prefix `module.` is removed only at the start, because further in it may be the name of a user's module. Only
    the adapter name `default` is removed, so that the factors of two adapters keep different names.
    """
    name = _DDP.sub("", _PEFT_MODEL.sub("", _WRAPPER.sub("", name)))
    return _DEFAULT_ADAPTER.sub(r"\1", _SAVED_COPY.sub("", name))
