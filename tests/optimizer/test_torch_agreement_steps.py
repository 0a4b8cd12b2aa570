"""Where torch.optim.AdamW defines what hooks, schedulers and steps do, every class does the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

from hf_lowmem.algorithms import LowMemAdamW
from tests.support.declarations import skip_unless_stored
from tests.support.torch_twins import every_class, trained, two_classes, weight

# -- hooks ----------------------------------------------------------------------------------------------------------


@every_class
def test_hooks_run_in_torchs_order(cls: type) -> None:
    def order(kind: type) -> list[str]:
        seen: list[str] = []
        optimizer = kind([weight(4, 3)])
        handles = [
            register_optimizer_step_pre_hook(lambda *_: seen.append("every optimizer, before")),
            register_optimizer_step_post_hook(lambda *_: seen.append("every optimizer, after")),
            optimizer.register_step_pre_hook(lambda *_: seen.append("step, before")),
            optimizer.register_step_post_hook(lambda *_: seen.append("step, after")),
            optimizer.register_state_dict_pre_hook(lambda _: seen.append("save, before")),
            optimizer.register_state_dict_post_hook(lambda _, saved: seen.append("save, after")),
            optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append("load, before")),
            optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load, after")),
        ]
        try:
            optimizer.step(lambda: seen.append("closure"))
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return seen

    assert order(cls) == order(AdamW)


@every_class
def test_a_hook_may_replace_what_is_saved_and_what_is_loaded(cls: type) -> None:
    optimizer = trained(cls, [weight(4, 3)])
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "run": 7})
    saved = optimizer.state_dict()
    assert saved["run"] == 7

    def other_rate(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        return {**loaded, "param_groups": [{**group, "lr": 0.5} for group in loaded["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(other_rate)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert saved["param_groups"][0]["lr"] != 0.5


# -- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.5**epoch, lambda epoch: 0.9**epoch]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda epoch: 0.5, lambda epoch: 0.9]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=10),
    "OneCycleLR without momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [1e-4, 1e-3], [1e-2, 1e-1], step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=[1e-4, 1e-5]),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.05, 0.06]),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@two_classes
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_sets_the_same_rates_and_betas(cls: type, name: str, tensor_lr: bool) -> None:
    def rate(value: float) -> float | Tensor:
        return torch.tensor(value) if tensor_lr else value

    def run(kind: type) -> tuple[list[Any], list[Tensor]]:
        params = [weight(4, 3), weight(5)]
        groups = [{"params": params[:1], "lr": rate(2**-5)}, {"params": params[1:]}]
        optimizer = kind(groups, lr=rate(2**-7), betas=(0.9, 0.999), weight_decay=0.0)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for _ in range(6):
            for param in params:
                param.grad = param.detach() * 2
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(float(group["lr"]), *map(float, group["betas"])) for group in optimizer.param_groups])
        return seen, [param.detach() for param in params]

    (rates, weights), (torch_rates, torch_weights) = run(cls), run(AdamW)
    torch.testing.assert_close(rates, torch_rates)
    if cls is LowMemAdamW:
        torch.testing.assert_close(weights, torch_weights)


# -- stepping -------------------------------------------------------------------------------------------------------

META: dict[str, Callable[[], list[Tensor]]] = {
    "a small weight": lambda: [torch.empty(4, 3)],
    "a weight of blocks": lambda: [torch.empty(64, 128)],
    "vectors and numbers": lambda: [torch.empty(5), torch.empty(())],
    "bfloat16": lambda: [torch.empty(64, 128, dtype=torch.bfloat16)],
    "a layer": lambda: [torch.empty(6, 4), torch.empty(6)],
}


@every_class
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", META)
def test_a_step_on_the_meta_device_works(cls: type, kind: str, bits: int) -> None:
    params = [nn.Parameter(param.to("meta")) for param in META[kind]()]
    skip_unless_stored(cls, bits)
    optimizer = cls(params, state_bits=bits, min_8bit_size=0)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert state["step"].item() == 2
        assert all(tensor.is_meta for name, tensor in state.items() if name not in ("step", "proj_count"))


@every_class
def test_weights_on_the_meta_device_leave_the_others_alone(cls: type) -> None:
    """A model that is loaded in part."""
    there, alone = weight(4, 3), weight(4, 3)
    absent = nn.Parameter(torch.empty(4, 3, device="meta"))
    absent.grad = torch.empty_like(absent)
    for optimizer in (cls([absent, there], lr=0.1), cls([alone], lr=0.1)):
        for _ in range(3):
            optimizer.step()
    torch.testing.assert_close(there, alone, rtol=0, atol=0)


@every_class
@pytest.mark.parametrize("shape", [(4, 3), (64, 128), (5,)])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_shows_in_the_version_of_a_weight(cls: type, shape: tuple[int, ...], bits: int) -> None:
    """Which is how autograd knows that a weight it saved is another now."""
    param = weight(*shape)
    skip_unless_stored(cls, bits)
    optimizer = cls([param], state_bits=bits, min_8bit_size=0)
    optimizer.step()
    version = param._version
    optimizer.step()
    assert param._version > version


@every_class
def test_a_backward_pass_over_a_stepped_weight_is_torchs_error(cls: type) -> None:
    param = weight(3, 3)
    optimizer = cls([param], lr=0.1)
    optimizer.step()  # SOAP's first prepares
    inputs = torch.ones(2, 3, requires_grad=True)
    loss = ((inputs @ param).relu() @ param).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_inference_tensors_are_torchs_error(cls: type) -> None:
    with torch.inference_mode():
        param, grad = torch.ones(4, 3), torch.ones(4, 3)
    param.grad = grad
    optimizer = cls([param])
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 3))


@every_class
def test_a_step_may_be_taken_in_inference_mode(cls: type) -> None:
    inside, outside = weight(4, 3), weight(4, 3)
    ours, other = cls([inside], lr=0.1), cls([outside], lr=0.1)
    for number in range(4):
        with torch.inference_mode(number == 1):
            ours.step()
        other.step()
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@two_classes
@pytest.mark.parametrize("result", [None, 3, 2.5, torch.tensor(1.5)])
def test_a_closure_is_called_once_with_gradients_on_and_its_result_returned(cls: type, result: Any) -> None:
    enabled = []

    def closure() -> Any:
        enabled.append(torch.is_grad_enabled())
        return result

    with torch.no_grad():
        assert cls([weight(4, 3)]).step(closure) is result
    assert enabled == [True]


@every_class
def test_zero_grad_keeps_the_gradient_where_it_is_asked_to(cls: type) -> None:
    param = weight(4, 3)
    grad = param.grad
    optimizer = cls([param])
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is grad
    assert grad is not None
    assert not grad.any()
    optimizer.zero_grad()
    assert param.grad is None


def toggled(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for trains in (True, False, True):
        param.requires_grad_(trains)
        param.grad = torch.ones_like(param) if trains else None
        optimizer.step()


def no_grad_between(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    grad = param.grad
    for present in (True, False, True):
        param.grad = grad if present else None
        optimizer.step()


def state_removed(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    del optimizer.state[param]
    optimizer.step()


def another_dtype_by_default(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)


def another_device_by_default(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()


def under_autocast(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()


def gradient_with_a_graph(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference cycle
        (param**3).sum().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()


def gradient_expanded(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch.ones(()).expand(param.shape)
    optimizer.step()


def gradient_negated(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch._neg_view(torch.ones(param.shape))
    optimizer.step()
    optimizer.step()


def gradient_misaligned(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch.arange(param.numel() + 1.0)[1:].view(param.shape)
    optimizer.step()


def gradient_of_zeros(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.grad = torch._efficientzerotensor(param.shape)
    optimizer.step()


def gradient_not_finite(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    assert param.grad is not None
    param.grad[0] = float("nan")
    param.grad[1] = float("inf")
    optimizer.step()


def shared_memory(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    param.share_memory_()
    optimizer.step()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.share_memory_()
    optimizer.step()
    assert param.is_shared()
    assert all(tensor.is_shared() for state in optimizer.state.values() for tensor in state.values())


def hyperparameters_later(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.param_groups[0].update(lr=0.5, betas=[0.5, 0.5], eps=1e-3, weight_decay=0.2)
    optimizer.step()


def scaler(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):  # the second is left out
        param.grad = None
        scaler.scale((param**2).sum() * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([param], 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.state[param]["step"].item() == 2


SITUATIONS: list[Callable[[nn.Parameter, torch.optim.Optimizer], None]] = [
    toggled,
    no_grad_between,
    state_removed,
    another_dtype_by_default,
    another_device_by_default,
    under_autocast,
    gradient_with_a_graph,
    gradient_expanded,
    gradient_negated,
    gradient_misaligned,
    gradient_of_zeros,
    gradient_not_finite,
    shared_memory,
    hyperparameters_later,
    scaler,
]


@pytest.mark.parametrize("shape", [(4, 3), (2, 64), (5,)])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
def test_the_weight_ends_where_adamw_leaves_it(
    situation: Callable[[nn.Parameter, torch.optim.Optimizer], None], shape: tuple[int, ...]
) -> None:
    ours, torchs = weight(*shape), weight(*shape)
    situation(ours, LowMemAdamW([ours], lr=0.1, weight_decay=0.0))
    situation(torchs, AdamW([torchs], lr=0.1, weight_decay=0.0))
    torch.testing.assert_close(ours, torchs, equal_nan=True)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(4, 3).t(),
    "every second column": lambda: torch.randn(3, 8)[:, ::2],
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "rows of a larger weight": lambda: torch.randn(6, 4)[1:4],
    "float64": lambda: torch.randn(3, 4, dtype=torch.float64),
    "no axis": lambda: torch.randn(()),
    "no entries": lambda: torch.randn(0, 4),
    "a result that keeps its gradient": lambda: torch.randn(3, 4),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_weight_of_any_layout_ends_where_adamw_leaves_it(kind: str) -> None:
    ends = []
    for cls in (LowMemAdamW, AdamW):
        torch.manual_seed(0)
        param = LAYOUTS[kind]().requires_grad_()
        if kind == "a result that keeps its gradient":
            param = param * 1.0
            param.retain_grad()
        param.grad = torch.randn(param.shape, dtype=param.dtype)
        optimizer = cls([param], lr=0.1, weight_decay=0.0)
        for _ in range(3):
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(*ends)
    assert ends[0].stride() == ends[1].stride()


@every_class
@pytest.mark.parametrize("shape", [(3, 4), (2, 3), (12,), (4, 3, 1)])
def test_a_gradient_of_another_shape_is_an_error_and_changes_nothing(cls: type, shape: tuple[int, ...]) -> None:
    """torch lets nobody assign one, but `.data` swaps it."""
    param = weight(4, 3)
    optimizer = cls([param])
    optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(4, 3)
    param.grad.data = torch.ones(shape)
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert torch.equal(param, before)
