"""Imports what the environment variable PRELOAD names, in the server of `processes.py`; what fails is left out."""

import importlib
import os
from contextlib import suppress

for name in filter(None, os.environ.get("PRELOAD", "").split(",")):
    with suppress(Exception):
        importlib.import_module(name)
