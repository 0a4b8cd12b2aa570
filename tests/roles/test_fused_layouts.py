"""The fused layouts by what the models do: a part called `key` must change the cached keys only."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from hf_lowmem.roles import ParamRole, assign_roles
from tests.support.expected_roles import EXPECTED, part_rows
from tests.support.model_families import DECODER_LMS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


TOKENS = torch.arange(3, 11).unsqueeze(0)
FUSED_ATTENTION = [family for family in DECODER_LMS if any("qkv" in role.role for role in EXPECTED[family].values())]
FUSED_MLP = ["phi3", "glm4", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "modernbert"]
FUSED_MLP += ["moshi", "jetmoe"]


def seeded_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    for param in model.parameters():  # far above rounding, and too small for gpt-oss to clamp its activations
        if param.ndim > 1:
            nn.init.normal_(param, std=0.1)
    return model


def first_fused(model: nn.Module, *names: str) -> tuple[nn.Parameter, ParamRole]:
    return next((param, found) for param, found in assign_roles(model) if found.role in names)


def scale_rows(weight: nn.Parameter, axis: int, rows: torch.Tensor, factor: float) -> None:
    with torch.no_grad():
        weight.index_copy_(axis, rows, weight.index_select(axis, rows) * factor)


def first_layer(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention probabilities, cached keys and cached values of layer 0, each with the head axis first."""
    output = model(TOKENS, use_cache=True, output_attentions=True)
    cache = output.past_key_values.layers[0]
    return tuple(tensor[0].clone() for tensor in (output.attentions[0], cache.keys, cache.values))


def changed_heads(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return [head for head in range(len(before)) if not torch.allclose(before[head], after[head], atol=1e-6)]


@pytest.mark.parametrize("family", FUSED_ATTENTION)
@torch.no_grad()
def test_each_head_of_a_fused_projection_is_where_its_part_says(family: str) -> None:
    """Scaling one head's query, key or value rows changes that head of that tensor in layer 0, and no other."""
    model = seeded_model(family)
    model.set_attn_implementation("eager")
    weight, found = first_fused(model, "attention_qkv")
    assert found.fan_out is not None
    assert found.head_dim is not None
    before = first_layer(model)
    tensors = {"attention_query": 0, "attention_key": 1, "attention_value": 2}
    assert [part.role for part in found.parts] == list(tensors)
    for part in found.parts:
        rows = part_rows(part, weight.shape[found.fan_out])
        for head, head_rows in enumerate(rows.split(found.head_dim)):
            scale_rows(weight, found.fan_out, head_rows, 2.0)
            after = first_layer(model)
            scale_rows(weight, found.fan_out, head_rows, 0.5)
            index = tensors[part.role]
            # Falcon caches its shared keys and values once per query head
            repeats = len(before[index]) * found.head_dim // len(rows)
            heads = list(range(head * repeats, (head + 1) * repeats))
            assert heads
            assert changed_heads(before[index], after[index]) == heads, part
            assert all(not changed_heads(before[other], after[other]) for other in {1, 2} - {index}), part


@torch.no_grad()
def test_each_head_of_the_mla_up_projection_is_where_its_part_says() -> None:
    """DeepSeek caches the latent, so its own `expand_kv` is asked for the keys and values."""
    model = seeded_model("deepseek_v3")
    weight, found = first_fused(model, "attention_key_value")
    block = model.model.layers[0].self_attn
    latent, rotary = torch.randn(1, 1, 5, block.kv_lora_rank), torch.randn(1, 1, 5, block.qk_rope_head_dim)
    before = [states[0] for states in block.expand_kv(latent, rotary)]
    assert [part.role for part in found.parts] == ["attention_key", "attention_value"]
    for index, part in enumerate(found.parts):
        for head, head_rows in enumerate(part_rows(part, len(weight)).chunk(block.num_heads)):
            scale_rows(weight, 0, head_rows, 2.0)
            after = [states[0] for states in block.expand_kv(latent, rotary)]
            scale_rows(weight, 0, head_rows, 0.5)
            assert changed_heads(before[index], after[index]) == [head], part
            assert changed_heads(before[1 - index], after[1 - index]) == [], part


@pytest.mark.parametrize("family", FUSED_MLP)
@torch.no_grad()
def test_the_mlp_is_affine_in_the_up_part_and_not_in_the_gate_part(family: str) -> None:
    model = seeded_model(family)
    weight, found = first_fused(model, "mlp_gate_up")
    assert found.fan_out is not None
    block = model.get_submodule(found.name.removesuffix(".weight").rpartition(".")[0])
    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    original, bent = weight.clone(), {}
    for part in found.parts:
        for factor in (1.0, 2.0, 0.0):
            weight.copy_(original)
            scale_rows(weight, found.fan_out, part_rows(part, weight.shape[found.fan_out]), factor)
            model(TOKENS)
        weight.copy_(original)
        once, twice, none = outputs[-3:]
        bent[part.role] = ((twice + none - 2 * once).abs().max() / once.abs().max()).item()
    assert bent["mlp_up"] < 1e-5
    assert bent["mlp_gate"] > 1e-2


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt2", "transformer.h.0.mlp.c_proj"),
        ("llama", "model.layers.0.mlp.down_proj"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
        ("llama4", "model.layers.1.feed_forward.experts.down_proj"),
    ],
)
@torch.no_grad()
def test_a_slice_of_fan_out_changes_one_output_feature(family: str, name: str) -> None:
    model = seeded_model(family)
    weight, found = next(pair for pair in assign_roles(model) if pair[1].name.removesuffix(".weight") == name)
    assert found.fan_out is not None
    block = model.get_submodule(name if found.expert_axis is None else name.rpartition(".")[0])
    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda _module, _args, output: outputs.append(output.flatten(0, -2)))
    for factor in (1.0, 2.0):
        scale_rows(weight, found.fan_out, torch.tensor([5]), factor)
        model(TOKENS)
    assert changed_heads(outputs[0].T, outputs[1].T) == [5]
