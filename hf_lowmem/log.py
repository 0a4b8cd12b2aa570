"""The logging of the package: to the terminal by default, or wherever the user's own logging sends it.

Every module logs through `get_logger`. The first record installs a handler on the logger "hf_lowmem", which writes to
standard error unless another handler takes the record. `logging.getLogger("hf_lowmem").setLevel(...)`, the user's
handlers and `logging.basicConfig()` have the same effect as on any library.
"""

from __future__ import annotations

import logging
import os
import sys

import torch
from tqdm import tqdm

PACKAGE = logging.getLogger("hf_lowmem")


class TerminalHandler(logging.Handler):
    """A handler that writes the records that no other handler takes, on lines above tqdm's progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_taken(record):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)

    def _is_taken(self, record: logging.LogRecord) -> bool:
        """Return whether the record reaches another handler."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        severity = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"[hf_lowmem] {severity}{super().format(record)}"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one of the package's modules. Its first record installs the package's handler."""
    logger = logging.getLogger(name)
    logger.addFilter(_install_handler)
    return logger


def _install_handler(record: logging.LogRecord) -> bool:
    if not any(isinstance(handler, TerminalHandler) for handler in PACKAGE.handlers):
        PACKAGE.addHandler(TerminalHandler())
    return True


def announce(message: str, *args: object) -> None:
    """Log a message of level INFO that is shown by default.

    The root logger's default level would drop it, so it passes like a warning until the user sets the package's level.
    """
    shown = logging.WARNING if PACKAGE.level == logging.NOTSET else logging.INFO
    if PACKAGE.isEnabledFor(shown):
        record = PACKAGE.makeRecord(PACKAGE.name, logging.INFO, __file__, 0, message, args, None)
        _install_handler(record)
        PACKAGE.handle(record)


def is_first_process() -> bool:
    """Return whether this process has rank 0, which logs what is the same for all processes of a run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
