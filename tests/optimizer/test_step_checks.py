"""Before a step writes anything, weights, gradients and state are compared with what was planned."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, CoapAdafactor, CoapAdamW, LowMemAdamW, Signum, SlimAdamW, Smmf, Soap
from hf_lowmem.kernels import forced, registry
from hf_lowmem.kernels.registry import warn_of_slow_steps
from hf_lowmem.moments import Full, GroupMean, RowColMean, whole
from hf_lowmem.state import StatePlan

CLASSES: list[tuple[type, dict[str, Any]]] = [
    (LowMemAdamW, {}),
    (LowMemAdamW, {"state_bits": 8, "min_8bit_size": 0}),
    (SlimAdamW, {"axes": (1,)}),
    (SlimAdamW, {"axes": (0,), "state_bits": 8, "min_8bit_size": 0}),
    (AdamMini, {"axes": (1,), "rows_per_block": 4}),
    (Signum, {"state_bits": 16}),
    (CoapAdamW, {"rank": 4}),
    (CoapAdafactor, {"rank": 4}),
    (Soap, {}),
]
IDS = [f"{cls.__name__}-{number}" for number, (cls, _) in enumerate(CLASSES)]
EACH = pytest.mark.parametrize(("cls", "options"), CLASSES, ids=IDS)


def stepped(cls: type, options: dict[str, Any], shape: tuple[int, ...] = (64, 64)) -> tuple[nn.Parameter, Any]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape))
    optimizer = cls([param], lr=1e-2, **options)
    for _ in range(2):
        param.grad = torch.randn(shape)
        optimizer.step()
    return param, optimizer


def untouched_by(act: Callable[[], Any], optimizer: Any, error: type[Exception], message: str) -> None:
    """`act` raises, and neither a weight nor any state has changed."""
    before = copy.deepcopy([(p.data, dict(optimizer.state[p])) for g in optimizer.param_groups for p in g["params"]])
    with pytest.raises(error, match=message) as raised:
        act()
    assert "\n" not in str(raised.value)
    after = [(p.data, dict(optimizer.state[p])) for g in optimizer.param_groups for p in g["params"]]
    for (weight, state), (weight_after, state_after) in zip(before, after, strict=True):
        assert torch.equal(weight, weight_after)
        assert state.keys() == state_after.keys()
        assert all(torch.equal(state[name], state_after[name]) for name in state)


# -- the weight -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(72, 64), (48, 64), (64, 72), (64,), (32, 128)])
@EACH
def test_a_weight_of_another_shape_is_refused(cls: type, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    bystander, param = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer = cls([bystander, param], lr=1e-2, **options)
    for _ in range(2):
        for each in (bystander, param):
            each.grad = torch.randn(64, 64)
        optimizer.step()
    param.data = torch.randn(shape)
    for grad in (param.grad, torch.randn(shape)):
        param.grad = None
        param.grad = grad if grad.shape == param.shape else None
        if param.grad is not None:
            untouched_by(optimizer.step, optimizer, RuntimeError, r"was made for \(64, 64\).*resize_state")


@EACH
def test_a_gradient_of_another_shape_is_refused(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)
    weight = param.data
    param.data = torch.randn(32, 64)
    param.grad = torch.randn(32, 64)
    param.data = weight
    for act in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        untouched_by(
            act, optimizer, RuntimeError, r"gradient of shape \(32, 64\).*does not fit its weight.*\(64, 64\)"
        )


NOT_BY_ROWS = {"micro_adam", "smmf"}  # the state of these names is laid out over the entries of the whole weight


@pytest.mark.parametrize("optim", hf_lowmem.optim_names())
def test_a_vocabulary_grows_and_shrinks_in_mid_training(optim: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-3, optim_args={"min_8bit_size": 0})
    embedding = model.get_input_embeddings().weight

    def backward() -> None:
        optimizer.zero_grad()
        ids = torch.arange(16)[None]
        model(input_ids=ids, labels=ids).loss.backward()

    for _ in range(2):
        backward()
        optimizer.step()
    rows = {name: tensor.clone() for name, tensor in optimizer.state[embedding].items()}
    for vocabulary in (104, 80):
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        assert model.get_input_embeddings().weight is embedding
        backward()
        with pytest.raises(RuntimeError, match=r"embed_tokens.*resize_state"):
            optimizer.step()
        if optim in NOT_BY_ROWS:
            untouched_by(optimizer.resize_state, optimizer, RuntimeError, "embed_tokens.*cannot be carried over")
            return
        optimizer.resize_state()
        for name, tensor in optimizer.state[embedding].items():
            if tensor.ndim and tensor.shape[0] == vocabulary:
                assert torch.equal(tensor[:80], rows[name][:80])
                assert not tensor[96:].any()
            elif name == "exp_avg_sq_col" and not optim.startswith("coap"):  # scaled, see test_factored_adamw.py
                torch.testing.assert_close(tensor / tensor.mean(), rows[name] / rows[name].mean())
            else:
                assert torch.equal(tensor, rows[name])
        before = embedding.detach().clone()
        optimizer.step()
        assert embedding.isfinite().all()
        assert not torch.equal(before, embedding)
        rows = {name: tensor.clone() for name, tensor in optimizer.state[embedding].items()}


def test_state_is_carried_over_by_rows_alone() -> None:
    param, optimizer = stepped(LowMemAdamW, {})
    optimizer.resize_state()  # nothing has changed
    param.data = torch.randn(64, 80)
    untouched_by(optimizer.resize_state, optimizer, RuntimeError, "cannot be carried over")
    for cls, options in ((CoapAdamW, {"rank": 4}), (Smmf, {})):
        param, optimizer = stepped(cls, options)
        param.data = torch.randn(80, 64)
        with pytest.raises(RuntimeError, match="cannot be carried over"):
            optimizer.resize_state()


@EACH
def test_a_freed_storage_is_refused(cls: type, options: dict[str, Any]) -> None:
    """As sharded training frees it between uses."""
    for which in ("weight", "gradient", "state"):
        param, optimizer = stepped(cls, options)
        state = optimizer.state[param]
        tensor = {"weight": param.data, "gradient": param.grad, "state": state["exp_avg"]}[which]
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"storage|strides"):
            optimizer.step()


def test_a_step_is_seen_by_autograd() -> None:
    """A weight that was changed between forward and backward pass is an error, not a wrong gradient."""
    param, optimizer = stepped(SlimAdamW, {"axes": (1,)})
    loss = param.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- the gradient ---------------------------------------------------------------------------------------------------


@EACH
def test_the_negative_bit_is_read(cls: type, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(64, 64), [torch.randn(64, 64) for _ in range(3)]
    found = []
    for negative in (lambda grad: torch._neg_view(grad), lambda grad: -grad):
        param = nn.Parameter(start.clone())
        optimizer = cls([param], lr=1e-2, **options)
        for grad in grads:
            param.grad = negative(grad.clone())
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)


def test_the_imaginary_part_of_a_conjugate_is_read() -> None:
    """It has the negative bit, and strides of two."""
    numbers = torch.randn(64, 64, dtype=torch.complex64)
    found = []
    for grad in (numbers.conj().imag, numbers.conj().imag.clone()):
        param = nn.Parameter(torch.ones(64, 64))
        param.grad = grad
        SlimAdamW([param], lr=1e-2, axes=(1,)).step()
        found.append(param.detach())
    assert torch.equal(*found)


def test_sparse_gradients_are_refused_before_anything_is_written() -> None:
    param, optimizer = stepped(LowMemAdamW, {})
    param.grad = torch.eye(64).to_sparse()
    untouched_by(optimizer.step, optimizer, RuntimeError, "does not support sparse gradients")


def test_sparse_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout torch.sparse_coo.*dense"):
        LowMemAdamW([nn.Parameter(torch.eye(4).to_sparse())])


# -- the state ------------------------------------------------------------------------------------------------------


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Equal, with other strides."""
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def spread(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None].expand(2, *tensor.shape)[1]


@pytest.mark.parametrize("restride", [transposed, spread, expanded])
@EACH
def test_state_of_any_strides_loads(cls: type, options: dict[str, Any], restride: Callable) -> None:
    param, optimizer = stepped(cls, options)
    saved = optimizer.state_dict()
    saved["state"] = {key: {n: restride(t) for n, t in state.items()} for key, state in saved["state"].items()}
    twin = nn.Parameter(param.detach().clone())
    other = cls([twin], lr=1e-2, **options)
    other.load_state_dict(saved)
    for _ in range(2):
        param.grad = torch.randn(64, 64)
        twin.grad = param.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(param, twin)
    assert all(tensor.is_contiguous() for tensor in other.state[twin].values())


@pytest.mark.parametrize(
    "replace",
    [
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor[:32],
        lambda tensor: torch._neg_view(tensor),
    ],
    ids=["strides", "dtype", "device", "shape", "negative"],
)
def test_state_that_was_replaced_is_refused(replace: Callable) -> None:
    param, optimizer = stepped(Signum, {"state_bits": 16})
    optimizer.state[param]["exp_avg"] = replace(optimizer.state[param]["exp_avg"])
    with pytest.raises(RuntimeError, match=r"'exp_avg'"):
        optimizer.step()


@pytest.mark.parametrize("value", [7, None, [1.0]])
@pytest.mark.parametrize("key", ["step", "exp_avg"])
def test_state_that_is_no_tensor_is_refused(key: str, value: Any) -> None:
    param, optimizer = stepped(LowMemAdamW, {})
    optimizer.state[param][key] = value
    with pytest.raises(RuntimeError, match=rf"optimizer state '{key}' is"):
        optimizer.step()


def test_state_that_was_moved_in_place_is_refused() -> None:
    param, optimizer = stepped(LowMemAdamW, {})
    optimizer.state[param]["exp_avg"].data = torch.zeros(64, 32)
    with pytest.raises(RuntimeError, match=r"'exp_avg' has shape \(64, 32\)"):
        optimizer.step()


def test_state_that_was_replaced_by_its_like_is_used() -> None:
    param, optimizer = stepped(LowMemAdamW, {})
    twin, other = copy.deepcopy((param, optimizer))
    state = optimizer.state[param]
    state["exp_avg"] = state["exp_avg"].clone()
    for p, o in ((param, optimizer), (twin, other)):
        p.grad = torch.ones(64, 64)
        o.step()
    assert torch.equal(param, twin)
    assert torch.equal(state["exp_avg"], other.state[twin]["exp_avg"])


@EACH
def test_an_optimizer_keeps_no_gradient_alive(cls: type, options: dict[str, Any]) -> None:
    """Its memory is what the next backward pass needs; nor does it keep state that is being moved away."""
    param, optimizer = stepped(cls, options)
    for _ in range(2):
        param.grad = torch.randn(64, 64)
        held = weakref.ref(param.grad)
        optimizer.clip_grad_norm_(1.0)
        param.grad = None
        assert held() is None
        param.grad = torch.randn(64, 64)
        held = weakref.ref(param.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert held() is None
    optimizer.param_groups[0]["offload_state"] = True
    moments = [weakref.ref(tensor) for name, tensor in optimizer.state[param].items() if name != "step"]
    optimizer.release_state()
    for name in list(optimizer.state[param]):
        optimizer.state[param][name] = optimizer.state[param][name].clone()
    assert all(moment() is None for moment in moments)


@EACH
def test_what_users_keep_beside_the_state_stays(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)
    twin, other = copy.deepcopy((param, optimizer))
    optimizer.state[param] |= {"note": 3, "sparse": torch.eye(3).to_sparse(), "name": "w"}
    for _ in range(2):
        for p, o in ((param, optimizer), (twin, other)):
            p.grad = torch.ones(64, 64)
            o.step()
    assert torch.equal(param, twin)
    assert optimizer.state[param]["note"] == 3


# -- kernels are found by all that a plan is made of ----------------------------------------------------------------


MOMENTS = {
    "mean": whole((64, 64), (1,)),
    "column mean": whole((64, 64), (0,)),
    "rows and columns": RowColMean(),
    "unsigned": Full(signed=False),
}


@pytest.mark.parametrize("second", ["Full", "GroupMean"])
@pytest.mark.parametrize("first", MOMENTS)
def test_a_first_moment_of_another_kind_takes_no_kernel(first: str, second: str, caplog) -> None:
    class Other(LowMemAdamW):
        @classmethod
        def make_plan(cls, shape: tuple[int, ...], **options: Any) -> StatePlan:
            plan = super().make_plan(shape, **options)
            exp_avg_sq = Full(signed=False) if second == "Full" else GroupMean(whole(shape, (1,)).segments)
            return StatePlan({"exp_avg": MOMENTS[first], "exp_avg_sq": exp_avg_sq}, plan.codec)

    warn_of_slow_steps.cache_clear()
    caplog.set_level(logging.WARNING, logger="hf_lowmem")
    param, optimizer = stepped(Other, {})
    assert param.isfinite().all()
    specs = optimizer.plan_of(param).specs((64, 64))
    assert {n: t.shape for n, t in optimizer.state[param].items()} == {n: s.shape for n, s in specs.items()}
    assert caplog.text.count("no kernel covers them") == 1


def test_a_rule_without_a_kernel_says_so_once(monkeypatch, caplog) -> None:
    warn_of_slow_steps.cache_clear()
    slow = {name: backend for name, backend in registry.BACKENDS.items() if backend.is_slow}
    monkeypatch.setattr(registry, "BACKENDS", slow)
    caplog.set_level(logging.WARNING, logger="hf_lowmem")
    for cls, options in CLASSES:
        stepped(cls, options)
    said = [record.getMessage() for record in caplog.records if "no kernel covers them" in record.getMessage()]
    assert len(said) == len(set(said)) >= 6
    assert any("'signum'" in message and "BFloat16" in message for message in said)


@pytest.mark.parametrize("storage", [{}, {"state_bits": 8, "min_8bit_size": 0}, {"rounding": "kahan"}])
@pytest.mark.parametrize("cls", [LowMemAdamW, Signum])
@pytest.mark.parametrize("shape", [(96, 64), (5,), (7, 3, 64), ()])
def test_an_elementwise_rule_runs_in_tiles(cls, storage, shape, monkeypatch) -> None:
    """Each tile gives the bits that the whole weight gives."""
    found = []
    for backend, tile in (("rule", 1), ("tiles", 100)):
        monkeypatch.setattr("hf_lowmem.kernels.means.TILE", tile)
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(shape).to(torch.bfloat16 if "rounding" in storage else torch.float32))
        optimizer = cls([param], lr=1e-2, **storage)
        for _ in range(3):
            param.grad = torch.randn(shape).to(param.dtype)
            with forced(backend):
                optimizer.step()
        found.append([param.detach(), *optimizer.state[param].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_compiled_step_is_the_step(bits: int, clips: bool) -> None:
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        optimizer = SlimAdamW(model.parameters(), lr=1e-2, state_bits=bits, min_8bit_size=0)

        def step(optimizer: Any = optimizer) -> None:
            if clips:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()

        take = torch.compile(step) if compiled else step
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 64)).square().mean().backward()
            take()
        found.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.compiler
@pytest.mark.slow
def test_a_compiled_training_step_is_the_step() -> None:
    """Forward pass, backward pass, clipping and step in one function, as people compile it."""
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        optimizer = AdamMini([{"params": [p], "axes": (p.ndim - 1,)} for p in model.parameters()], lr=1e-2)

        def train(batch: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        take = torch.compile(train) if compiled else train
        for _ in range(3):
            take(torch.randn(8, 64))
        found.append([param.detach() for param in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- after the state is gone, or was made for another weight --------------------------------------------------------


@EACH
def test_cleared_state_is_made_anew_for_the_weight_as_it_is(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)
    optimizer.state.clear()
    param.data, param.grad = torch.randn(32, 64), None
    param.grad = torch.randn(32, 64)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].shape[0] in (32, 4)
    assert param.isfinite().all()


def test_an_expanded_weight_is_refused() -> None:
    param = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    optimizer = SlimAdamW([param])
    param.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()


def test_host_copies_fit_the_state_of_now(monkeypatch) -> None:
    """A weight may have been resized, or its dtype changed, since its state was last moved to the host."""
    monkeypatch.setattr("hf_lowmem.placement.on_accelerator", lambda tensor: tensor.ndim > 0)
    monkeypatch.setattr("torch.empty_like", lambda t, **_: torch.empty(t.shape, dtype=t.dtype))
    param, optimizer = stepped(LowMemAdamW, {"offload_state": True})
    optimizer.release_state()
    param.data, param.grad = torch.randn(72, 64), None
    param.grad = torch.randn(72, 64)
    optimizer.resize_state()
    optimizer.step()
    optimizer.release_state()
    param.data, param.grad = param.data.double(), None
    param.grad = torch.randn(72, 64, dtype=torch.float64)
    optimizer.step()
    before = optimizer.state[param]["exp_avg"].clone()
    optimizer.release_state()
    assert torch.equal(optimizer.state[param]["exp_avg"], before)
    assert before.dtype == torch.float64


# -- memory that is not the weight's own, and views that change in place -------------------------------------------


@EACH
def test_functional_tensors_have_no_address(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)

    def step(grad: torch.Tensor) -> torch.Tensor:
        param.grad = grad * 2
        optimizer.step()
        return grad

    with pytest.raises(RuntimeError):
        torch.func.functionalize(step)(torch.ones(64, 64))


@EACH
def test_a_weight_that_becomes_a_negative_view_is_refused(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)
    param.data = torch._neg_view(param.data)
    param.grad = torch.ones(64, 64)
    with pytest.raises(RuntimeError, match="entries as they are"):
        optimizer.step()


@EACH
def test_state_that_was_resized_in_place_is_refused(cls: type, options: dict[str, Any]) -> None:
    param, optimizer = stepped(cls, options)
    optimizer.state[param]["exp_avg"].resize_(2, 2)
    with pytest.raises(RuntimeError, match=r"'exp_avg' has shape \(2, 2\)"):
        optimizer.step()


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize(("cls", "options"), [(SlimAdamW, {"axes": (1,)}), (Signum, {})])
def test_weights_that_share_memory_are_stepped_one_after_the_other(cls: type, options: dict, shift: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        memory = torch.randn(601_000)
        grads = [[torch.randn(600, 1000) for _ in range(2)] for _ in range(3)]
        found = []
        for together in (True, False):
            mine = memory.clone()
            params = [nn.Parameter(mine[at : at + 600_000].view(600, 1000)) for at in (0, shift)]
            groups = [params] if together else [[param] for param in params]
            optimizers = [cls(group, lr=0.01, weight_decay=0.5, **options) for group in groups]
            for step in grads:
                for param, grad in zip(params, step, strict=True):
                    param.grad = grad
                for optimizer in optimizers:
                    optimizer.step()
            found.append(mine)
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)


def test_one_groups_dict_serves_two_optimizers() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(8, 8))]}]
    first, _ = LowMemAdamW(groups), SlimAdamW(groups)
    saved = first.state_dict()
    LowMemAdamW([nn.Parameter(torch.ones(8, 8))]).load_state_dict(saved)


@pytest.mark.parametrize(
    ("weight", "grad"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float32)],
)
@EACH
def test_gradients_may_have_another_dtype(cls: type, options: dict[str, Any], weight, grad) -> None:
    param = nn.Parameter(torch.randn(64, 64).to(weight))
    param.grad_dtype = None
    optimizer = cls([param], lr=1e-2, **options)
    for _ in range(3):
        param.grad = torch.randn(64, 64, dtype=grad)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    assert param.isfinite().all()


def test_norms_of_float64_gradients_are_float64() -> None:
    for size in (1e25, 1e-25):
        param = nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
        param.grad = torch.randn(8, 8, dtype=torch.float64) * size
        norm = LowMemAdamW([param]).clip_grad_norm_(1.0)
        torch.testing.assert_close(norm, param.grad.norm(), rtol=1e-12, atol=0)
