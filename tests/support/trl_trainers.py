"""One declaration per trainer of TRL: what it needs besides a model, a tokenizer and `optim`.

The models and the data are tiny, and the tokenizer knows single bytes only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers as tf

SPECIAL = ["<pad>", "<eos>", "<user>", "<bot>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<bot>{{ message['content'] }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
# Last axes of 64 and more, so that 8-bit blocks and projections apply to every weight of the body.
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, tie_word_embeddings=True)),
}
MOE: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    ),
}


def save_model(make: Callable[[], tf.PreTrainedModel], folder: Path, seed: int = 0) -> Path:
    """A random model, a tokenizer for it and a chat template, as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    tf.set_seed(seed)
    make().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- data


def _rows(**columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{name: make(number) for name, make in columns.items()} for number in range(8)]


def _question(number: int) -> str:
    return f"{number}+{number}="


def _user(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": _question(number)}]


def _bot(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


DATA: dict[str, list[dict[str, Any]]] = {
    "text": _rows(text=lambda n: f"{_question(n)}{2 * n}"),
    "prompt": _rows(prompt=_question),
    "privileged": _rows(prompt=_question, privileged_context=lambda n: f"It is {2 * n}."),
    "completion": _rows(prompt=_user, completion=lambda n: _bot(str(2 * n))),
    "messages": _rows(messages=lambda n: _user(n) + _bot(str(2 * n))),
    "preference": _rows(prompt=_user, chosen=lambda n: _bot(str(2 * n)), rejected=lambda n: _bot(str(n))),
    "reference": _rows(
        prompt=_user,
        chosen=lambda n: _bot(str(2 * n)),
        rejected=lambda n: _bot(str(n)),
        reference=lambda n: _bot(f"{2 * n}."),
    ),
    "unpaired": _rows(prompt=_user, completion=lambda n: _bot(str(n)), label=lambda n: n % 2 == 0),
}


def letters(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs between completions and depends on nothing else."""
    return [sum(map(ord, str(completion))) % 7 / 7 for completion in completions]


# ---------------------------------------------------------------- the trainers


@dataclass(frozen=True)
class TrlTrainer:
    """How to build one trainer.

    `data` is a key of DATA, `config` holds options of its config class, and `arguments` those of its constructor,
    where the value TEACHER stands for the folder of a second model of the same family.
    `not_saved` says what of the trainer's own state TRL leaves out of a checkpoint, so that no optimizer resumes
    bit-exactly.
    """

    module: str
    name: str
    data: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    callback: Callable[[], tf.TrainerCallback] | None = None
    not_saved: str = ""

    def build(self, folder: Path, teacher: Path, output: Path, **config: Any) -> tf.Trainer:
        """The trainer of the model in `folder`, with `config` over the declared options."""
        import trl
        from datasets import Dataset

        module = import_module(self.module)
        config_name = self.name.replace("Trainer", "Config")
        config_cls = getattr(module, config_name, None) or getattr(trl, config_name)
        arguments = {key: str(teacher) if value is TEACHER else value for key, value in self.arguments.items()}
        return getattr(module, self.name)(
            **{"model": str(folder), **arguments},
            args=config_cls(output_dir=str(output), **{**COMMON, **self.config, **config}),
            train_dataset=Dataset.from_list(DATA[self.data]),
            processing_class=tf.AutoTokenizer.from_pretrained(folder),
            callbacks=[self.callback()] if self.callback else None,
        )


def _bema() -> tf.TrainerCallback:
    from trl.experimental.bema_for_ref_model import BEMACallback

    return BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)


TEACHER = object()
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}
_GENERATES = {"max_completion_length": 4}
_GROUPS = {**_GENERATES, "num_generations": 2, "beta": 0.1}
_SDPO = {**_GROUPS, "success_reward_threshold": 0.3}
_ONLINE = {"max_new_tokens": 4, "max_length": 32}
_REWARD = {"reward_funcs": letters}
_TEACHER = {"teacher_model": TEACHER}
_EXPERIMENTAL = "trl.experimental."

TRAINERS: dict[str, TrlTrainer] = {
    "sft": TrlTrainer("trl", "SFTTrainer", "text"),
    "reward": TrlTrainer("trl", "RewardTrainer", "preference"),
    "dpo": TrlTrainer("trl", "DPOTrainer", "preference"),
    "kto": TrlTrainer("trl", "KTOTrainer", "unpaired"),
    "grpo": TrlTrainer("trl", "GRPOTrainer", "prompt", _GROUPS, _REWARD),
    "rloo": TrlTrainer("trl", "RLOOTrainer", "prompt", _GROUPS, _REWARD),
    "distillation": TrlTrainer("trl", "DistillationTrainer", "prompt", _GENERATES, _TEACHER),
    "cpo": TrlTrainer(_EXPERIMENTAL + "cpo", "CPOTrainer", "preference"),
    "orpo": TrlTrainer(_EXPERIMENTAL + "orpo", "ORPOTrainer", "preference"),
    "tpo": TrlTrainer(_EXPERIMENTAL + "tpo", "TPOTrainer", "reference"),
    "gkd": TrlTrainer(_EXPERIMENTAL + "gkd", "GKDTrainer", "messages", {"max_new_tokens": 4}, _TEACHER),
    "gold": TrlTrainer(_EXPERIMENTAL + "gold", "GOLDTrainer", "messages", _GENERATES, _TEACHER),
    "online_dpo": TrlTrainer(_EXPERIMENTAL + "online_dpo", "OnlineDPOTrainer", "prompt", _ONLINE, _REWARD),
    "gmpo": TrlTrainer(_EXPERIMENTAL + "gmpo", "GMPOTrainer", "prompt", _GROUPS, _REWARD),
    "sdft": TrlTrainer(_EXPERIMENTAL + "sdft", "SDFTTrainer", "privileged", {**_GENERATES, "num_generations": 1}),
    "sdpo": TrlTrainer(
        _EXPERIMENTAL + "sdpo", "SDPOTrainer", "prompt", {**_SDPO, "teacher_model_kind": "live"}, _REWARD
    ),
    "a2po": TrlTrainer(_EXPERIMENTAL + "a2po", "A2POTrainer", "prompt", _GENERATES, _REWARD),
    "iw_opd": TrlTrainer(_EXPERIMENTAL + "iw_opd", "IWOPDTrainer", "messages", _GENERATES, _TEACHER),
    "bema_dpo": TrlTrainer(
        _EXPERIMENTAL + "bema_for_ref_model.dpo_trainer",
        "DPOTrainer",
        "preference",
        callback=_bema,
        not_saved="the moving average and the reference model that it updates",
    ),
}

# Settings of the same trainers with which no optimizer resumes bit-exactly.
NOT_SAVED: dict[str, TrlTrainer] = {
    "dpo, sync_ref_model": replace(
        TRAINERS["dpo"],
        config={"sync_ref_model": True, "ref_model_sync_steps": 1},
        not_saved="the reference model that follows the policy",
    ),
    "grpo, saved between two generations": replace(
        TRAINERS["grpo"],
        config={**_GROUPS, "steps_per_generation": 4},
        not_saved="the completions that are still to be trained on",
    ),
    "sdpo, its default EMA teacher": replace(
        TRAINERS["sdpo"], config={**_SDPO, "teacher_model_kind": "ema"}, not_saved="the teacher"
    ),
    "bema_dpo": TRAINERS["bema_dpo"],
}

# The other classes of the installed TRL that are called Trainer, and why they are not run.
EXCLUDED: dict[str, str] = {
    "trl.experimental.distillation.DistillationTrainer": "trl.DistillationTrainer under its deprecated name",
    "trl.experimental.kto.KTOTrainer": "trl.KTOTrainer under its deprecated name",
    "trl.experimental.async_grpo.AsyncGRPOTrainer": "a CUDA attention kernel, and a vLLM server for the rollouts",
    "trl.experimental.async_distillation.AsyncDistillationTrainer": "vLLM servers for the rollouts and the teacher",
    "trl.experimental.server_distillation.ServerDistillationTrainer": "a vLLM server for the teacher",
}
