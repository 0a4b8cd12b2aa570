"""Released gradients: the steps of a plain run, with one gradient alive at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowmem
from hf_lowmem import buckets
from hf_lowmem.trainer.names import OPTIM_NAMES
from tests.support.slow import slow

ROUNDINGS = ["nearest", "stochastic", "kahan"]


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)).to(dtype)


def batches(number: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(96, (2, 8), generator=generator) for _ in range(number))


def trained(
    model: nn.Module, optim: str, clip: str | None, max_norm: float = 0.0, accumulated: int = 1, **options: Any
) -> tuple[Any, list[Tensor]]:
    """Train for three steps, and return the optimizer and the norms of the gradients."""
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-2, weight_decay=0.1, optim_args=options)
    release, norms = None, list[Tensor]()
    if clip is not None:
        counted = model.parameters() if clip == "recompute" else None
        bound = max_norm or float("inf") if clip == "recompute" else float("inf")
        release = optimizer.release_gradients(clip=clip, max_norm=bound, counted=counted)
    for number, tokens in enumerate(batches(3 * accumulated)):
        loss = model(input_ids=tokens, labels=tokens).loss.div(accumulated)
        release.backward(loss) if release and clip == "recompute" else loss.backward()
        if (number + 1) % accumulated:
            continue
        params, bound = list(model.parameters()), max_norm or float("inf")
        norms.append(release.clip(params, bound) if release else nn.utils.clip_grad_norm_(params, bound))
        optimizer.step()
        assert all(param.grad is None for param in params) or release is None
        optimizer.zero_grad()
    return optimizer, norms


def assert_same(model: nn.Module, optimizer: Any, other: nn.Module, other_optimizer: Any) -> None:
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, twin, rtol=0, atol=0)
        torch.testing.assert_close(optimizer.state[param], other_optimizer.state[twin], rtol=0, atol=0)


@pytest.mark.parametrize("optim", OPTIM_NAMES)
def test_every_optimizer_takes_the_steps_of_a_plain_run(optim: str) -> None:
    model = llama()
    other = copy.deepcopy(model)
    assert_same(model, trained(model, optim, None)[0], other, trained(other, optim, "none")[0])


@pytest.mark.parametrize("optim", OPTIM_NAMES)
@pytest.mark.parametrize("accumulated", [2, slow(1), slow(4)])
def test_the_host_adds_up_and_clips_as_a_plain_run(optim: str, accumulated: int) -> None:
    model = llama(tied=False)
    other = copy.deepcopy(model)
    optimizer, norms = trained(model, optim, None, 0.5, accumulated)
    released, other_norms = trained(other, optim, "host", 0.5, accumulated)
    assert min(norms) > 0.5
    torch.testing.assert_close(other_norms, norms, rtol=0, atol=0)
    assert_same(model, optimizer, other, released)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("clip", ["none", "host"])
def test_bfloat16_weights_are_rounded_as_in_a_plain_run(rounding: str, clip: str) -> None:
    model = llama(dtype=torch.bfloat16)
    other = copy.deepcopy(model)
    bound = 0.5 if clip == "host" else 0.0
    optimizer, _ = trained(model, "slim_adamw_8bit", None, bound, rounding=rounding)
    released, _ = trained(other, "slim_adamw_8bit", clip, bound, rounding=rounding)
    assert_same(model, optimizer, other, released)


def test_one_gradient_is_alive_at_a_time() -> None:
    model, alive = llama(tied=False), []
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw_8bit", lr=1e-2)

    def count(_: Tensor) -> None:
        alive.append(sum(param.grad.nbytes for param in model.parameters() if param.grad is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    optimizer.release_gradients(clip="none")
    for tokens in batches(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert len(alive) == 2 * len(list(model.parameters()))
    assert max(alive) == max(param.nbytes for param in model.parameters())


@pytest.mark.parametrize("optim", OPTIM_NAMES)
def test_every_optimizer_takes_clipped_steps_in_a_second_pass(optim: str) -> None:
    model = llama()
    other = copy.deepcopy(model)
    optimizer, norms = trained(model, optim, None, 0.5)
    released, found = trained(other, optim, "recompute", 0.5)
    assert norms == found
    assert min(norms) > 0.5
    assert_same(model, optimizer, other, released)


def test_a_pass_that_was_not_taken_twice_is_refused() -> None:
    model = llama()
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw_8bit", lr=1e-2)
    release = optimizer.release_gradients(clip="recompute", max_norm=0.5)
    (tokens,) = batches(1)

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"call optimizer\.gradient_release\.backward\(loss\) in place of"):
        loss().backward()
    assert all(map(torch.equal, model.parameters(), before.parameters()))
    optimizer.zero_grad()
    release.backward(loss())
    with pytest.raises(RuntimeError, match=r"were stepped already.* call optimizer\.step\(\) after each backward"):
        release.backward(loss())
    optimizer.step()
    release.backward(loss())
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())
    with pytest.raises(ValueError, match=r"max_norm=-1 must be a number of at least 0"):
        optimizer.release_gradients(clip="recompute", max_norm=-1)
    with pytest.raises(ValueError, match=r'max_norm=1\.0 goes with clip="recompute" alone'):
        optimizer.release_gradients(clip="host", max_norm=1.0)
    with pytest.raises(RuntimeError, match=r'Under clip="host" one backward pass is enough: call loss\.backward\(\)'):
        optimizer.release_gradients(clip="host").backward(loss())


def test_a_step_without_gradients_leaves_the_next_one_clipped() -> None:
    """Under "previous", a norm that no gradient has is not taken for the one of the step before."""
    model = llama()
    other = copy.deepcopy(model)
    for each, clip in ((model, "host"), (other, "previous")):
        optimizer = hf_lowmem.build_optimizer(each, "slim_adamw_8bit", lr=1e-2)
        optimizer.release_gradients(clip=clip)  # type: ignore[arg-type]
        assert optimizer.clip_grad_norm_(0.5) == 0
        optimizer.step()
        (tokens,) = batches(1)
        each(input_ids=tokens, labels=tokens).loss.backward()
        assert optimizer.clip_grad_norm_(0.5) > 0.5
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_what_is_prepared_for_a_step_is_kept_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[buckets.PreparedBuckets]()

    class Counted(buckets.PreparedBuckets):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(buckets, "PreparedBuckets", Counted)
    model = llama()
    trained(model, "slim_adamw_8bit", "none")
    assert sum(len(each.members) for each in made) == len(list(model.parameters()))


def test_the_norm_of_the_step_before_clips_the_next() -> None:
    model = llama()
    other = copy.deepcopy(model)
    optimizer, norms = trained(model, "adam_mini", "previous", 0.5)
    exact, _ = trained(other, "adam_mini", "host", 0.5)
    first = next(model.parameters())
    assert optimizer.state[first]["step"] == exact.state[next(other.parameters())]["step"] == 3

    model = llama()
    optimizer = hf_lowmem.build_optimizer(model, "adam_mini", lr=1e-2, weight_decay=0.1)
    scale = None
    for tokens, norm in zip(batches(3), norms, strict=True):
        model(input_ids=tokens, labels=tokens).loss.backward()
        found = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        torch.testing.assert_close(found, norm, rtol=0, atol=0)
        own = torch.clamp(0.5 / (norm + 1e-6), max=1.0)
        for param in model.parameters():
            param.grad.mul_(own if scale is None else scale)
        optimizer.step()
        optimizer.zero_grad()
        scale = own


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.ModuleList([used, unused])
    optimizer = hf_lowmem.build_optimizer(model, "lowmem_adamw", lr=1e-2, weight_decay=0.1)
    optimizer.release_gradients(clip="none")
    before = copy.deepcopy(unused.state_dict())
    used(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(unused.state_dict(), before, rtol=0, atol=0)
    assert optimizer.state[unused.weight]["step"] == 0
    assert optimizer.state[used.weight]["step"] == 1


def test_what_would_be_wrong_is_refused() -> None:
    model = nn.Linear(8, 8)
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2)
    optimizer.release_gradients(clip="none")
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"A second gradient of bias|A second gradient of weight"):
        model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"cannot be clipped to 1\.0 under clip=\"none\""):
        optimizer.clip_grad_norm_(1.0)
    optimizer.keep_gradients()
    model(torch.ones(1, 8)).sum().backward()
    assert model.weight.grad is not None
    for option in ("offload_state", "capturable", "compile"):
        other = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2, optim_args={option: True})
        with pytest.raises(ValueError, match=f"^{option}=true does not go with release=true"):
            other.release_gradients()


def test_zero_grad_discards_what_is_held() -> None:
    model = nn.Linear(8, 8)
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2)
    optimizer.release_gradients(clip="host")
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_gradients_that_are_kept_although_release_is_set_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(8, 8)
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2, optim_args="release=true")
    for _ in range(2):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    assert sum("release=true, but gradients are kept" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("change", ["add_param_group", "unfreeze"])
def test_parameters_that_are_trained_later_are_clipped_and_released(change: str) -> None:
    found = []
    for clip in (None, "host"):
        model = llama()
        late = model.lm_head.weight if change == "unfreeze" else nn.Parameter(torch.ones(64))
        optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2, weight_decay=0.0)
        late.requires_grad_(False)
        release = optimizer.release_gradients(clip=clip) if clip else None
        params = list({id(param): param for param in (*model.parameters(), late)}.values())
        for number, tokens in enumerate(batches(4)):
            if number == 1:
                late.requires_grad_(True)
                if change == "add_param_group":
                    optimizer.add_param_group({"params": [late]})
            used = late.square().sum() if number and change == "add_param_group" else 0.0
            (model(input_ids=tokens, labels=tokens).loss + used).backward()
            if release:
                release.clip(params, 0.1)
            else:
                nn.utils.clip_grad_norm_(params, 0.1)
            optimizer.step()
            assert release is None or number == 1 or all(param.grad is None for param in params)
            optimizer.zero_grad()
        found.append(params)
    for param, twin in zip(*found, strict=True):
        torch.testing.assert_close(param, twin, rtol=0, atol=0)


def test_mistakes_are_answered() -> None:
    model = llama()
    optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-2)
    for value in ("auto", "hosts", "", None, True):
        with pytest.raises(ValueError, match=r"clip=.* must be one of 'none', 'host', 'recompute', 'previous'"):
            optimizer.release_gradients(clip=value)  # type: ignore[arg-type]
    assert optimizer.gradient_release is None
    optimizer.release_gradients(clip="host")
    tokens = next(batches(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match="still to be stepped: call step or zero_grad first"):
        optimizer.release_gradients(clip="none")
    optimizer.zero_grad()
    optimizer.release_gradients(clip="none")


@pytest.mark.parametrize("kept", [True, False])
def test_the_optimizer_that_asked_last_gets_the_gradients(kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    first = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1.0)
    first.release_gradients(clip="none")
    optimizers = [first] if kept else []
    del first
    second = hf_lowmem.build_optimizer(model, "slim_adamw", lr=0.0)
    second.release_gradients(clip="none")
    before = [param.detach().clone() for param in model.parameters()]
    tokens = next(batches(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    second.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert all(second.state[param]["step"] == 1 for param in model.parameters())
    assert not optimizers or (not optimizers[0].state and optimizers[0].gradient_release is None)
    assert sum("released to another optimizer" in record.message for record in caplog.records) == kept


def test_weights_of_several_dtypes_are_clipped_by_torchs_norm() -> None:
    found = []
    for clip in (None, "host"):
        torch.manual_seed(0)
        parts = [nn.Linear(64, 96).double(), nn.Linear(96, 64).bfloat16(), nn.Linear(64, 8)]
        model = nn.ModuleList(parts)
        optimizer = hf_lowmem.build_optimizer(model, "factored_adamw", lr=1e-2, optim_args="rounding=kahan")
        release = optimizer.release_gradients(clip=clip) if clip else None
        for _ in range(3):
            hidden = torch.randn(4, 64).double()
            for part in parts:
                hidden = part(hidden.to(part.weight.dtype))
            hidden.square().mean().backward()
            params = list(model.parameters())
            norm = release.clip(params, 0.05) if release else nn.utils.clip_grad_norm_(params, 0.05)
            optimizer.step()
            optimizer.zero_grad()
        found.append([*params, norm])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_state_that_is_replaced_is_prepared_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_lowmem")
    embedding = nn.Embedding(32, 64).bfloat16()
    optimizer = hf_lowmem.build_optimizer(embedding, "slim_adamw", lr=1e-2)
    optimizer.release_gradients(clip="none")
    embedding(torch.arange(8)).square().sum().backward()
    optimizer.step()
    embedding.weight.data = torch.cat([embedding.weight.data, torch.ones(4, 64).bfloat16()])
    with pytest.raises(RuntimeError, match=r"call optimizer\.resize_state\(\) before the next step"):
        embedding(torch.arange(36)).square().sum().backward()
    embedding.weight.grad = None
    optimizer.zero_grad()
    optimizer.resize_state()
    optimizer.param_groups[0]["rounding"] = "kahan"
    embedding(torch.arange(36)).square().sum().backward()
    optimizer.step()
    assert optimizer.state[embedding.weight]["exp_avg"].shape == (36, 64)
    assert optimizer.state[embedding.weight]["step"] == 2
    assert sum("Kahan's buffers of 1 weights were started at zero" in record.message for record in caplog.records) == 1
