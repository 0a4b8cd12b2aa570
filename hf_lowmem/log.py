"""What the package says while it works: one way to the terminal, which gives way to the user's own logging.

Every module logs through `get_logger`. The first record brings a handler for the logger "hf_lowmem", which writes to
standard error as long as no other handler takes the record. `logging.getLogger("hf_lowmem").setLevel(...)`, handlers
of the user's and `logging.basicConfig()` do what they do for any library.
"""

from __future__ import annotations

import logging
import os
import sys

import torch
from tqdm import tqdm

PACKAGE = logging.getLogger("hf_lowmem")


class TerminalHandler(logging.Handler):
    """Writes records that nothing else takes, on lines of their own above tqdm's progress bars."""

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
        """Whether the record reaches another handler."""
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
    """The logger of one of the package's modules. Until it has something to say, logging stays as it was."""
    logger = logging.getLogger(name)
    logger.addFilter(_install_handler)
    return logger


def _install_handler(record: logging.LogRecord) -> bool:
    if not any(isinstance(handler, TerminalHandler) for handler in PACKAGE.handlers):
        PACKAGE.addHandler(TerminalHandler())
    return True


def announce(message: str, *args: object) -> None:
    """Log as information what is to be seen without any setting: it counts as a warning until the user sets the
    package's level, as the root logger's level stops information where nobody has chosen one."""
    shown = logging.WARNING if PACKAGE.level == logging.NOTSET else logging.INFO
    if PACKAGE.isEnabledFor(shown):
        record = PACKAGE.makeRecord(PACKAGE.name, logging.INFO, __file__, 0, message, args, None)
        _install_handler(record)
        PACKAGE.handle(record)


def is_first_process() -> bool:
    """Whether this process, of those that train together, is the one that says what holds for all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
