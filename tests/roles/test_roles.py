"""The roles of modules by themselves: names, wrappers, adapters, convolutions, and models that cannot be read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as tf

import hf_lowmem
from hf_lowmem import roles
from hf_lowmem.roles import FusedPart, ParamRole, assign_roles, canonical_name
from tests.support.expected_roles import qkv
from tests.support.model_families import VOCAB_SIZE, meta_model, tiny_model


def only(model: nn.Module, role: str) -> ParamRole:
    (found,) = [found for _, found in assign_roles(model) if found.role == role]
    return found


def test_tied_embedding_is_one_token_embedding() -> None:
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB_SIZE, tie_word_embeddings=True
        )
    )
    found = [role for param, role in assign_roles(model) if param is model.lm_head.weight]
    assert [(role.name, role.role, role.tied) for role in found] == [
        ("model.embed_tokens.weight", "token_embedding", True)
    ]


def test_gpt2_cross_attention_has_keys_then_values() -> None:
    config = tf.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)
    found = only(tf.GPT2LMHeadModel(config), "attention_key_value")
    assert found.name == "transformer.h.0.crossattention.c_attn.weight"
    assert found.parts == (FusedPart("attention_key", 1, 0, 32), FusedPart("attention_value", 1, 32, 64))
    assert (found.fan_out, found.fan_in, found.head_dim) == (1, (0,), 8)


def test_multihead_attention_keeps_its_three_thirds() -> None:
    model = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=48)
    found = {role.name: role for _, role in assign_roles(model)}
    assert found["self_attn.in_proj_weight"].parts == qkv(1, 32, 64, 96)
    assert found["self_attn.in_proj_weight"].head_dim == 8
    assert found["self_attn.in_proj_bias"].role == "bias"
    assert found["self_attn.out_proj.weight"].role == "attention_output"
    assert found["linear1.weight"].role == "mlp_up"
    assert found["linear2.weight"].role == "mlp_down"


def test_fused_weight_without_a_known_model_type_has_no_parts() -> None:
    class CausalSelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(8, 24, bias=False)

    found = only(CausalSelfAttention(), "attention_qkv")
    assert found.parts == ()
    assert found.head_dim is None
    assert "layout unknown" in found.why


def test_names_are_read_exactly_and_never_from_the_path() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj_adapter = nn.Linear(4, 4, bias=False)
            self.q_proj = nn.ModuleDict({"anything": nn.Linear(4, 4, bias=False)})
            self.gate = nn.Linear(4, 600, bias=False)  # too many outputs for a router
            self.mixer_weight = nn.Parameter(torch.zeros(4, 4))

    assert {role.role for _, role in assign_roles(Odd())} == {"unknown"}
    axes = {role.name: role.fan_out for _, role in assign_roles(Odd())}
    assert axes["v_proj_adapter.weight"] == 0
    assert axes["mixer_weight"] is None


def test_a_key_in_a_feed_forward_is_not_an_attention_key() -> None:
    class RwkvFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(4, 8, bias=False)

    assert assign_roles(RwkvFeedForward())[0][1].role == "unknown"


def test_gate_beside_up_is_an_mlp_gate_and_beside_experts_a_router() -> None:
    class MLP(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(4, 4, bias=False))

    found = [role.role for _, role in assign_roles(nn.ModuleDict({"mlp": MLP("gate", "up", "down")}))]
    assert found == ["mlp_gate", "mlp_up", "mlp_down"]
    assert [role.role for _, role in assign_roles(nn.ModuleDict({"mlp": MLP("gate")}))] == ["router"]


def roles_of(model: nn.Module) -> list[str]:
    return [found.role for _, found in assign_roles(model)]


def bare(fan_in: int = 4, fan_out: int = 4) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


def test_a_wrapper_lends_its_name_to_its_one_linear() -> None:
    def attention_with(**wrapped: nn.Module) -> nn.Module:
        return nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.ModuleDict(wrapped)})})

    assert roles_of(attention_with(linear=bare())) == ["attention_query"]
    assert roles_of(attention_with(linear=bare(), batch_norm=nn.BatchNorm1d(4)))[0] == "attention_query"
    assert roles_of(attention_with(linear=bare(), other=bare())) == ["unknown", "unknown"]
    assert roles_of(attention_with(inner=bare())) == ["unknown"]
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"linear": bare()})})
    assert roles_of(nn.ModuleDict({"layers": block})) == ["unknown"], "a block is no wrapper"


def test_a_list_lends_its_name_to_what_it_holds() -> None:
    heads = nn.ModuleDict({"decoder": nn.ModuleDict({"lm_heads": nn.ModuleList([bare(), bare()])})})
    assert roles_of(heads) == ["lm_head", "lm_head"]
    assert roles_of(nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([bare()])})})) == ["unknown"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([bare(4, 8), nn.GELU(), bare(8, 4)], ["mlp_up", "mlp_down"]),
        ([bare(4, 8), nn.GELU(), nn.Dropout(), bare(8, 4)], ["mlp_up", "mlp_down"]),
        ([bare(4, 8), nn.GELU(), bare(8, 8), nn.GELU(), bare(8, 4)], ["unknown"] * 3),
        ([bare(4, 8), nn.Sequential(bare(8, 8)), bare(8, 4)], ["unknown"] * 3),
        ([bare(4, 8)], ["unknown"]),
    ],
)
def test_two_linears_in_a_sequential_mlp(layers: list[nn.Module], expected: list[str]) -> None:
    assert roles_of(nn.ModuleDict({"ffn": nn.Sequential(*layers)})) == expected
    assert set(roles_of(nn.ModuleDict({"encoder": nn.Sequential(*layers)}))) == {"unknown"}


@pytest.mark.parametrize("names", [("fc1", "fc2"), ("in_proj", "out_proj"), ("intermediate_dense", "output_dense")])
def test_an_up_projection_of_twice_the_rows_is_gate_and_up(names: tuple[str, str]) -> None:
    """Which half is which is known of no model type here, so no part is named."""
    up, down = names
    for rows, expected in ((8, "mlp_up"), (16, "mlp_gate_up")):
        (_, first), (_, second) = assign_roles(
            nn.ModuleDict({"mlp": nn.ModuleDict({up: bare(4, rows), down: bare(8, 4)})})
        )
        assert (first.role, first.parts, second.role) == (expected, (), "mlp_down")


def test_a_linear_layer_of_its_own_class_says_which_axis_is_which() -> None:
    class QuantizedLinear(nn.Module):
        def __init__(self, shape: tuple[int, int]) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 8
            self.weight = nn.Parameter(torch.zeros(shape))

    for shape, expected in (((8, 4), ("attention_query", 0)), ((4, 8), ("unknown", None))):
        ((_, found),) = assign_roles(nn.ModuleDict({"q_proj": QuantizedLinear(shape)}))
        assert (found.role, found.fan_out) == expected


def test_a_head_size_that_does_not_fit_is_not_guessed() -> None:
    """Queries of more rows than hidden_size have another head_dim than hidden_size over the heads."""
    config = tf.BertConfig(hidden_size=8, num_attention_heads=2)
    for rows, expected in ((8, 4), (16, None)):
        block = nn.ModuleDict({"attn": nn.ModuleDict({"query": bare(8, rows)})})
        block.config = config
        assert assign_roles(block)[0][1].head_dim == expected


def test_stacked_experts_of_unknown_orientation_are_unknown() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(2, 8, 8))

    ((_, found),) = assign_roles(Experts())
    assert (found.role, found.fan_out, found.expert_axis) == ("unknown", None, 0)


def test_adapters_of_stacked_experts_have_no_axes() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = peft.get_peft_model(tiny_model("mixtral"), config)
    assigned = [found for _, found in assign_roles(model)]
    assert len({found.name for found in assigned}) == len(assigned)
    adapters = [found for found in assigned if ".experts." in found.name and "lora_" in found.name]
    assert len(adapters) == 8
    assert {(found.role, found.fan_out) for found in adapters} == {("lora_A", None), ("lora_B", None)}
    frozen = {found.name.rpartition(".")[2]: found for found in assigned if found.expert_axis == 0}
    assert set(frozen) == {"gate_up_proj", "down_proj"}


PEFT_METHODS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "AdaLoraConfig": ({"total_step": 8}, {"lora_A", "lora_B", "adapter"}),
    "IA3Config": ({"feedforward_modules": ["down_proj"]}, {"adapter"}),
    "LoHaConfig": ({}, {"adapter"}),
    "LoKrConfig": ({}, {"adapter"}),
    "OFTConfig": ({"oft_block_size": 8, "r": 0}, {"adapter"}),
    "VBLoRAConfig": ({"num_vectors": 16, "vector_length": 8}, {"adapter"}),
    "PromptTuningConfig": ({"num_virtual_tokens": 4}, {"adapter"}),
    "PrefixTuningConfig": ({"num_virtual_tokens": 4}, {"adapter"}),
    "PromptEncoderConfig": ({"num_virtual_tokens": 4, "encoder_hidden_size": 8}, {"adapter", "bias"}),
}


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_what_other_peft_methods_train_is_an_adapter(method: str) -> None:
    peft = pytest.importorskip("peft")
    options, expected = PEFT_METHODS[method]
    if not issubclass(getattr(peft, method), peft.PromptLearningConfig):
        options = {"target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(tiny_model("llama"), getattr(peft, method)(task_type="CAUSAL_LM", **options))
    trained = [found for param, found in assign_roles(model) if param.requires_grad]
    assert {found.role for found in trained} == expected
    assert all(found.fan_out is None for found in trained if found.role == "adapter")
    frozen = {found.role for param, found in assign_roles(model) if not param.requires_grad}
    assert {"attention_query", "mlp_down", "token_embedding"} <= frozen


@pytest.mark.parametrize(
    ("conv", "role", "fan_out", "fan_in"),
    [
        (nn.Conv2d(3, 8, kernel_size=4, stride=4), "patch_conv", 0, (1, 2, 3)),
        (nn.Conv2d(3, 8, kernel_size=4, stride=2), "conv", 0, (1, 2, 3)),
        (nn.Conv1d(8, 8, kernel_size=3, groups=8), "conv", None, ()),
        (nn.ConvTranspose2d(3, 8, kernel_size=2, stride=2), "conv", 1, (0, 2, 3)),
    ],
)
def test_convolutions(conv: nn.Module, role: str, fan_out: int | None, fan_in: tuple[int, ...]) -> None:
    found = assign_roles(conv)[0][1]
    assert (found.role, found.fan_out, found.fan_in) == (role, fan_out, fan_in)


def test_wrappers_change_neither_roles_nor_names() -> None:
    plain = meta_model("llama")
    expected = [found for _, found in assign_roles(plain)]
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = tiny_model("llama")
    for layer in list(wrapped.module._orig_mod.model.layers):
        inner, layer.self_attn = layer.self_attn, nn.Module()
        layer.self_attn._fsdp_wrapped_module = inner
    found = {role.name: role for _, role in assign_roles(wrapped)}
    assert found == {role.name: role for role in expected}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("module._orig_mod.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_fsdp_wrapped_module.lm_head._checkpoint_wrapped_module.weight", "lm_head.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("module.module._orig_mod._fsdp_wrapped_module.module.norm.weight", "norm.weight"),
        ("layers.0._checkpoint_wrapped_module._orig_mod.mlp._fsdp_wrapped_module.weight", "layers.0.mlp.weight"),
        ("module.base_model.model._orig_mod.norm.weight", "norm.weight"),
        ("base_model.model.module.norm.weight", "norm.weight"),
        ("layers.0._orig_mod.module.weight", "layers.0.module.weight"),
        ("layers.my_orig_mod.weight", "layers.my_orig_mod.weight"),
        ("layers.module", "layers.module"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.original_module.weight"),
        ("base_model.model.q_proj.lora_A.default.weight", "q_proj.lora_A.weight"),
        ("base_model.model.q_proj.lora_A.other.weight", "q_proj.lora_A.other.weight"),
        ("embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_A"),
        ("encoder.module.default.weight", "encoder.module.default.weight"),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q_proj, self.norm = nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.q_proj(self.embed(ids)))


class Renamed(nn.Module):
    """Its parameters' names lead to no module, as those of a wrapper that hides what it wraps."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.inner, self.blocks, self.prefix = Plain(), nn.ModuleList(), prefix

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((f"{self.prefix}.{name}", param) for name, param in self.inner.named_parameters())


IDS = torch.tensor([1, 2])
UNREAD: dict[str, Any] = {
    "nowhere": lambda: Renamed("outer"),
    "no_such_block": lambda: Renamed("blocks.3"),
    "no_module": lambda: Renamed("prefix"),
    "a_method": lambda: Renamed("forward"),
    "scripted": lambda: torch.jit.script(Plain()),
    "traced": lambda: torch.jit.trace(Plain(), IDS),
    "exported": lambda: torch.export.export(Plain(), (IDS,)).module(),
    "scripted_part": lambda: nn.Sequential(torch.jit.script(Plain())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", UNREAD)
def test_a_model_whose_modules_cannot_be_read_has_unknown_matrices(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = UNREAD[case]()
    found = [role for _, role in assign_roles(model)]
    assert [role.role for role in found] == ["unknown", "unknown", "bias", "vector", "bias"]
    assert all(role.fan_out is None for role in found)
    assert [id(param) for param, _ in assign_roles(model)] == [id(param) for param in model.parameters()]
    optimizer_cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(model, "slim_adamw", lr=1e-2)
    assert "2 matrices have an unknown role" in caplog.text
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = optimizer_cls(model.parameters(), **kwargs)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: nn.Sequential(torch.fx.symbolic_trace(model))])
def test_a_wrapper_that_keeps_the_modules_keeps_their_roles(wrap: Any) -> None:
    assert [role.role for _, role in assign_roles(wrap(Plain()))] == [
        "embedding",
        "attention_query",
        "bias",
        "norm",
        "bias",
    ]


def test_roles_import_only_torch_and_each_other() -> None:
    for path in Path(roles.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name.partition(".")[0] for name in imported} & {"transformers", "peft", "trl"} == set()


def test_weight_decay_reaches_weights_whose_names_lead_nowhere() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            for name, param in super().named_parameters(*args, **kwargs):
                yield f"elsewhere.{name}", param

    for model in (Renamed(), torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4)))):
        optimizer = hf_lowmem.build_optimizer(model, "slim_adamw", lr=1e-3, weight_decay=0.1)
        decayed, others = (group["params"] for group in optimizer.param_groups)
        assert [param.ndim for param in decayed] == [2]
        assert [param.ndim for param in others] == [1]
