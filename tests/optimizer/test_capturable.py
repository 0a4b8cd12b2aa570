"""Steps whose numbers stay on the device, so that a CUDA graph can capture them; graphs: test_gpu_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hf_lowmem
from hf_lowmem.algorithms import CoapAdamW, LowMemAdamW, SlimAdamW, Soap
from hf_lowmem.kernels.registry import warn_of_capturable
from tests.support.declarations import FULL_SPACE, each_variant
from tests.support.kernel_runs import run


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("bits", [32, 8])
@each_variant(FULL_SPACE, geometries=True)
def test_steps_are_those_of_other_optimizers(cls, options, shape, bits, rounding, device, force) -> None:
    options = {**options, "state_bits": bits, "rounding": rounding, **({"min_8bit_size": 0} if bits == 8 else {})}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    start = start if rounding == "nearest" else start.bfloat16()
    mine, state = run(cls, {**options, "capturable": True}, start)
    if device == "cpu":
        force("tiles", "rule")
    theirs, expected = run(cls, options, start)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for name, value in state.items():
        if name != "kahan_comp":  # in units of the weight's last place: compared with the weight
            largest = float(expected[name].abs().max())
            torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=1e-6, atol=1e-6 * largest)


def test_on_a_cpu_its_cost_is_said_once(caplog) -> None:
    warn_of_capturable.cache_clear()
    param = nn.Parameter(torch.ones(4))
    optimizer = LowMemAdamW([param], lr=1e-2, capturable=True)
    for _ in range(2):
        param.grad = torch.ones(4)
        optimizer.step()
    assert caplog.text.count("capturable=true makes optimizer steps on cpu several times slower") == 1


def test_a_step_reads_no_number_of_the_device(device, monkeypatch) -> None:
    # It reads those of the CPU alone.
    monkeypatch.setattr("hf_lowmem.moments.group_mean.known_finite", lambda reduced: False)

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    params = [nn.Parameter(torch.ones(16, 128, device=device, dtype=torch.bfloat16))]
    lr = torch.tensor(1e-2, device=device)
    optimizer = SlimAdamW(params, lr=lr, axes=(1,), state_bits=8, rounding="stochastic", capturable=True)
    for _ in range(3):
        params[0].grad = torch.ones_like(params[0])
        with NoReads():
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    assert optimizer.state[params[0]]["step"].device.type == device
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_may_be_read_by_either_kind(saved: bool, device) -> None:
    def build(capturable: bool) -> tuple[nn.Parameter, LowMemAdamW]:
        param = nn.Parameter(torch.ones(8, device=device))
        param.grad = torch.ones_like(param)
        return param, LowMemAdamW([param], lr=1e-2, capturable=capturable)

    param, written = build(saved)
    written.step()
    other, read = build(not saved)
    other.data.copy_(param)
    read.load_state_dict(written.state_dict())
    assert read.param_groups[0]["capturable"] is not saved
    assert read.state[other]["step"].device.type == ("cpu" if saved else device)
    for optimizer in (written, read):
        optimizer.step()
    torch.testing.assert_close(param, other)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CoapAdamW, {"rank": 4}, "capturable=true does not go with an optimizer that projects"),
        (Soap, {}, "capturable=true does not go with an optimizer that projects"),
        (SlimAdamW, {"compile": True}, "capturable=true does not go with compile=true"),
        (SlimAdamW, {"offload_state": True}, "capturable=true does not go with offload_state=true"),
    ],
)
def test_what_needs_the_host_is_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(8, 8))], lr=1e-3, capturable=True, **options)


def test_by_name_too() -> None:
    layer = nn.Linear(16, 16)
    optimizer = hf_lowmem.build_optimizer(layer, "adam_mini_8bit", lr=1e-3, optim_args="capturable=true")
    assert all(group["capturable"] for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="capturable=true does not go with an optimizer that projects"):
        hf_lowmem.build_optimizer(layer, "soap", lr=1e-3, optim_args="capturable=true")


def test_a_tensor_of_a_learning_rate_stays_the_same_object() -> None:
    lr = torch.tensor(1e-2)
    param = nn.Parameter(torch.ones(4))
    optimizer = LowMemAdamW([param], lr=lr, capturable=True)
    saved = LowMemAdamW([param], lr=0.5).state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.5


def test_groups_that_share_a_learning_rate_load_one_each() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(4))]} for _ in range(3)]
    optimizer = LowMemAdamW(groups, lr=torch.tensor(1e-2), capturable=True)
    saved = optimizer.state_dict()
    for group, lr in zip(saved["param_groups"], (0.5, 0.25, 0.5), strict=True):
        group["lr"] = lr
    optimizer.load_state_dict(saved)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.25, 0.5]
