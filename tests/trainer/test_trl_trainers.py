"""Every trainer of the installed TRL with our names: the optimizer, its groups, a finite loss, bit-exact resume.

pytest tests/trainer/test_trl_trainers.py --trl-table docs/trl_trainers.md      writes the table of what was run
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from tests import ROOT
from tests.support.resumed_runs import (
    assert_declared_state,
    assert_the_trainers_groups,
    assert_trained,
    inner,
    run_and_resume,
    same_state,
    same_weights,
)
from tests.support.slow import fast_only, slow
from tests.support.trl_trainers import EXCLUDED, MODELS, NOT_SAVED, TRAINERS, TrlTrainer, save_model

pytestmark = pytest.mark.usefixtures("trl_ready")

# Settings with which 8 bits and the projection apply to these small weights, and a basis changes within four steps.
OPTIMS = {
    "slim_adamw_8bit": "min_8bit_size=0,block_size=64",
    "adam_mini": None,
    "coap_adamw_8bit": "min_8bit_size=0,rank_ratio=2,update_interval=2",
}
EXACT = "bit-exact"
TABLE = ROOT / "docs" / "trl_trainers.md"

Run = Callable[..., tuple[Trainer, Trainer]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The model and the teacher of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: (save_model(make, root / family), save_model(make, root / f"{family}-teacher", seed=1))
        for family, make in MODELS.items()
    }


@pytest.fixture
def run(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> Run:
    """`run(declaration, family, optim, optim_args)`: a run of four steps, and one resumed from its second step."""

    def run(declared: TrlTrainer, family: str, optim: str, optim_args: str | None = None) -> tuple[Trainer, Trainer]:
        options = {"optim": optim, "optim_args": optim_args}
        return run_and_resume(lambda: declared.build(*folders[family], tmp_path, **options), tmp_path)

    return run


def assert_made_smaller(trainer: Trainer, optim: str) -> None:
    """The name's own kind of state applies to some weight of these small models."""
    moments = [(param, state) for param, state in inner(trainer).state.items() if param.ndim > 1]
    if optim.endswith("8bit"):
        assert any(state["exp_avg"].dtype == torch.uint8 for _, state in moments)
    if optim.startswith("coap"):
        assert any("proj" in state for _, state in moments)
    else:
        assert any(
            "exp_avg_sq_row" in state or state["exp_avg_sq"].numel() < param.numel() for param, state in moments
        )


@pytest.mark.parametrize("optim", fast_only(OPTIMS, ("slim_adamw_8bit",)))
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_and_resumes(trainer: str, family: str, optim: str, run: Run, trl_table: dict) -> None:
    declared = TRAINERS[trainer]
    whole, resumed = run(declared, family, optim, OPTIMS[optim])
    assert_trained(whole)
    assert_declared_state(resumed, optim, OPTIMS[optim])
    assert_made_smaller(resumed, optim)
    if not declared.not_saved:
        assert same_weights(whole, resumed)
        assert same_state(whole, resumed)
    assert_the_trainers_groups(resumed)
    trl_table[trainer, family, optim] = "resumes" if declared.not_saved else EXACT


@pytest.mark.parametrize("trainer", ["sft", "reward", "dpo", "kto", "grpo", "rloo"])
def test_resumes_with_the_precision_and_the_checkpointing_that_trl_sets_by_default(trainer: str, run: Run) -> None:
    declared = TRAINERS[trainer]
    defaults = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    declared = replace(declared, config={**declared.config, **defaults})
    whole, resumed = run(declared, "llama", "slim_adamw_8bit", OPTIMS["slim_adamw_8bit"])
    assert_trained(whole)
    assert same_weights(whole, resumed)
    assert same_state(whole, resumed)


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_trl_does_not_save_no_optimizer_resumes(case: str, run: Run) -> None:
    whole, resumed = run(NOT_SAVED[case], "llama", "adamw_torch")
    assert_trained(whole)
    assert not same_weights(whole, resumed)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "rloo", "online_dpo"])
def test_state_on_the_host_during_rollouts_changes_nothing(
    trainer: str, folders: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between CPU tensors here, which the moves take for ones on an accelerator."""
    monkeypatch.setattr("hf_lowmem.placement.on_accelerator", lambda tensor: tensor.is_cuda or tensor.ndim > 0)
    runs = {}
    for text in ("false", "true"):
        options = dict(optim="slim_adamw_8bit", optim_args=f"offload_state={text},min_8bit_size=0,block_size=64")
        runs[text] = TRAINERS[trainer].build(*folders["llama"], tmp_path, **options)
        runs[text].train()
    assert same_weights(runs["false"], runs["true"])
    assert same_state(runs["false"], runs["true"])
    moved = [sum(entry.get("offload_gib", 0) for entry in run.state.log_history) for run in runs.values()]
    assert moved[0] == 0
    assert moved[1] > 0


MAIN = ("sft", "reward", "dpo", "kto", "grpo", "rloo")
# With accumulation these do not resume under adamw_torch either.
ACCUMULATED_NOT_SAVED = ("sdft", "gold", "iw_opd", "distillation")


@pytest.mark.parametrize(
    ("trainer", "clip"),
    [
        *((trainer, clip) for trainer in MAIN for clip in ("host", "recompute")),
        *(slow(trainer, clip) for trainer in MAIN for clip in ("accumulated", "none")),
        *(slow(trainer, "accumulated") for trainer in TRAINERS if trainer not in MAIN),
    ],
)
def test_released_gradients_change_nothing(trainer: str, clip: str, run: Run, folders: dict, tmp_path: Path) -> None:
    declared = TRAINERS[trainer]
    more = {"gradient_accumulation_steps": 2} if clip == "accumulated" else {}
    more |= {"max_grad_norm": 0.0} if clip == "none" else {"max_grad_norm": 0.01}
    declared = replace(declared, config={**declared.config, **more})
    options = OPTIMS["slim_adamw_8bit"]
    kept = declared.build(*folders["llama"], tmp_path / "kept", optim="slim_adamw_8bit", optim_args=options)
    kept.train()
    options += f",release=true,clip={'recompute' if clip == 'recompute' else 'auto'}"
    whole, resumed = run(declared, "llama", "slim_adamw_8bit", options)
    assert_trained(whole)
    resumes = not declared.not_saved and not (clip == "accumulated" and trainer in ACCUMULATED_NOT_SAVED)
    for other in (kept, resumed) if resumes else (kept,):
        assert same_weights(whole, other)
        assert same_state(whole, other)


def installed_trainers() -> set[str]:
    """All classes called Trainer of the installed TRL, by the shortest module that holds them; nothing is imported."""
    (root,) = map(Path, find_spec("trl").submodule_search_locations)
    found = set()
    for path in [*root.glob("trainer/*.py"), *root.glob("experimental/**/*.py")]:
        classes = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        for name in classes:
            if name.endswith("Trainer") and not name.startswith("_"):
                parts = path.relative_to(root).parts
                found.add(f"trl.{name}" if parts[0] == "trainer" else f"trl.experimental.{parts[1]}.{name}")
    return found


def test_every_trainer_of_the_installed_trl_is_run_or_excluded_with_a_reason() -> None:
    run = {qualified_name(declared) for declared in TRAINERS.values()}
    assert not run & set(EXCLUDED)
    assert run | set(EXCLUDED) == installed_trainers()


# ---------------------------------------------------------------- the table


def table_of(cells: dict[tuple[str, str, str], str]) -> str:
    """The page; a cell that no run filled says so."""
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("trl", "transformers", "torch"))
    families = " and a tiny ".join(family.capitalize() for family in MODELS)
    lines = [
        "# TRL's trainers with our optim names",
        "",
        "Written by `pytest tests/trainer/test_trl_trainers.py --trl-table docs/trl_trainers.md`",
        f"with {versions}, on a CPU.",
        "",
        f"Each trainer trains a tiny {families} for four steps with each name, and once more",
        "from the checkpoint of the second step, under the settings of `tests/support/trl_trainers.py`.",
        "Checked each time: the optimizer is ours and holds the state that `explain` declares; every parameter has",
        "the learning rate and the weight decay that it has under `adamw_torch`; the losses are finite. `bit-exact`:",
        "the resumed run ends with the same weights and optimizer state. `resumes`: it does not, and nor does",
        "`adamw_torch`.",
        "",
        "| trainer | " + " | ".join(f"`{optim}`" for optim in OPTIMS) + " |",
        "|---|" + "---|" * len(OPTIMS),
    ]
    for trainer, declared in TRAINERS.items():
        said = []
        for optim in OPTIMS:
            found = {cells.get((trainer, family, optim), "not run") for family in MODELS}
            said.append(" / ".join(sorted(found)))
        lines.append(f"| `{qualified_name(declared)}` | {' | '.join(said)} |")
    lines += [
        "",
        "What TRL itself does not save, so that a run with it does not resume bit-exactly under any optimizer:",
        "",
        "| run | not in the checkpoint |",
        "|---|---|",
        *(f"| {case} | {declared.not_saved} |" for case, declared in NOT_SAVED.items()),
        "| adapters on a 4-bit or 8-bit model (QLoRA) | that the adapters were bfloat16: they are read as float32 |",
        "",
        "Not run here:",
        "",
        "| trainer | why |",
        "|---|---|",
        *(f"| `{name}` | {why} |" for name, why in EXCLUDED.items()),
        "",
    ]
    return "\n".join(lines)


def qualified_name(declared: TrlTrainer) -> str:
    return ".".join([*declared.module.split(".")[:3], declared.name])


@pytest.fixture(scope="module")
def trl_table(request: pytest.FixtureRequest) -> Iterator[dict]:
    """What each run found, written at the end to the file that `--trl-table` names."""
    cells: dict[tuple[str, str, str], str] = {}
    yield cells
    if path := request.config.getoption("--trl-table"):
        Path(path).write_text(table_of(cells))


def test_the_committed_table_is_of_these_trainers_and_all_of_them_ran(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--trl-table"):
        pytest.skip("the table is being written")
    complete = {
        (trainer, family, optim): "resumes" if declared.not_saved else EXACT
        for trainer, declared in TRAINERS.items()
        for family in MODELS
        for optim in OPTIMS
    }
    rows = [line for line in table_of(complete).splitlines() if line.startswith("|")]
    assert [line for line in TABLE.read_text().splitlines() if line.startswith("|")] == rows
