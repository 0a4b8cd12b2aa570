"""What a user writes passes his type checker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PREAMBLE = """
from typing import Any
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
import hf_lowmem
from tests import ROOT

model: PreTrainedModel
args: TrainingArguments
trainer: Trainer
optimizer: hf_lowmem.LowMemOptimizer
batches: list[dict[str, Any]]
"""
OWN = """
plain: nn.Module = nn.Linear(2, 2)
bare: hf_lowmem.LowMemOptimizer = hf_lowmem.build_optimizer(plain, "slim_adamw", lr=1e-3)
mine: hf_lowmem.LowMemOptimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3)
norm: float = mine.clip_grad_norm_(1.0).item()
mine.release_state()
mine.synchronize_state()
cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(model, "slim_adamw", lr=1e-3)
made: hf_lowmem.LowMemOptimizer = cls(model.parameters(), **kwargs)
slim: hf_lowmem.LowMemOptimizer = hf_lowmem.algorithms.SlimAdamW(model.parameters(), rounding="kahan", fused_clip=True)
"""


def snippets() -> list[str]:
    """The Python of the README and the docs: whole blocks, and lines of code inside of the text."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        in_text = re.findall(r"`((?:optimizer|Trainer|hf_lowmem)\b[^`\n]*\))`", text)
        found.append("\n".join(f"optimizer = {line}" if "build_optimizer(" in line else line for line in in_text))
    return found


@pytest.mark.slow
def test_the_lines_of_the_readme_are_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    lines = snippets()
    assert any("clip_grad_norm_" in snippet for snippet in lines)
    bodies = [PREAMBLE + snippet for snippet in [*lines, OWN]]
    for number, body in enumerate(bodies):
        (tmp_path / f"snippet_{number}.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + "\n".join(bodies)
