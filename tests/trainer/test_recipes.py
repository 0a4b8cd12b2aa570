"""The recipes of scripts/recipes: TRL's parsers know every key, and the planned memory is what the script computes."""

import json
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

import hf_lowmem
from hf_lowmem.kernels import forced
from hf_lowmem.kernels.triton import backend, launch, variants
from hf_lowmem.trainer.names import optim_name
from hf_lowmem.trainer.optim_args import recipe_for
from tests import ROOT

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
TASKS = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
REPORT = json.loads((ROOT / "benchmarks" / "results" / "recipe_memory.json").read_text())
CARDS = {"24gb": 23.5, "32gb": 31.5}  # GiB that such cards have
SIZES = {"0.5b": "Qwen2.5-0.5B", "1.5b": "Qwen2.5-1.5B", "8b": "Llama-3.1-8B"}


@pytest.fixture(scope="module")
def recipe_memory():
    import recipe_memory

    return recipe_memory


def test_every_task_has_a_recipe_for_every_size_in_full_and_with_lora():
    wanted = {f"{task}_{size}_{kind}" for task in TASKS for size in SIZES for kind in ("full", "lora")}
    wanted |= {f"{task}_8b_full_{card}" for task in ("sft", "dpo") for card in CARDS}
    assert {path.stem for path in RECIPES} == wanted


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem.endswith("gb")], ids=lambda path: path.stem)
def test_what_is_planned_for_a_card_leaves_a_gib_of_it(recipe, recipe_memory):
    peak = recipe_memory.Plan(**REPORT["recipes"][recipe.stem]).peak
    assert peak <= (CARDS[recipe.stem.split("_")[-1]] - 1) * recipe_memory.GIB


@cache
def options_of(task):
    from hf_lowmem.trainer.trl_script import make_parser

    return {action.dest: action.type for action in make_parser(task)._actions}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_keys_are_known_and_the_optimizer_is_ours(recipe):
    task, size, kind, *_ = recipe.stem.split("_")
    given = yaml.safe_load(recipe.read_text())
    options = options_of(task)
    assert given.keys() <= options.keys()
    for key, value in given.items():  # "1e-6" without a dot is text in YAML
        assert isinstance(value, (int, float)) or options[key] is not float, key
    assert SIZES[size] in given["model_name_or_path"]
    assert optim_name(given["optim"])
    narrow = recipe_for(given["optim"], given.get("optim_args")).rounding != "nearest"
    assert narrow == (kind == "full" or task == "reward")  # adapters are float32, a reward model's head is not
    assert given.get("use_peft", False) == (kind == "lora")
    assert given["dtype"] == "bfloat16"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_head_says_what_the_script_has_written(recipe, recipe_memory):
    committed = recipe_memory.Plan(**REPORT["recipes"][recipe.stem])
    assert recipe.read_text() == f"{recipe_memory.head(recipe, committed)}\n{recipe_memory.body(recipe)}"


@pytest.mark.parametrize("name", [path.stem for path in RECIPES if "_0.5b_" in path.stem] + ["rloo_8b_full"])
def test_what_the_script_has_written_is_what_it_computes(name, recipe_memory):
    assert asdict(recipe_memory.plan(recipe_memory.RECIPES / f"{name}.yaml")) == REPORT["recipes"][name]


def test_the_meta_models_have_the_published_sizes(recipe_memory):
    sizes = {
        name: recipe_memory.count(recipe_memory.meta_model(config, classifier=False).parameters())
        for name, config in recipe_memory.MODELS.items()
    }
    assert sizes == {"Qwen2.5-0.5B": 494_032_768, "Qwen2.5-1.5B": 1_543_714_304, "Llama-3.1-8B": 8_030_261_248}


SMALL = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, vocab_size=3000
)


class Launches:
    """In the place of the Triton kernels: the tensors that each launch is given, by their addresses."""

    def __init__(self):
        self.DTYPES = {dtype: dtype for dtype in (torch.bfloat16, torch.float32, torch.uint8)}
        self.tl = SimpleNamespace(constexpr=lambda value: value)
        self.given = [{}]
        self.sum_squares = self.combine = self.mean_of_rows = self.step = self

    def __getitem__(self, grid):
        return lambda *tensors, **options: self.given[-1].update({id(tensor): tensor for tensor in tensors})


@pytest.mark.parametrize(
    "optim", ["slim_adamw_8bit", "adam_mini", "adalayer_8bit", "signum", "lowmem_adamw_8bit", "factored_adamw_8bit"]
)
def test_temporaries_are_what_the_launches_are_given(optim, recipe_memory, monkeypatch):
    launches, step = Launches(), launch.Launch.step
    for module in (backend, launch, variants):
        monkeypatch.setattr(module, "triton_kernels", lambda: launches)
    monkeypatch.setattr(launch, "compiled_for", lambda variant: variant)
    monkeypatch.setattr(launch, "warps", lambda variant: 1)
    monkeypatch.setattr(launch.Launch, "step", lambda *args: (launches.given.append({}), step(*args)))
    variants._planned.cache_clear()
    model = LlamaForCausalLM(SMALL).bfloat16()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer = hf_lowmem.build_optimizer(model, optim, lr=1e-3)
    with forced("triton"):
        optimizer.step()
    given = [list(tensors.values()) for tensors in launches.given]
    kept = {id(tensor): tensor.nbytes for tensors in given for tensor in tensors if not tensor.is_floating_point()}
    passing = max(sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point()) for tensors in given)
    expected = sum(kept.values()) + passing
    monkeypatch.undo()
    variants._planned.cache_clear()
    assert recipe_memory.step_temporaries(recipe_memory.meta_model(SMALL, False), optim, None) == expected


def test_temporaries_of_what_is_projected_are_those_of_plain_torch(recipe_memory):
    model = recipe_memory.meta_model(SMALL, classifier=False)
    largest = max(param.numel() for param in model.parameters())
    assert recipe_memory.step_temporaries(model, "coap_adamw", None) % (4 * largest) == 0


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("config_cls", [LlamaConfig, Qwen2Config])
def test_the_formula_for_one_layer_counts_what_autograd_saves(config_cls, adapters, recipe_memory):
    config = config_cls(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if adapters:
        lora = peft.LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).get_base_model()
    tokens, saved = 1024, {}
    hidden = torch.randn(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (hidden, *model.parameters())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            saved[storage.data_ptr()] = storage
        return tensor

    positions = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model.layers[0](hidden, position_embeddings=positions)
    assert output.requires_grad
    counted = sum(storage.nbytes() for storage in saved.values()) / tokens
    assert counted == pytest.approx(recipe_memory.layer_saved(config, adapters), rel=0.04)
