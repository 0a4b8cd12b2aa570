"""The optimizer classes as a user without a Trainer has them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowmem
from hf_lowmem.algorithms import AdamMini, LowMemAdamW, Signum, SlimAdamW
from tests.support.declarations import CLASSES, FULL_SPACE


def model_and_optimizer(cls: type = SlimAdamW, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    options = {"axes": (1,)} | options if cls is SlimAdamW else options
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return model, cls([{"params": matrices, **options}, {"params": vectors}], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_closure() -> None:
    model, optimizer = model_and_optimizer()
    twin, other = model_and_optimizer()
    batch = torch.randn(8, 64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    twin(batch).square().mean().backward()
    other.step()
    assert same(model, twin)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_deepcopy_and_pickle_continue_alike(bits: int) -> None:
    model, optimizer = model_and_optimizer(state_bits=bits)
    train(model, optimizer, 2)
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied_model, copied), (pickled_model, pickled)):
        train(m, o, 2, seed=1)
    assert same(model, copied_model)
    assert same(model, pickled_model)


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("cls", [declared.cls for declared in FULL_SPACE])
def test_state_dict_round_trip_is_bit_exact_and_plain(cls: type, bits: int) -> None:
    model, optimizer = model_and_optimizer(cls, state_bits=bits)
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, other = model_and_optimizer(cls, state_bits=bits)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(state_dict=saved)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine)
        assert not {t.data_ptr() for t in theirs.values()} & {t.data_ptr() for t in saved["state"][0].values()}
    train(model, optimizer, 3, seed=1)
    train(twin, other, 3, seed=1)
    assert same(model, twin)


def test_loading_hyperparameters_as_torch_does() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.5
    _, other = model_and_optimizer()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.5


def test_add_param_group() -> None:
    _, optimizer = model_and_optimizer()
    extra = nn.Parameter(torch.ones(4, 6))
    optimizer.add_param_group({"params": extra, "axes": (0,), "lr": 1.0})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert optimizer.state[extra]["exp_avg_sq"].shape == (1, 6)
    torch.testing.assert_close(extra.detach(), torch.zeros(4, 6), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="axes"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3)), "axes": (1,)})
    assert len(optimizer.param_groups) == 3


def test_parameters_without_gradient_are_left_alone() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(4, 64)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = SlimAdamW([used, unused, frozen], lr=0.1, weight_decay=0.5, axes=(1,))
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(4, 64))
    assert optimizer.state[unused]["step"] == 0, "state exists from the first step on, for all ranks to agree"
    assert frozen not in optimizer.state
    unused.grad = torch.ones_like(unused)
    optimizer.step()
    assert (optimizer.state[used]["step"], optimizer.state[unused]["step"]) == (2, 1)


@pytest.mark.parametrize("cls", [LowMemAdamW, SlimAdamW, Signum])
def test_weights_on_two_devices_share_no_temporary(cls: type, force: Any) -> None:
    force("tiles")
    params = [nn.Parameter(torch.ones(4, 64, device=device)) for device in ("meta", "cpu")]
    optimizer = cls(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.full((4, 64), 0.9), atol=1e-2, rtol=0)


@pytest.mark.parametrize("cls", [LowMemAdamW, SlimAdamW, Signum])
def test_sparse_and_complex_get_a_clear_error(cls: type) -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = cls(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"Complex parameters.*view_as_real"):
        cls([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"state_bits": 4}, "state_bits=4 .* 32, 16, 8"),
        ({"block_size": 100}, "block_size=100 .* 256, 128, 64"),
        ({"min_8bit_size": -1}, "min_8bit_size"),
        ({"rows_per_block": 0}, "rows_per_block"),
        ({"rows_per_block": 3, "axes": (1,)}, "rows_per_block=3 does not divide"),
        ({"axes": (5,)}, "axes"),
    ],
)
def test_bad_hyperparameters(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimAdamW([nn.Parameter(torch.ones(4, 4))], **options)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((("a", 0, 1, 0, 2, (1,), 1),), "cover 2 of 4"),
        ((("a", 0, 1, 0, 2, (1,), 1), ("b", 0, 1, 3, 4, (1,), 1)), "gap"),
        ((("a", 0, 1, 0, 3, (1,), 1), ("b", 0, 1, 2, 4, (1,), 1)), "overlaps"),
        ((("a", 0, 1, 0, 2, (1,), 1), ("a", 0, 1, 2, 4, (1,), 1)), "different names"),
        ((("a", 0, 1, 0, 2, (1,), 1), ("b", 1, 1, 2, 4, (1,), 1)), "share one axis"),
        ((("a", 0, 1, 0, 4, (-1,), 1),), "does not fit"),
        ((("a", 0, 1, 0, 4, (1,), 3),), "whole blocks"),
    ],
)
def test_segments_cover_a_weight_exactly_once(segments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlimAdamW([nn.Parameter(torch.ones(4, 4))], segments=segments)


def test_lists_are_as_good_as_tuples() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones_like(param)
    optimizer = SlimAdamW([{"params": [param], "axes": [1]}])
    optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].shape == (4, 1)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SlimAdamW([])
    with pytest.raises(ValueError, match="no parameter to train"):
        SlimAdamW([{"params": []}])


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ((SlimAdamW, {"axes": (1,)}), (AdamMini, {"axes": (1,)}), "written by adam_mini, not by slim_adamw"),
        ((SlimAdamW, {"axes": (1,)}), (torch.optim.SGD, {}), "written by another optimizer, not by slim_adamw"),
        ((SlimAdamW, {"axes": (1,)}), (SlimAdamW, {"axes": (0,)}), r"axes=\(0,\), expected \(1,\)"),
        ((SlimAdamW, {"state_bits": 8}), (SlimAdamW, {"state_bits": 32}), "state_bits=32, expected 8"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(mine: tuple, theirs: tuple, message: str) -> None:
    param = nn.Parameter(torch.ones(64, 64))
    param.grad = torch.ones_like(param)
    other = theirs[0]([param], **theirs[1])
    other.step()
    optimizer = mine[0]([param], **mine[1])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())


def test_a_checkpoint_with_embeddings_in_float32_asks_for_them() -> None:
    """That was the default of `lowmem_adamw_8bit` once."""
    model = nn.ModuleDict({"tokens": nn.Embedding(96, 64), "layer": nn.Linear(64, 96)})

    def build(**options: int) -> torch.optim.Optimizer:
        return hf_lowmem.build_optimizer(model, "lowmem_adamw_8bit", lr=1e-3, optim_args=options)

    saved = build(embedding_bits=32)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    saved.step()
    with pytest.raises(ValueError, match=r"state_bits=32, expected 8 for tokens\.weight .* set embedding_bits=32\)"):
        build().load_state_dict(saved.state_dict())
    resumed = build(embedding_bits=32)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.state[model["tokens"].weight]["exp_avg"].dtype == torch.float32


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    saved = []
    for shape in ((64, 64), (64, 32)):
        param = nn.Parameter(torch.ones(shape))
        param.grad = torch.ones_like(param)
        optimizer = SlimAdamW([param], axes=(1,))
        optimizer.step()
        saved.append(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(64, 64\).*expected \(64, 32\)"):
        optimizer.load_state_dict(saved[0])


def test_grad_scaler() -> None:
    model, optimizer = model_and_optimizer(state_bits=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 64)).square().mean()).backward()
        if bad:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved is not bad
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("cls", CLASSES)
def test_the_state_of_a_single_number_is_loaded(cls):
    """Its moments have no axes, as counts have none, but may be negative."""
    weight = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = cls([weight], lr=1e-2)
    for _ in range(2):
        weight.grad = torch.tensor(-1.0)
        optimizer.step()
    resumed = cls([torch.nn.Parameter(weight.detach().clone())], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    (mine,), (theirs,) = optimizer.state.values(), resumed.state.values()
    torch.testing.assert_close(theirs, mine, rtol=0, atol=0)
