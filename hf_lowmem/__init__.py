"""Low-memory optimizers for Hugging Face Trainer, TRL and PEFT, chosen by name.

    >>> import hf_lowmem
    >>> from transformers import TrainingArguments
    >>> hf_lowmem.register()
    >>> args = TrainingArguments(optim="slim_adamw_8bit")

Importing the package has no side effects and loads neither torch nor transformers. Each name below is imported when it
is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_lowmem import algorithms
    from hf_lowmem.convert import to_adamw
    from hf_lowmem.optimizer import LowMemOptimizer
    from hf_lowmem.trainer.build import build_optimizer, optimizer_cls_and_kwargs
    from hf_lowmem.trainer.callbacks import LostUpdates, OffloadState, ReleaseGradients
    from hf_lowmem.trainer.explain import explain
    from hf_lowmem.trainer.names import optim_names
    from hf_lowmem.trainer.registration import register
    from hf_lowmem.trainer.snr import SnrCallback

_DEFINED_IN = {
    "LostUpdates": "hf_lowmem.trainer.callbacks",
    "LowMemOptimizer": "hf_lowmem.optimizer",
    "OffloadState": "hf_lowmem.trainer.callbacks",
    "ReleaseGradients": "hf_lowmem.trainer.callbacks",
    "SnrCallback": "hf_lowmem.trainer.snr",
    "build_optimizer": "hf_lowmem.trainer.build",
    "explain": "hf_lowmem.trainer.explain",
    "optim_names": "hf_lowmem.trainer.names",
    "optimizer_cls_and_kwargs": "hf_lowmem.trainer.build",
    "register": "hf_lowmem.trainer.registration",
    "to_adamw": "hf_lowmem.convert",
}

__all__ = [
    "LostUpdates",
    "LowMemOptimizer",
    "OffloadState",
    "ReleaseGradients",
    "SnrCallback",
    "algorithms",
    "build_optimizer",
    "explain",
    "optim_names",
    "optimizer_cls_and_kwargs",
    "register",
    "to_adamw",
]


def __getattr__(name: str) -> Any:
    if name == "algorithms":
        return import_module("hf_lowmem.algorithms")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_DEFINED_IN[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
