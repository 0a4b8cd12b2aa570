"""One declaration per trainer of TRL: what it needs besides a model, a tokenizer and `optim`.

The models and the data are tiny, and the tokenizer knows single characters only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers as tf

CHARACTERS = [chr(code) for code in range(32, 127)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<bot>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}<bot>{{ message['content'] }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
# Last axes of 64 and more, so that 8-bit blocks and projections apply to every weight of the body.
_SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
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
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES, tie_word_embeddings=True)),
}


def save_model(family: str, folder: Path) -> Path:
    """A random model of a family in MODELS, with its tokenizer and chat template, as `from_pretrained` reads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    tf.set_seed(0)
    MODELS[family]().save_pretrained(folder)
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


def every_second(completions: list[Any], **columns: Any) -> list[float]:
    return [float(number % 2) for number in range(len(completions))]


# ---------------------------------------------------------------- the trainers


@dataclass(frozen=True)
class TrlTrainer:
    """How to build one trainer.

    `data` is a key of DATA. `config` are options of its config class; `arguments` are those of its constructor, of
    which the value "model folder" stands for the folder of the model that is trained.
    """

    module: str
    name: str
    data: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, folder: Path, output: Path, **config: Any) -> tf.Trainer:
        """The trainer of the model in `folder`, with `config` over the declared options."""
        from datasets import Dataset

        module = import_module(self.module)
        config_cls = getattr(module, self.name.replace("Trainer", "Config"), None)
        config_cls = config_cls or getattr(import_module("trl"), self.name.replace("Trainer", "Config"))
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        tokenizer.padding_side = "left" if "Reward" not in self.name else "right"
        model = {key: str(folder) if value is FOLDER else value for key, value in self.arguments.items()}
        return getattr(module, self.name)(
            **{"model": str(folder), **model},
            args=config_cls(output_dir=str(output), **{**COMMON, **self.config, **config}),
            train_dataset=Dataset.from_list(DATA[self.data]),
            processing_class=tokenizer,
        )


FOLDER = object()
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
_REWARD = {"reward_funcs": letters}
_TEACHER = {"teacher_model": FOLDER}

TRAINERS: dict[str, TrlTrainer] = {
    "sft": TrlTrainer("trl", "SFTTrainer", "text"),
    "reward": TrlTrainer("trl", "RewardTrainer", "preference"),
    "dpo": TrlTrainer("trl", "DPOTrainer", "preference"),
    "kto": TrlTrainer("trl", "KTOTrainer", "unpaired"),
    "grpo": TrlTrainer("trl", "GRPOTrainer", "prompt", _GROUPS, _REWARD),
    "rloo": TrlTrainer("trl", "RLOOTrainer", "prompt", _GROUPS, _REWARD),
    "distillation": TrlTrainer("trl", "DistillationTrainer", "prompt", _GENERATES, _TEACHER),
    "bema_dpo": TrlTrainer("trl.experimental.bema_for_ref_model.dpo_trainer", "DPOTrainer", "preference"),
    "cpo": TrlTrainer("trl.experimental.cpo", "CPOTrainer", "preference"),
    "orpo": TrlTrainer("trl.experimental.orpo", "ORPOTrainer", "preference"),
    "tpo": TrlTrainer("trl.experimental.tpo", "TPOTrainer", "reference"),
    "gkd": TrlTrainer("trl.experimental.gkd", "GKDTrainer", "messages", {"max_new_tokens": 4}, _TEACHER),
    "gold": TrlTrainer("trl.experimental.gold", "GOLDTrainer", "messages", _GENERATES, _TEACHER),
    "online_dpo": TrlTrainer(
        "trl.experimental.online_dpo", "OnlineDPOTrainer", "prompt", {"max_new_tokens": 4, "max_length": 32}, _REWARD
    ),
    "gmpo": TrlTrainer("trl.experimental.gmpo", "GMPOTrainer", "prompt", _GROUPS, _REWARD),
    "sdft": TrlTrainer("trl.experimental.sdft", "SDFTTrainer", "privileged", _GENERATES),
    "sdpo": TrlTrainer(
        "trl.experimental.sdpo", "SDPOTrainer", "privileged", {**_GENERATES, "num_generations": 2}, _REWARD
    ),
    "a2po": TrlTrainer("trl.experimental.a2po", "A2POTrainer", "prompt", _GENERATES, {"reward_funcs": every_second}),
    "iw_opd": TrlTrainer("trl.experimental.iw_opd", "IWOPDTrainer", "messages", _GENERATES, _TEACHER),
}
