"""The examples in the docstrings of public names run, and every public name has one."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import hf_lowmem
from tests.support.declarations import CLASSES

# The examples take torch and the package as imported.
PUBLIC = {"hf_lowmem": hf_lowmem, **{name: getattr(hf_lowmem, name) for name in hf_lowmem.__all__}}
PUBLIC |= {cls.__name__: cls for cls in CLASSES}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_public_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a Trainer makes its folder
    names = {"torch": torch, "hf_lowmem": hf_lowmem, name: PUBLIC[name]}
    example = doctest.DocTestParser().get_doctest(str(PUBLIC[name].__doc__), names, name, None, None)
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)
