"""Imports what the environment variable PRELOAD names, in the server of `processes.py`; what fails is left out."""

import importlib
import os
import sys
from contextlib import suppress
from typing import Any

# peft imports bitsandbytes, which asks CUDA for its devices: the server's children could not use CUDA after that.
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
for name in filter(None, os.environ.get("PRELOAD", "").split(",")):
    with suppress(Exception):
        importlib.import_module(name)
del sys.modules["bitsandbytes"]
# The children find it installed, whatever was found here.
utils: Any = sys.modules.get("transformers.utils")
with suppress(AttributeError):
    utils.is_bitsandbytes_available.cache_clear()
