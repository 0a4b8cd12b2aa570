"""Imports the modules in the environment variable PRELOAD in the server of `processes.py`, except those that fail."""

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

# peft imports bitsandbytes, which asks CUDA for its devices. After that the server's children could not use CUDA.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
for name in filter(None, os.environ.get("PRELOAD", "").split(",")):
    with suppress(Exception):
        importlib.import_module(name)
del sys.modules["bitsandbytes"]
# The children must find bitsandbytes installed, so what was cached here is removed.
utils: Any = sys.modules.get("transformers.utils")
with suppress(AttributeError):
    utils.is_bitsandbytes_available.cache_clear()
