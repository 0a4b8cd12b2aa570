"""Computes the GPU memory that each recipe of scripts/recipes/ needs. Nothing is measured, and no GPU is used.

    python benchmarks/recipe_memory.py            # writes the results and the head of every recipe

The model is built on the meta device from the facts in MODELS, with the adapters that the recipe asks TRL for. These
parts are exact: the weights, the adapters (which PEFT keeps in float32 beside a bfloat16 model), the reference model
(DPO, KTO, and GRPO and RLOO with beta above 0 load a second copy of the model; with LoRA the adapters are switched off
instead, and with precompute_ref_log_probs it is used before training), the reward model, the gradients (one per
trainable weight, in its dtype), the optimizer state (from its declared tensors) and the step's temporaries. The
temporaries are what the launches of the Triton kernels hold: tables of addresses, and tables that say to which part
each tile, partial sum and reduction belongs, and the partial sums and scalars of the largest launch. For a weight that
is projected, or not covered by these kernels, they are the float32 temporaries with which plain torch steps one tile
of up to 2^24 entries.

The other parts follow from formulas for TRL 1.16 with gradient checkpointing, bf16 autocast and attention that stores
no scores. T is the number of tokens in a batch of full rows, h the hidden size, i the intermediate size, q and k the
widths of queries and keys, v the vocabulary, and L the number of layers. All sizes are in bytes:

- checkpoints: the input of every layer, 2 T h L;
- one layer, recomputed in the backward pass: what autograd saves, T (16 h + 4 q + 4 k + 8 i), or with LoRA
  T (18 h + 6 q + 4 k + 8 i), where frozen weights save nothing and every adapter its own input; a test counts both on
  a real layer; and T 4 i for the gradients that flow through the MLP;
- LM head: TRL computes the logits in tiles of 4096 tokens x 32768 words and keeps one, 2 min(T, 4096) 32768; plus the
  float32 gradients of its input, 4 T h, and, where it is trained, of its weight, with a copy: 6 v h;
- rollout: keys and values of all completions of one generation batch, 4 k L for each token; plus one layer's forward
  pass of the reward model, if any, over all of them: T (2 h + 6 i) with that model's sizes.

A prompt of a rollout is assumed to have PROMPT_TOKENS tokens. The planned peak is what is always in memory (the
weights to the optimizer state) and the largest of three moments: the backward pass (gradients, checkpoints, and one
layer or the LM head), the update (gradients and temporaries), and the rollout, before which the gradients are freed.
Released gradients leave for pinned host memory as they come, where TRL clips or accumulates, and one at a time is on
the GPU: the largest is counted. The CUDA context, fragmentation, the data, and the workspace of matrix products are
not counted.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import describe_machine  # noqa: E402

import hf_lowmem  # noqa: E402
from hf_lowmem.kernels import TRITON, forced  # noqa: E402
from hf_lowmem.kernels.bucket import Bucket, ParamStep  # noqa: E402
from hf_lowmem.kernels.columns import SCALARS  # noqa: E402
from hf_lowmem.kernels.means import tile_size  # noqa: E402
from hf_lowmem.kernels.triton import launch, variants  # noqa: E402
from hf_lowmem.trainer.callbacks import clip_of  # noqa: E402
from hf_lowmem.trainer.optim_args import recipe_for  # noqa: E402
from hf_lowmem.trainer.trl_script import make_parser  # noqa: E402

RECIPES = ROOT / "scripts" / "recipes"
PROMPT_TOKENS = 256
GIB = 2**30
MODELS = {  # from their public config.json
    "Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}


@dataclass(frozen=True)
class Plan:
    """The parts of one recipe's memory in bytes: what is always there, and what is there at some moments."""

    task: str
    model: str
    always: dict[str, int]
    moments: dict[str, dict[str, int]]
    notes: dict[str, str]

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + max(sum(parts.values()) for parts in self.moments.values())


def plan(recipe: Path) -> Plan:
    """Return the plan of one YAML file, which is read by the parser of its task."""
    task = recipe.stem.split("_")[0]
    parser = make_parser(task)
    script, training, model_args, _ = parser.parse_args_and_config(["--config", str(recipe), "--use_cpu", "True"])
    name, config = facts(model_args.model_name_or_path)
    model = meta_model(config, classifier=task == "reward")
    base = nbytes(model.parameters())
    always, notes = {"weights": base}, {"weights": f"{count(model.parameters()):,} in bfloat16"}
    if model_args.use_peft:
        from trl import get_peft_config

        model = get_peft(model, get_peft_config(model_args))
        always["adapters"] = nbytes(model.parameters()) - base
    trainable = [param for param in model.parameters() if param.requires_grad]
    beta = getattr(training, "beta", 0.0)
    precomputed = getattr(training, "precompute_ref_log_probs", False)
    if task in ("dpo", "kto", "grpo", "rloo") and beta > 0 and not precomputed:
        if model_args.use_peft:
            notes["weights"] += ", the reference model too, with the adapters off"
        else:
            always["reference model"] = base
    judge = None
    if getattr(script, "reward_model_name_or_path", None):
        judge_name, judge = facts(script.reward_model_name_or_path)
        always["reward model"] = nbytes(meta_model(judge, classifier=True).parameters())
        notes["reward model"] = judge_name
    state = hf_lowmem.explain(model, training.optim, training.optim_args)
    always["optimizer state"] = state.nbytes
    notes["optimizer state"] = f"{state.bytes_per_param:.3f} bytes for each of {state.numel:,} trainable weights"
    if model_args.use_peft:
        notes["adapters"] = f"rank {model_args.lora_r}, float32"

    rows, length = batch(task, training)
    gradients = {"gradients": nbytes(trainable)}
    if recipe_for(training.optim, training.optim_args).release:
        assert clip_of(training, "auto") == "host", "steps in the backward pass are not planned"
        gradients = {"one gradient": max(param.nbytes for param in trainable)}
        notes["one gradient"] = "the others are in pinned host memory"
    notes["checkpoints"] = f"{rows} x {length} tokens"
    moments = {
        "backward pass": {**gradients, **activations(task, config, rows * length, model_args.use_peft)},
        "update": {**gradients, "temporaries": step_temporaries(model, training.optim, training.optim_args)},
    }
    if task in ("grpo", "rloo"):
        answers = training.per_device_train_batch_size * training.steps_per_generation
        tokens = answers * length
        moments["rollout"] = {"keys and values": 4 * key_width(config) * config.num_hidden_layers * tokens}
        notes["keys and values"] = f"{answers} x {length} tokens"
        if judge is not None:
            moments["rollout"]["reward model's layer"] = tokens * (2 * judge.hidden_size + 6 * judge.intermediate_size)
    return Plan(task, name, always, moments, notes)


def batch(task: str, training: Any) -> tuple[int, int]:
    """Return the number of rows in one forward pass and their length in tokens if all are full."""
    rows = training.per_device_train_batch_size * (2 if task in ("reward", "dpo") else 1)  # chosen and rejected
    rollout = task in ("grpo", "rloo")
    return rows, PROMPT_TOKENS + training.max_completion_length if rollout else training.max_length


def activations(task: str, config: Any, tokens: int, adapters: bool) -> dict[str, int]:
    """Return the bytes of the backward pass without the gradients, by the formulas above."""
    hidden, layer_bytes = config.hidden_size, layer_saved(config, adapters) + 4 * config.intermediate_size
    peaks = {"one layer": tokens * layer_bytes}
    if task != "reward":
        head_weight = 0 if adapters else 6 * config.vocab_size * hidden
        peaks["LM head"] = 2 * min(tokens, 4096) * 32768 + 4 * tokens * hidden + head_weight
    larger = max(peaks, key=lambda name: peaks[name])
    return {"checkpoints": 2 * tokens * hidden * config.num_hidden_layers, larger: peaks[larger]}


def layer_saved(config: Any, adapters: bool) -> int:
    """Return the bytes per token that autograd saves in one decoder layer."""
    hidden, queries = (18, 6) if adapters else (16, 4)
    # the queries are as wide as the hidden state in these models
    return (hidden + queries) * config.hidden_size + 4 * key_width(config) + 8 * config.intermediate_size


def key_width(config: Any) -> int:
    return config.hidden_size // config.num_attention_heads * config.num_key_value_heads


def step_temporaries(model: Any, optim: str, optim_args: str | None) -> int:
    """Return the bytes of a step's temporaries on a GPU."""
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-3, optim_args=optim_args)
    tables, passing = dict[int, torch.Tensor](), 0
    for group in optimizer.param_groups:
        by_rule: dict[str, list[ParamStep]] = defaultdict(list)
        for param in group["params"]:
            plan = optimizer.plan_of(param)
            step = ParamStep(param, torch.empty_like(param), optimizer.init_state(param), plan, 1.0)
            rule = optimizer.rule_of(plan, group)
            if not variants.is_covered(rule, step):
                return torch_temporaries(model, optim, optim_args)
            by_rule[rule].append(step)
        for rule, steps in by_rule.items():
            bucket = Bucket.of(steps, rule, TRITON)
            for each in launches_of(bucket):
                found = each.tables(bucket, bucket.gradient_addresses())
                tables |= {id(table): table for table in found if table is not None}
                sums = 0 if found.sums is None else each.number_of_sums
                means = 0 if found.groups is None else len(found.groups)
                passing = max(passing, 8 * len(SCALARS) * len(steps) + 4 * (sums + means))
    return nbytes(tables.values()) + passing


def launches_of(bucket: Bucket) -> list[launch.Launch]:
    """Return the launches for a bucket as on a GPU with Triton, whose dtypes do not matter here."""
    dtypes = {dtype: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8)}
    variants._planned.cache_clear()  # plans with other dtypes must not be reused
    try:
        with patch.object(variants, "triton_kernels", lambda: SimpleNamespace(DTYPES=dtypes)):
            return launch.launches_of(bucket, averaged=False)
    finally:
        variants._planned.cache_clear()


class Temporaries(TorchDispatchMode):
    """Finds the most bytes of new tensors that exist at one time inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        for tensor in tensors_of(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in theirs and storage.data_ptr() not in self._live:
                self._live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, storage.data_ptr())
        self.most = max(self.most, sum(self._live.values()))
        return out


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def torch_temporaries(model: Any, optim: str, optim_args: str | None) -> int:
    """Return the bytes of the temporaries of one tile on a GPU, from those of one tile on the CPU."""
    sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    trainable = [param for param in model.parameters() if param.requires_grad]
    small = LlamaForCausalLM(LlamaConfig(**sizes)).to(trainable[0].dtype)  # every matrix is one tile of 256 x 256
    for param in small.parameters():
        param.grad = torch.ones_like(param)
    optimizer = hf_lowmem.build_optimizer(small, optim, lr=1e-3, optim_args=optim_args)
    with forced("in_place", "tiles"):
        optimizer.step()  # creates the state
        with Temporaries() as temporaries:
            optimizer.step()
    tile = min(tile_size(torch.device("cuda")), max(param.numel() for param in trainable))
    return -(-temporaries.most // (4 * 256**2)) * 4 * tile


def facts(name_or_path: str) -> tuple[str, Any]:
    """Return the model's short name and its config; a folder has the name of the model that it was made from."""
    return next((name, config) for name, config in MODELS.items() if Path(name_or_path).name.startswith(name))


def meta_model(config: Any, classifier: bool) -> Any:
    config.num_labels = 1
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.bfloat16)


def get_peft(model: Any, peft_config: Any) -> Any:
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, peft_config)


def count(params: Any) -> int:
    return sum(param.numel() for param in params)


def nbytes(params: Any) -> int:
    return sum(param.numel() * param.element_size() for param in params)


def head(recipe: Path, planned: Plan) -> str:
    """Return the comment at the head of the recipe."""
    command = f"hf-lowmem {planned.task} --config {recipe.relative_to(ROOT)}"
    lines = [
        command,
        "",
        f"Planned GPU memory: {planned.peak / GIB:.1f} GiB. Computed, not measured; in GiB:",
        "always",
    ]
    for part, size in planned.always.items():
        lines.append(line(part, size, planned.notes.get(part)))
    lines.append("and the largest of")
    for moment, parts in planned.moments.items():
        made_of = " + ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items())
        notes = "; ".join(planned.notes[part] for part in parts if part in planned.notes)
        lines.append(line(moment, sum(parts.values()), made_of + (f" ({notes})" if notes else "")))
    lines.append("The formulas, and what is left out: benchmarks/recipe_memory.py")
    return "".join(f"# {text}".rstrip() + "\n" for text in lines)


def line(part: str, size: int, note: str | None) -> str:
    return f"{size / GIB:8.2f}  {part}" + (f": {note}" if note else "")


def body(recipe: Path) -> str:
    """Return the file without the comment at its head."""
    lines = recipe.read_text().splitlines(keepends=True)
    first = next(i for i, text in enumerate(lines) if not text.startswith("#") and text.strip())
    return "".join(lines[first:])


def render(report: dict[str, Any]) -> str:
    machine = report["machine"]
    parts = list(dict.fromkeys(part for row in report["recipes"].values() for part in row["always"]))
    lines = [
        "# Planned GPU memory of the recipes, GiB",
        "",
        f"Computed, not measured (`{machine['command']}`, commit {machine['commit']}): weights, gradients and "
        "optimizer state are exact, activations and rollouts by the formulas in the script.",
        "",
        f"| recipe | peak | {' | '.join(parts)} | backward pass | update | rollout |",
        f"|---|{'---:|' * (len(parts) + 4)}",
    ]
    for name, row in report["recipes"].items():
        always = [row["always"].get(part) for part in parts]
        moments = [row["moments"].get(moment) for moment in ("backward pass", "update", "rollout")]
        sizes = [Plan(**row).peak, *always, *(sum(moment.values()) if moment else None for moment in moments)]
        reductions = ["" if size is None else f"{size / GIB:.2f}" for size in sizes]
        lines.append(f"| `{name}` | {' | '.join(reductions)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    report: dict[str, Any] = {"machine": describe_machine("cpu"), "prompt_tokens": PROMPT_TOKENS, "recipes": {}}
    for recipe in sorted(RECIPES.glob("*.yaml")):
        planned = plan(recipe)
        recipe.write_text(f"{head(recipe, planned)}\n{body(recipe)}")
        report["recipes"][recipe.stem] = asdict(planned)
    output = ROOT / "benchmarks" / "results" / "recipe_memory.json"
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(render(report))
    print(render(report))


if __name__ == "__main__":
    main()
