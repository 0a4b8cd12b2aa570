"""The Triton kernels in the interpreter, and what happens without Triton and on devices without kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem.kernels import KERNELS, gpu, key_of, native, warn_of_plain_torch

TESTS = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """Triton must know before it is imported that it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "test_gpu_kernels.py"]
    done = subprocess.run(
        command, cwd=TESTS, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_stream_uploads_its_own_tables() -> None:
    """What another stream has uploaded may not have arrived."""
    part = gpu.Part(*range(len(gpu.Part._fields)))
    tables = [gpu.numbered((part,), "none", torch.device("cpu"), stream) for stream in (0, 1, 0)]
    for first, other, again in zip(*tables, strict=True):
        if first is not None:
            assert first is again
            assert first is not other
            assert torch.equal(first, other)


def test_triton_is_imported_only_to_step() -> None:
    check = "import sys; sys.modules['triton'] = None; import hf_lowmem.kernels"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", ["slim_adamw_8bit", "lowmem_adamw", "signum"])
def test_without_triton_steps_are_taken_and_that_is_said_once(name, monkeypatch, caplog) -> None:
    for key in [key for key in KERNELS if key.device == "cuda"]:
        monkeypatch.setitem(KERNELS, key._replace(device="cpu"), KERNELS[key])
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu.triton_kernels.cache_clear()
    try:
        layer = nn.Linear(64, 64)
        optimizer = hf_lowmem.build_optimizer(layer, name, lr=1e-3)
        before = layer.weight.detach().clone()
        for _ in range(2):
            layer(torch.ones(64)).sum().backward()
            optimizer.step()
        assert not torch.equal(before, layer.weight)
    finally:
        gpu.triton_kernels.cache_clear()
    assert caplog.text.count("They need triton") == 1


@pytest.mark.parametrize("name", ["slim_adamw_8bit", "coap_adafactor"])
def test_a_device_without_kernels_steps_in_plain_torch_and_that_is_said_once(name, monkeypatch, caplog) -> None:
    """Named "xpu" to the lookup alone: the steps are the CPU's."""
    monkeypatch.setattr("hf_lowmem.optimizer.key_of", lambda rule, plan, device: key_of(rule, plan, "xpu"))
    monkeypatch.setattr(native, "parts_of", lambda *args: pytest.fail("a kernel of the CPU"))
    warn_of_plain_torch.cache_clear()
    layer = nn.Linear(64, 64)
    optimizer = hf_lowmem.build_optimizer(layer, name, lr=1e-3)
    before = layer.weight.detach().clone()
    for _ in range(2):
        layer(torch.ones(64)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, layer.weight)
    assert caplog.text.count("Optimizer steps on xpu") == 1
