"""PEFT's adapters, and QLoRA, through the real trainers: what gets state, and that the runs resume, save and merge."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import hf_lowmem
from tests.support.model_families import FAMILIES, tiny_model
from tests.support.resumed_runs import (
    assert_declared_state,
    assert_the_trainers_groups,
    assert_trained,
    inner,
    run_and_resume,
    same_state,
    same_weights,
)
from tests.support.trl_trainers import MODELS, MOE, TRAINERS, save_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("trl_ready")

OPTIMS = {"slim_adamw_8bit": "min_8bit_size=0", "adam_mini": None, "coap_adamw_8bit": "min_8bit_size=0"}
FACTORS = {"lora_A", "lora_B"}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# The model, the options of LoraConfig, and the roles of all that is trained.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}, FACTORS),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}, FACTORS | {"lora_magnitude"}),
    "rslora": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, FACTORS),
    "modules_to_save": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        FACTORS | {"token_embedding", "lm_head", "norm"},
    ),
    "embeddings": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        FACTORS | {"lora_embedding_A", "lora_embedding_B"},
    ),
    "trainable_tokens": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 42]},
        FACTORS | {"token_embedding"},
    ),
    "tied_modules_to_save": (
        "qwen3",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        FACTORS | {"token_embedding"},
    ),
    "mixtral_experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, FACTORS),
    "qwen3_moe_experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, FACTORS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(make, root / family) for family, make in (MODELS | MOE).items()}


def adapted(trainer: str, options: dict[str, Any], **arguments: Any) -> Any:
    """The declaration of a TRL trainer, with adapters."""
    config = peft.LoraConfig(r=8, task_type="CAUSAL_LM", **options)
    declared = TRAINERS[trainer]
    return replace(declared, arguments={**declared.arguments, "peft_config": config, **arguments})


def run(declared: Any, folder: Path, output: Path, optim: str, **config: Any) -> tuple[tf.Trainer, tf.Trainer]:
    options = {"optim": optim, "optim_args": OPTIMS.get(optim), "learning_rate": 1e-2, **config}
    return run_and_resume(lambda: declared.build(folder, folder, output, **options), output)


def assert_adapters_only(trainer: tf.Trainer, optim: str, roles: set[str]) -> None:
    """Elementwise state for the adapters, and none at all for what is frozen."""
    explanation = assert_declared_state(trainer, optim, OPTIMS[optim])
    trained = [row for row in explanation.rows if row.trainable]
    frozen = [row for row in explanation.rows if not row.trainable]
    assert {row.role for row in trained} == roles
    assert {id(param) for param in inner(trainer).state} == {
        id(param) for param in trainer.model.parameters() if param.requires_grad
    }
    assert frozen
    assert sum(row.nbytes for row in frozen) == 0
    adapters = [row for row in trained if row.role.startswith("lora_")]
    for row in adapters:
        assert row.state["exp_avg"][0] == row.state["exp_avg_sq"][0] == row.shape
    if not optim.endswith("8bit"):
        assert sum(row.nbytes for row in adapters) == sum(8 * row.numel + 4 for row in adapters)

    summary = explanation.by_role()
    lines = [line for line in summary.splitlines() if line.startswith("lora_")]
    assert {line.split()[0] for line in lines} == {row.role for row in adapters}
    assert not any("mean over" in row.compressed for row in adapters)
    assert "unknown" not in summary


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """In training mode, which differs in nothing here but that bitsandbytes takes no bfloat16 kernel on a CPU."""
    device = next(model.parameters()).device
    return model.train()(torch.arange(36, 48, device=device).unsqueeze(0)).logits


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("case", CASES)
def test_adapters_train_resume_save_and_merge(case: str, optim: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, options, roles = CASES[case]
    whole, resumed = run(adapted("sft", options), folders[family], tmp_path, optim)
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)
    assert_adapters_only(resumed, optim, roles)
    assert_the_trainers_groups(resumed)

    resumed.save_model(str(tmp_path / "saved"))
    base = tf.AutoModelForCausalLM.from_pretrained(folders[family])
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    trained = logits(resumed.model)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_dpo_and_grpo_train_adapters_and_resume(
    trainer: str, optim: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, resumed = run(adapted(trainer, {"target_modules": "all-linear"}), folders["llama"], tmp_path, optim)
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)
    assert_adapters_only(resumed, optim, FACTORS)
    assert_the_trainers_groups(resumed)


def test_the_log_says_what_adapters_get(folders: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    package = logging.getLogger("hf_lowmem")
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        declared = adapted("sft", {"target_modules": ["q_proj"]})
        declared.build(folders["llama"], folders["llama"], tmp_path, optim="adam_mini").create_optimizer()
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
    start, summary = said
    assert start.startswith("adam_mini: ")
    assert "elementwise: lora_A" in summary
    assert "elementwise: lora_B" in summary
    _, _, after = summary.partition("\nattention_query ")
    assert after.splitlines()[1].strip() == "frozen"


def test_coap_says_what_projects_lora_factors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=8, target_modules=["q_proj"]))
    hf_lowmem.build_optimizer(model, "coap_adamw", lr=1e-3)
    assert "LoRA factors a rules file" in caplog.text
    (tmp_path / "rules.json").write_text(json.dumps({"regex": [["lora_A", 4]]}))
    explanation = hf_lowmem.explain(model, "coap_adamw", {"rules": str(tmp_path / "rules.json")})
    assert {row.role for row in explanation.rows if "proj" in row.state} == {"lora_A"}
    with pytest.raises(ValueError, match="LoRA factors and frozen weights are not projected"):
        hf_lowmem.explain(model, "coap_adamw", {"target_modules": ["lora_A"]})


def plain_trainer(model: nn.Module, output: Path, **options: Any) -> tf.Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(8 * 16).view(8, 16)]
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    optimizers = options.pop("optimizers", (None, None))
    args = tf.TrainingArguments(str(output), weight_decay=0.1, **steps, **quiet, **options)
    return tf.Trainer(model, args, train_dataset=rows, optimizers=optimizers)


def fresh(folder: Path, **options: Any) -> nn.Module:
    tf.set_seed(0)
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=8, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("optim", OPTIMS)
def test_trained_tokens_of_a_tied_embedding(optim: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Through a plain Trainer: the fused head of TRL 1.16 fails on the head that PEFT wraps."""
    options = {"target_modules": ["q_proj"], "trainable_token_indices": [40, 41, 42]}

    def build() -> tf.Trainer:
        model = fresh(folders["qwen3"], **options)
        return plain_trainer(model, tmp_path, optim=optim, optim_args=OPTIMS[optim], learning_rate=1e-2)

    whole, resumed = run_and_resume(build, tmp_path)
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)
    assert_adapters_only(resumed, optim, FACTORS | {"token_embedding"})
    assert_the_trainers_groups(resumed)


def test_loraplus_keeps_its_two_learning_rates(folders: dict[str, Path], tmp_path: Path) -> None:
    """peft's own groups, through a plain Trainer."""
    from peft.optimizers import create_loraplus_optimizer

    def build() -> tf.Trainer:
        model = fresh(folders["llama"], target_modules="all-linear")
        optimizer_cls, kwargs = hf_lowmem.optimizer_cls_and_kwargs(
            model, "slim_adamw_8bit", lr=1e-3, optim_args=OPTIMS["slim_adamw_8bit"]
        )
        optimizer = create_loraplus_optimizer(model, optimizer_cls, loraplus_lr_ratio=16, **kwargs)
        return plain_trainer(model, tmp_path, optimizers=(optimizer, None))

    whole, resumed = run_and_resume(build, tmp_path)
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)
    assert_declared_state(resumed, "slim_adamw_8bit", OPTIMS["slim_adamw_8bit"])
    rates = {id(p): group["initial_lr"] for group in inner(resumed).param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert named == {name: 16e-3 if "lora_B" in name else 1e-3 for name in named}


# ---------------------------------------------------------------- QLoRA


class KeepBfloat16(tf.TrainerCallback):
    """TRL trains the adapters of a quantized model in bfloat16; PEFT loads them from a checkpoint as float32."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for param in model.parameters():
            if param.requires_grad:
                param.data = param.data.to(torch.bfloat16)


def quantized(bits: int) -> tf.BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    if bits == 8:
        return tf.BitsAndBytesConfig(load_in_8bit=True)
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )


@pytest.mark.parametrize("optim", ["slim_adamw_8bit", "coap_adamw_8bit"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_qlora_trains_resumes_and_saves(
    trainer: str, bits: int, optim: str, device: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = quantized(bits)
    declared = replace(
        adapted(trainer, {"target_modules": "all-linear"}, quantization_config=config), callback=KeepBfloat16
    )
    whole, resumed = run(declared, folders["llama"], tmp_path, optim, use_cpu=device == "cpu")
    assert {param.device.type for param in whole.model.parameters()} == {device}
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)
    assert_adapters_only(resumed, optim, FACTORS)
    assert_the_trainers_groups(resumed)
    packed = [param for param in resumed.model.parameters() if param.dtype in (torch.uint8, torch.int8)]
    assert len(packed) == 7
    assert not any(param.requires_grad or param in inner(resumed).state for param in packed)
    if bits == 4:
        assert all(param.shape[1] == 1 for param in packed)

    resumed.save_model(str(tmp_path / "saved"))
    base = tf.AutoModelForCausalLM.from_pretrained(
        folders["llama"], quantization_config=config, device_map=device, dtype=torch.float32
    )
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    for name, param in loaded.named_parameters():
        if "lora_" in name:  # in the precision that they were trained in
            param.data = param.data.to(torch.bfloat16)
    after = logits(loaded)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, logits(resumed.model))


def test_qlora_resumes_with_kahans_buffers(folders: dict[str, Path], tmp_path: Path) -> None:
    """They wait while the adapters are float32: the checkpoint's state is read before TRL's cast can be repeated."""
    declared = adapted("sft", {"target_modules": "all-linear"}, quantization_config=quantized(4))
    declared, options = replace(declared, callback=KeepBfloat16), "min_8bit_size=0,rounding=kahan"
    whole, resumed = run(declared, folders["llama"], tmp_path, "slim_adamw_8bit", optim_args=options)
    assert any(state["kahan_comp"].any() for state in inner(whole).state.values())
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)


def test_trls_qlora_adapters_come_back_in_another_dtype_under_any_optimizer(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    declared = adapted("sft", {"target_modules": "all-linear"}, quantization_config=quantized(4))
    whole, resumed = run(declared, folders["llama"], tmp_path, "adamw_torch")
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in resumed.model.parameters() if p.requires_grad} == {torch.float32}
    assert not same_weights(whole, resumed)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_packed_weights_are_no_trouble_for_any_family(family: str, optim: str) -> None:
    """4-bit weights are (numel / 2, 1), whatever their shape was: fused ones and heads cannot be read from them."""
    with torch.device("meta"):
        model = tiny_model(family)
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                packed = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8)
                module.weight = nn.Parameter(packed, requires_grad=False)
        model.adapter = nn.Linear(8, 8)
    explanation = hf_lowmem.explain(model, optim, OPTIMS[optim])
    assert {row.name for row in explanation.rows if row.nbytes} == {"adapter.weight", "adapter.bias"}
