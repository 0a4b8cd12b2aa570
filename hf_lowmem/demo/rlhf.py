"""The RLHF demo: TRL's own trainers as a user's script would call them, one after the other.

Each optimizer runs a pipeline of its own. It trains the SFT model; the reward model, GRPO and DPO each start from that
model, and GRPO is rewarded by the reward model. All pipelines start from the same weights and see the same examples in
the same order. Only `optim=` differs, and what GRPO samples, which depends on the model.
"""

from __future__ import annotations

import tempfile
import time
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_lowmem.demo import preferences, report
from hf_lowmem.demo.data import build_pairs, train_tokenizer
from hf_lowmem.demo.preferences import KINDS, Example, answer_overlap, preference_pairs, text
from hf_lowmem.demo.report import ACCURACY, ANSWER_OVERLAP, Panel, Training
from hf_lowmem.demo.settings import RlhfSettings, StageSettings
from hf_lowmem.demo.train import build_model, prepare, train, training_arguments

SFT, REWARD, GRPO, DPO = "SFT", "reward model", "GRPO", "DPO"
MATCHING = 1.5
# TRL logs a reward under the name of its model's folder or of its function.
MODEL_REWARD, OVERLAP = "rewards/reward_model/mean", "rewards/answer_overlap/mean"
PANELS = (
    Panel(SFT, "loss", ["eval_loss"], "loss", "nats per token"),
    Panel(REWARD, "accuracy", [f"eval_{kind}_accuracy" for kind in KINDS], "pairs told apart, by kind", "share"),
    Panel(GRPO, MODEL_REWARD, [f"eval_{MODEL_REWARD}"], "its own reward model's score", "mean"),
    Panel(GRPO, OVERLAP, [f"eval_{OVERLAP}"], "words shared with the right answer", "mean F1"),
    Panel(DPO, "rewards/margins", [f"eval_{kind}_rewards/margins" for kind in KINDS], "margin, by kind", "reward"),
)


def run_rlhf_demo(settings: RlhfSettings) -> None:
    """Run a pipeline per optim name, print the table, and write the figure and the JSON."""
    started = time.perf_counter()
    prepare()
    data = Data(settings)
    tqdm.write(
        f"{len(data.train)} questions and answers from Python's documentation, {len(data.held_out)} more held out\n"
        f"scale {settings.scale} ({report.describe_device()})"
    )
    pipelines = {}
    for optim in settings.optims:
        tqdm.write(f"\n{optim}")
        with tempfile.TemporaryDirectory() as folder:
            pipelines[optim] = run_pipeline(optim, settings, data, folder)
    report.print_pipelines(pipelines)
    described = [{"optim": optim, "stages": pipeline} for optim, pipeline in pipelines.items()]
    numbers = {"seconds": time.perf_counter() - started, "pipelines": described}
    report.save(settings, "rlhf_demo", report.draw(pipelines, PANELS), numbers)


class Data:
    """The tokenizer and the examples that all pipelines share. The two splits have no entry in common."""

    def __init__(self, settings: RlhfSettings) -> None:
        train_pairs, held_out_pairs = build_pairs()
        held_out = preferences.short_answers(held_out_pairs)
        train = preferences.short_answers(train_pairs, unlike=held_out)
        words = [{column: f" {text(example[column])}" for column in ("prompt", "completion")} for example in train]
        self.tokenizer = train_tokenizer(words, settings.vocab_size)
        self.tokenizer.chat_template = preferences.CHAT_TEMPLATE
        train, held_out = (self.those_that_fit(split, settings.max_length) for split in (train, held_out))
        held_out = held_out[: settings.held_out]
        self.train, self.held_out = Dataset.from_list(train), Dataset.from_list(held_out)
        self.pairs = Dataset.from_list(preference_pairs(train, settings.preference_rounds))
        self.held_out_pairs = {
            kind: Dataset.from_list([pair for pair in preference_pairs(held_out) if pair["kind"] == kind])
            for kind in KINDS
        }

    def those_that_fit(self, examples: list[Example], max_length: int) -> list[Example]:
        """Return the examples of at most `max_length` tokens, so that no trainer truncates or drops any."""
        conversations = [example["prompt"] + example["completion"] for example in examples]
        encoded = self.tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True)["input_ids"]
        return [example for example, ids in zip(examples, encoded, strict=True) if len(ids) <= max_length]


def run_pipeline(optim: str, settings: RlhfSettings, data: Data, folder: str) -> dict[str, Training]:
    """Train all stages with one optimizer; the models go from stage to stage through `folder`."""
    tokenizer, sft_folder, reward_folder = data.tokenizer, f"{folder}/sft", f"{folder}/reward_model"

    def arguments(stage: StageSettings) -> dict[str, Any]:
        return training_arguments(optim, settings.seed, stage.steps) | {
            "output_dir": f"{folder}/trainer",
            "per_device_train_batch_size": stage.batch_size,
            "per_device_eval_batch_size": 64,
            "learning_rate": stage.learning_rate,
            "logging_steps": 1,
        }

    set_seed(settings.seed)
    trainer: Any = SFTTrainer(
        model=attending_to_equal_words(build_model(tokenizer, settings.model, settings.max_length)),
        args=SFTConfig(**arguments(settings.sft), max_length=settings.max_length),
        train_dataset=data.train.remove_columns("answer"),
        eval_dataset=data.held_out.remove_columns("answer"),
        processing_class=tokenizer,
    )
    sft = train(SFT, trainer, {"loss": "train", "eval_loss": "held-out"})
    sft.figures["held-out loss"] = sft.last("eval_loss")
    trainer.save_model(sft_folder)

    set_seed(settings.seed)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(sft_folder, num_labels=1),
        args=RewardConfig(**arguments(settings.reward), max_length=settings.max_length),
        train_dataset=data.pairs,
        eval_dataset=data.held_out_pairs,
        processing_class=tokenizer,
    )
    accuracy = {f"eval_{kind}_accuracy": kind for kind in KINDS}
    reward = train(REWARD, trainer, {"loss": "train"} | accuracy)
    add_accuracies(reward, accuracy)
    trainer.save_model(reward_folder)

    set_seed(settings.seed)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(sft_folder),
        args=GRPOConfig(
            **arguments(settings.grpo),
            num_generations=settings.generations,
            num_generations_eval=1,
            max_completion_length=settings.completion_tokens,
            beta=settings.grpo_beta,
            # The two rewards have different scales, so each is normalised by its own spread within a question.
            multi_objective_aggregation="normalize_then_sum",
        ),
        reward_funcs=[
            AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1),
            answer_overlap,
        ],
        reward_processing_classes=[tokenizer, None],
        train_dataset=data.train.remove_columns("completion"),
        eval_dataset=data.held_out.remove_columns("completion"),
        processing_class=tokenizer,
    )
    rewards = {MODEL_REWARD: "model reward", OVERLAP: ANSWER_OVERLAP}
    grpo = train(GRPO, trainer, rewards | {f"eval_{OVERLAP}": "held-out"}, evaluate_first=True)
    for key, name in rewards.items():
        values = [value for _, value in grpo.curves[key]]
        grpo.figures[f"{name}, start"] = fmean(values[: settings.average_steps])
        grpo.figures[f"{name}, end"] = fmean(values[-settings.average_steps :])
        grpo.figures[f"{name}, held-out, before"] = grpo.curves[f"eval_{key}"][0][1]
        grpo.figures[f"{name}, held-out, after"] = grpo.last(f"eval_{key}")

    set_seed(settings.seed)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(sft_folder),  # from which the trainer also reads its reference
        args=DPOConfig(**arguments(settings.dpo), max_length=settings.max_length, beta=settings.dpo_beta),
        train_dataset=data.pairs,
        eval_dataset=data.held_out_pairs,
        processing_class=tokenizer,
    )
    accuracy = {f"eval_{kind}_rewards/accuracies": kind for kind in KINDS}
    dpo = train(DPO, trainer, {"rewards/margins": "margin"} | accuracy)
    dpo.figures["held-out margin"] = fmean(dpo.last(f"eval_{kind}_rewards/margins") for kind in KINDS)
    add_accuracies(dpo, accuracy)
    return {SFT: sft, REWARD: reward, GRPO: grpo, DPO: dpo}


def attending_to_equal_words(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Change the new attention weights of a model so that each token attends most to those equal to it.

    Queries and keys get the same weights, times the root of MATCHING. An answer takes up words of its question, and
    from ordinary weights a small model needs many more steps than the demo has to find that out.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(MATCHING**0.5)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def add_accuracies(training: Training, keys: dict[str, str]) -> None:
    """Add the held-out accuracy over all pairs and over those of each kind, which are equally many."""
    by_kind = {f"{ACCURACY}, {kind}": training.last(key) for key, kind in keys.items()}
    training.figures |= {ACCURACY: fmean(by_kind.values())} | by_kind
