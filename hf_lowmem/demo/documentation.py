"""The documentation that ships with Python: prints a JSON list of [question, text], in a fixed order.

This file runs as a program in an interpreter of its own, `python -I -S documentation.py`, and imports nothing but the
standard library: many packages replace functions of the standard library as they are imported, and their docstrings
with them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import pydoc_data.topics
import sys
from collections.abc import Iterator

MODULES = """
abc argparse array ast asyncio base64 binascii bisect builtins bz2 calendar cmath cmd codecs collections
collections.abc colorsys concurrent.futures configparser contextlib contextvars copy copyreg csv dataclasses datetime
decimal difflib dis doctest email.message email.utils enum filecmp fileinput fnmatch fractions ftplib functools gc
gettext glob gzip hashlib heapq hmac html html.parser http.client http.cookies http.server imaplib importlib.metadata
inspect io ipaddress itertools json linecache locale logging logging.handlers lzma mailbox math mimetypes mmap
multiprocessing.pool numbers operator optparse os os.path pathlib pickle pickletools pkgutil platform plistlib poplib
pprint pstats pyclbr queue quopri random re reprlib runpy sched secrets selectors shelve shlex shutil smtplib socket
socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys tarfile tempfile textwrap threading
time timeit tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error
urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref xml.dom.minidom xml.etree.ElementTree
xml.sax xmlrpc.client xmlrpc.server zipapp zipfile zlib zoneinfo
""".split()


def documents() -> Iterator[tuple[str, str]]:
    """Yield (question, text) for every topic, module, class, function and method, in a fixed order."""
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield f'Explain "{topic}" in Python.', text
    for module_name in MODULES:
        with contextlib.suppress(ImportError):  # some builds come without sqlite3, ssl, bz2 or lzma
            module = importlib.import_module(module_name)
            yield f"What is the module `{module_name}` for?", inspect.getdoc(module) or ""
            for name, value in sorted(vars(module).items()):
                if not name.startswith("_") and callable(value):
                    yield from docstrings(f"{module_name}.{name}", value)


def docstrings(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield (question, docstring) for a function, or for a class and its public methods and properties."""
    is_class = inspect.isclass(value)
    yield f"What is `{path}`?" if is_class else f"What does `{path}` do?", inspect.getdoc(value) or ""
    for name, member in sorted(vars(value).items()) if is_class else ():
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield f"What does `{path}.{name}` do?", inspect.getdoc(member) or ""


if __name__ == "__main__":
    json.dump(list(documents()), sys.stdout)
