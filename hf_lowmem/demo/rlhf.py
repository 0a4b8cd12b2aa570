"""The RLHF demo's pipelines: TRL's own trainers as a user's script would call them, one after the other.

Each optimizer runs a whole pipeline of its own: it trains the SFT model, the reward model starts from that one, GRPO
starts from it too and is rewarded by that reward model, and so does DPO. Every pipeline starts from the same weights
and sees the same examples in the same order; only `optim=` differs (what GRPO samples depends on the model).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_lowmem.demo.data import build_pairs, train_tokenizer
from hf_lowmem.demo.preferences import (
    CHAT_TEMPLATE,
    KINDS,
    Example,
    answer_overlap,
    preference_pairs,
    short_answers,
    text,
    without_those_of,
)
from hf_lowmem.demo.report import measure_state
from hf_lowmem.demo.rlhf_report import (
    ACCURACY,
    ANSWER_OVERLAP,
    DPO,
    GRPO,
    LOSS,
    MARGIN,
    MODEL_REWARD,
    REWARD,
    SFT,
    Pipeline,
    Stage,
    print_table,
    save_json,
    save_png,
)
from hf_lowmem.demo.rlhf_settings import RlhfSettings, StageSettings
from hf_lowmem.demo.train import build_model, describe_device, quieten, shared_arguments
from hf_lowmem.demo.watch import Watch, train_watched
from hf_lowmem.trainer.registration import register

EVAL_BATCH = 64
MATCHING = 1.5
REWARD_MODEL = "reward_model"  # TRL names the reward in its logs after the folder


def run_rlhf_demo(settings: RlhfSettings) -> list[Pipeline]:
    """Run a pipeline per optim name, print the table and write the figure and the JSON."""
    register()
    quieten()
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    data = Data(settings)
    device = describe_device()
    console.print(
        f"{len(data.train)} questions and answers from Python's documentation, {len(data.held_out)} more held out\n"
        f"scale {settings.scale} ({device})"
    )
    pipelines = []
    for optim in settings.optims:
        console.print(f"\n{optim}")
        with tempfile.TemporaryDirectory() as folder:
            pipelines.append(run_pipeline(optim, settings, data, Path(folder), console))

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    figure, numbers = settings.output_dir / "rlhf_demo.png", settings.output_dir / "rlhf_demo.json"
    print_table(pipelines, console)
    save_png(pipelines, figure)
    seconds = time.perf_counter() - started
    save_json(pipelines, settings, device, seconds, numbers)
    console.print(f"{seconds:.0f} s in all. Figure: {figure}, numbers: {numbers}")
    return pipelines


class Data:
    """The tokenizer and the examples that all pipelines share; the two splits have no entry in common."""

    def __init__(self, settings: RlhfSettings) -> None:
        train, held_out = (short_answers(pairs) for pairs in build_pairs())
        train = without_those_of(train, held_out)
        words = [{column: f" {text(example[column])}" for column in ("prompt", "completion")} for example in train]
        self.tokenizer: PreTrainedTokenizerFast = train_tokenizer(words, settings.vocab_size)
        self.tokenizer.chat_template = CHAT_TEMPLATE
        self.max_length = settings.max_length
        self.train = self.those_that_fit(train)
        self.held_out = self.those_that_fit(held_out)[: settings.held_out]
        self.train_preferences = Dataset.from_list(preference_pairs(self.train, settings.preference_rounds))
        held_out = preference_pairs(self.held_out)
        self.held_out_preferences = {
            kind: Dataset.from_list([pair for pair in held_out if pair["kind"] == kind]) for kind in KINDS
        }

    def those_that_fit(self, examples: list[Example]) -> list[Example]:
        """The examples of at most `max_length` tokens, so that no trainer cuts or drops any."""
        conversations = [example["prompt"] + example["completion"] for example in examples]
        encoded = self.tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True)["input_ids"]
        return [e for e, ids in zip(examples, encoded, strict=True) if len(ids) <= self.max_length]


def run_pipeline(optim: str, settings: RlhfSettings, data: Data, folder: Path, console: Console) -> Pipeline:
    """SFT, the reward model, GRPO and DPO with one optimizer; `folder` receives the models between the stages."""
    run = Run(optim, settings, data, folder, console)
    return Pipeline(optim, {SFT: run.sft(), REWARD: run.reward(), GRPO: run.grpo(), DPO: run.dpo()})


class Run:
    """The stages of one pipeline, in the order of the methods."""

    def __init__(self, optim: str, settings: RlhfSettings, data: Data, folder: Path, console: Console) -> None:
        self.optim, self.settings, self.data, self.folder, self.console = optim, settings, data, folder, console
        self.sft_folder, self.reward_folder = folder / "sft", folder / REWARD_MODEL

    def sft(self) -> Stage:
        settings = self.settings
        set_seed(settings.seed)
        trainer = SFTTrainer(
            model=attending_to_equal_words(build_model(self.data.tokenizer, settings.model, settings.max_length)),
            args=SFTConfig(**self.arguments(settings.sft), max_length=settings.max_length),
            train_dataset=Dataset.from_list(self.data.train).remove_columns("answer"),
            eval_dataset=Dataset.from_list(self.data.held_out).remove_columns("answer"),
            processing_class=self.data.tokenizer,
        )
        watch, seconds = self.watch_training(SFT, trainer, {"loss": "train", "eval_loss": "held-out"})
        trainer.save_model(str(self.sft_folder))
        return self.stage(trainer, watch, seconds, {LOSS: watch.last("eval_loss")})

    def reward(self) -> Stage:
        settings = self.settings
        set_seed(settings.seed)
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(self.sft_folder, num_labels=1),
            args=RewardConfig(**self.arguments(settings.reward), max_length=settings.max_length),
            train_dataset=self.data.train_preferences,
            eval_dataset=self.data.held_out_preferences,
            processing_class=self.data.tokenizer,
        )
        shown = {"loss": "train"} | {f"eval_{kind}_accuracy": kind for kind in KINDS}
        watch, seconds = self.watch_training(REWARD, trainer, shown)
        trainer.save_model(str(self.reward_folder))
        return self.stage(trainer, watch, seconds, accuracies(watch, "eval_{}_accuracy"))

    def grpo(self) -> Stage:
        settings = self.settings
        set_seed(settings.seed)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.sft_folder),
            args=GRPOConfig(
                **self.arguments(settings.grpo),
                num_generations=settings.generations,
                num_generations_eval=1,
                max_completion_length=settings.completion_tokens,
                beta=settings.grpo_beta,
                # The two rewards have different scales, so each counts by its own spread within a question.
                multi_objective_aggregation="normalize_then_sum",
            ),
            reward_funcs=[
                AutoModelForSequenceClassification.from_pretrained(self.reward_folder, num_labels=1),
                answer_overlap,
            ],
            reward_processing_classes=[self.data.tokenizer, None],
            train_dataset=Dataset.from_list(self.data.train).remove_columns("completion"),
            eval_dataset=Dataset.from_list(self.data.held_out).remove_columns("completion"),
            processing_class=self.data.tokenizer,
        )
        rewards = {MODEL_REWARD: f"rewards/{REWARD_MODEL}/mean", ANSWER_OVERLAP: "rewards/answer_overlap/mean"}
        shown = {key: name for name, key in rewards.items()} | {"eval_rewards/answer_overlap/mean": "held-out"}
        watch, seconds = self.watch_training(GRPO, trainer, shown, evaluate_first=True)
        figures = {}
        for name, key in rewards.items():
            values = [value for _, value in watch.curves[key]]
            figures[f"{name}, start"] = mean(values[: settings.average_steps])
            figures[f"{name}, end"] = mean(values[-settings.average_steps :])
            held_out = watch.curves[f"eval_{key}"]
            figures[f"{name}, held-out, before"], figures[f"{name}, held-out, after"] = held_out[0][1], held_out[-1][1]
        return self.stage(trainer, watch, seconds, figures)

    def dpo(self) -> Stage:
        settings = self.settings
        set_seed(settings.seed)
        trainer = DPOTrainer(
            # The reference model is a second copy, which the trainer reads from the same folder.
            model=AutoModelForCausalLM.from_pretrained(self.sft_folder),
            args=DPOConfig(**self.arguments(settings.dpo), max_length=settings.max_length, beta=settings.dpo_beta),
            train_dataset=self.data.train_preferences,
            eval_dataset=self.data.held_out_preferences,
            processing_class=self.data.tokenizer,
        )
        shown = {"rewards/margins": "margin"} | {f"eval_{kind}_rewards/accuracies": kind for kind in KINDS}
        watch, seconds = self.watch_training(DPO, trainer, shown)
        margin = mean([watch.last(f"eval_{kind}_rewards/margins") for kind in KINDS])
        figures = {MARGIN: margin} | accuracies(watch, "eval_{}_rewards/accuracies")
        return self.stage(trainer, watch, seconds, figures)

    def arguments(self, stage: StageSettings) -> dict[str, Any]:
        return shared_arguments(self.optim, self.settings.seed, stage.steps) | {
            "output_dir": str(self.folder / "trainer"),
            "per_device_train_batch_size": stage.batch_size,
            "per_device_eval_batch_size": EVAL_BATCH,
            "learning_rate": stage.learning_rate,
            "logging_steps": 1,
        }

    def watch_training(
        self, label: str, trainer: Any, shown: dict[str, str], evaluate_first: bool = False
    ) -> tuple[Watch, float]:
        """What was logged, and the seconds."""
        started = time.perf_counter()
        watch = train_watched(label, trainer, shown, self.console, evaluate_first)
        return watch, time.perf_counter() - started

    def stage(self, trainer: Any, watch: Watch, seconds: float, figures: dict[str, float]) -> Stage:
        state = measure_state(trainer.model, trainer.optimizer)
        return Stage(**state, seconds=seconds, figures=figures, curves=dict(watch.curves))


def attending_to_equal_words(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with new attention weights that let each token attend most to those equal to it.

    The keys' weights are made the queries', and wider by the root of MATCHING. An answer takes up words of its
    question; from ordinary weights a small model needs many more steps than the demo has to find that out.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(MATCHING**0.5)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model


def accuracies(watch: Watch, key: str) -> dict[str, float]:
    """The held-out accuracy over all pairs, and over those of each kind; there are as many of one as of the other."""
    by_kind = {kind: watch.last(key.format(kind)) for kind in KINDS}
    named = {f"{ACCURACY}, {kind}": value for kind, value in by_kind.items()}
    return {ACCURACY: mean(list(by_kind.values()))} | named


def mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
