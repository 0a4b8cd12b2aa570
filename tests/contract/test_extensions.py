"""What CONTRIBUTING.md promises: an algorithm and a storage format take one file each, and pass the others' tests."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lowmem.algorithms import LowMemAdamW, Signum, SlimAdamW
from hf_lowmem.codecs import CODECS
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.means import TILE
from tests import ROOT
from tests.support.int4 import BLOCK, Int4Blockwise, int4_for
from tests.support.lion import Lion


class Largest(TorchDispatchMode):
    """Finds the most entries of a tensor that an operation makes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.entries, self._known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(2048, 1024), (1 << 21,), (4, 512, 1024)], ids=str)
def test_lion_makes_no_temporary_of_the_weights_size(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(shape).to(dtype))
    param.grad = torch.randn(shape).to(dtype)
    optimizer = Lion([param], state_bits=bits)
    optimizer.step()
    with Largest([param, param.grad, *optimizer.state[param].values()]) as largest:
        optimizer.step()
    assert 0 < largest.entries <= TILE


def test_lion_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, m = torch.randn(96, 64, generator=generator), torch.zeros(96, 64)
    param = nn.Parameter(weight.clone())
    optimizer = Lion([param], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        param.grad = torch.randn(96, 64, generator=generator)
        optimizer.step()
        weight = weight - 1e-2 * ((0.9 * m + 0.1 * param.grad).sign() + 0.1 * weight)
        m = 0.99 * m + 0.01 * param.grad
    torch.testing.assert_close(param.detach(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_lion_keeps_the_contract_of_every_name() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.support.lion"]
    command += ["tests/contract/test_every_name.py", "-k", "lion and not cuda", "-m", "slow or not slow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout


@pytest.mark.parametrize(
    ("cls", "options"), [(LowMemAdamW, {}), (SlimAdamW, {"axes": (0,)}), (Signum, {}), (Lion, {})]
)
def test_a_4_bit_codec_takes_one_file(cls: type, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """State is declared, stored, stepped in tiles, saved and resumed; only the compiled kernels do not know it."""
    monkeypatch.setitem(CODECS, 4, int4_for)
    monkeypatch.setattr("hf_lowmem.kernels.means.TILE", 1 << 12)
    generator, found = torch.Generator().manual_seed(0), []
    start, grads = torch.randn(96, 256, generator=generator), torch.randn(6, 96, 256, generator=generator)
    for backend in ("rule", "tiles"):
        param = nn.Parameter(start.clone())
        optimizer = cls([param], lr=1e-2, state_bits=4, min_8bit_size=0, **options)
        with forced(backend):
            for number, grad in enumerate(grads):
                param.grad = grad.clone()
                if number == 3:
                    saved, (resumed, again) = optimizer.state_dict(), (nn.Parameter(param.detach().clone()), None)
                    again = cls([resumed], lr=1e-2, state_bits=4, min_8bit_size=0, **options)
                    again.load_state_dict(saved)
                optimizer.step()
                if number >= 3:
                    resumed.grad = grad.clone()
                    again.step()
        assert torch.equal(param, resumed)
        assert isinstance(optimizer.plan_of(param).codec, Int4Blockwise)
        state = optimizer.state[param]
        assert state["exp_avg"].shape == (96, 128)
        assert state["exp_avg_absmax"].shape == (96, 256 // BLOCK)
        assert sum(tensor.nbytes for tensor in state.values()) == optimizer.plan_of(param).nbytes((96, 256))
        found.append(param.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-2 if "axes" in options else 0)
