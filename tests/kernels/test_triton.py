"""The Triton kernels in the interpreter, and what happens without Triton and on devices without kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowmem
from hf_lowmem import buckets
from hf_lowmem.codecs import Float32
from hf_lowmem.kernels import TRITON, Backend, forced
from hf_lowmem.kernels.bucket import Bucket, ParamStep
from hf_lowmem.kernels.columns import Geometry
from hf_lowmem.kernels.parts import geometry
from hf_lowmem.kernels.registry import find_backend, warn_of_plain_torch
from hf_lowmem.kernels.triton import launch
from hf_lowmem.kernels.triton.launch import Launch
from hf_lowmem.kernels.triton.tuning import KINDS, TUNING, Tile, tile_for
from hf_lowmem.kernels.triton.variants import Piece, Variant, layout_of, triton_kernels
from hf_lowmem.state import StatePlan
from tests import ROOT

KERNELS_ON_GPUS = "tests/kernels/test_gpu_kernels.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """Triton must know before it is imported that it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", KERNELS_ON_GPUS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_stream_uploads_its_own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another stream has uploaded may not have arrived."""
    columns = dict.fromkeys((*Geometry._fields, "tiles", "sums", "reductions"), 1)
    variant = Variant(None, None, "nearest", "none", "none", 0, 64, 4, 1, 32, 16)
    weights, cpu = [torch.zeros(1)], torch.device("cpu")
    bucket = Bucket("signum", TRITON, cpu, weights, weights, [{}], [StatePlan({}, Float32())], [1.0], [0])
    found, tables = Launch(variant, [(0, Piece(variant, columns))], has_whole_weights=False), []
    for stream in (0, 1, 1):
        monkeypatch.setattr(launch, "current_stream", lambda device, stream=stream: stream)
        tables.append(found.tables(bucket, bucket.gradient_addresses()))
    first, other, again = tables
    for name in ("parts", "tiles"):
        assert getattr(other, name) is getattr(again, name)
        assert getattr(first, name) is not getattr(other, name)
        assert torch.equal(getattr(first, name), getattr(other, name))


def test_a_gpu_that_the_table_does_not_have_takes_the_tiles_of_an_older_one() -> None:
    """Or of the oldest in it: the first of these is older than all."""
    for arch, row in ((75, 80), (80, 80), (86, 80), (90, 90), (120, 90)):
        assert all(tile_for(kind, arch) is TUNING[kind, row] for kind in KINDS)


@pytest.mark.parametrize(
    ("columns", "means", "groups", "lines", "cells", "chunks"),
    [
        (64, "tile", 64, 64, 2, 1),
        (768, "tile", 4, 16, 25, 1),
        (1024, "tile", 4, 16, 25, 1),
        (8192, "tile", 1, 32, 100, 1),
        (14336, "loop", 1, 16, 100, 4),
        (65792, "before", 1, 16, 100, 17),
    ],
)
def test_small_groups_share_a_tile_and_large_ones_take_several(
    columns: int, means: str, groups: int, lines: int, cells: int, chunks: int
) -> None:
    rows = geometry((100, columns), (columns, 1), 0, (1,))
    assert rows is not None
    layout = layout_of(rows, "group", None, Tile(1 << 12, one_tile=1 << 13, one_program=1 << 16))
    assert layout[:1] + layout[3:7] == (means, lines, groups, cells, chunks)


def test_triton_is_imported_only_to_step() -> None:
    check = "import sys; sys.modules['triton'] = None; import hf_lowmem.kernels"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", ["slim_adamw_8bit", "lowmem_adamw", "signum"])
def test_without_triton_steps_are_taken_and_that_is_said_once(name, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    triton_kernels.cache_clear()
    try:
        layer = nn.Linear(64, 64)
        optimizer = hf_lowmem.build_optimizer(layer, name, lr=1e-3)
        before = layer.weight.detach().clone()
        with forced("triton", "tiles"):
            for _ in range(2):
                layer(torch.ones(64)).sum().backward()
                optimizer.step()
        assert not torch.equal(before, layer.weight)
    finally:
        triton_kernels.cache_clear()
    assert caplog.text.count("They need triton") == 1


class OnXpu:
    """A weight on the CPU that says that it is elsewhere."""

    device = SimpleNamespace(type="xpu")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight, name)


@pytest.mark.parametrize("name", ["slim_adamw_8bit", "coap_adafactor"])
def test_a_device_without_kernels_steps_in_plain_torch_and_that_is_said_once(name, monkeypatch, caplog) -> None:
    """Named "xpu" to the lookup alone: the steps are the CPU's."""
    found: list[Backend] = []

    def find(rule: str, step: ParamStep) -> Backend:
        found.append(find_backend(rule, step._replace(param=OnXpu(step.param))))
        return found[-1]

    monkeypatch.setattr(buckets, "find_backend", find)
    warn_of_plain_torch.cache_clear()
    layer = nn.Linear(64, 64)
    optimizer = hf_lowmem.build_optimizer(layer, name, lr=1e-3)
    before = layer.weight.detach().clone()
    for _ in range(2):
        layer(torch.ones(64)).sum().backward()
        optimizer.step()
    assert not torch.equal(before, layer.weight)
    assert not any(backend.devices for backend in found)
    assert caplog.text.count("Optimizer steps on xpu") == 1
