"""Parameter names, whatever wraps the model."""

from __future__ import annotations

import re

_WRAPPER = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_DDP = re.compile(r"^(?:module\.)+")
_PEFT_MODEL = re.compile(r"(?<![^.])base_model\.model\.")
_SAVED_COPY = re.compile(r"(?<=\.)modules_to_save\.default\.")
_DEFAULT_ADAPTER = re.compile(r"(?<=\.)((?:lora_\w+|trainable_tokens_delta))\.default(?=\.|$)")


def canonical_name(name: str) -> str:
    """The parameter's name without FSDP, torch.compile, checkpointing, DDP and PEFT wrappers, however they are nested.

    DDP's `module.` is a wrapper in front of the model only: further in, a user's own module may be called that. Only
    the adapter called `default` loses its name, so that the factors of two adapters keep different names.
    """
    name = _DDP.sub("", _PEFT_MODEL.sub("", _WRAPPER.sub("", name)))
    return _DEFAULT_ADAPTER.sub(r"\1", _SAVED_COPY.sub("", name))
