"""Every trainer of the installed TRL with our names: the optimizer, its groups, a finite loss, bit-exact resume.

pytest tests/test_trl_trainers.py --trl-table docs/trl_trainers.md      writes the table of what was run
"""

from __future__ import annotations

import ast
import gc
import math
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from trl_trainers import EXCLUDED, MODELS, NOT_SAVED, TRAINERS, TrlTrainer, save_model

import hf_lowmem

# Settings with which 8 bits and the projection apply to these small weights, and a basis changes within four steps.
OPTIMS = {
    "slim_adamw_8bit": "min_8bit_size=0,block_size=64",
    "adam_mini": None,
    "coap_adamw_8bit": "min_8bit_size=0,rank_ratio=2,update_interval=2",
}
EXACT = "bit-exact"
TABLE = Path(__file__).parents[1] / "docs" / "trl_trainers.md"

Run = Callable[..., tuple[Trainer, Trainer]]


@pytest.fixture(scope="module", autouse=True)
def _quick_and_quiet() -> Iterator[None]:
    """Tensors this small are slower on two threads, and the collection before each training walks all of TRL."""
    pytest.importorskip("trl")
    import datasets
    import trl.trainer.sft_trainer

    hf_lowmem.register()
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The model and the teacher of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: (save_model(family, root / family), save_model(family, root / f"{family}-teacher", seed=1))
        for family in MODELS
    }


@pytest.fixture
def run(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> Run:
    """`run(declaration, family, optim, optim_args)`: a run of four steps, and one resumed from its second step."""

    def run(declared: TrlTrainer, family: str, optim: str, optim_args: str | None = None) -> tuple[Trainer, Trainer]:
        def build() -> Trainer:
            return declared.build(*folders[family], tmp_path, optim=optim, optim_args=optim_args)

        whole = build()
        whole.train()
        resumed = build()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert whole.state.global_step == resumed.state.global_step == 4
        return whole, resumed

    return run


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    return trainer.optimizer.optimizer


def same_weights(mine: Trainer, theirs: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True))


def same_state(mine: Trainer, theirs: Trainer) -> bool:
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        ours, others = inner(mine).state.get(a, {}), inner(theirs).state.get(b, {})
        if ours.keys() != others.keys() or not all(torch.equal(ours[name], others[name]) for name in ours):
            return False
    return True


def assert_trained(trainer: Trainer) -> None:
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logged)
    assert any(entry["grad_norm"] > 0 for entry in logged)


def assert_declared_state(trainer: Trainer, optim: str, optim_args: str | None) -> None:
    """The optimizer is ours, and holds the tensors that `explain` declares and no others."""
    optimizer = inner(trainer)
    explanation = hf_lowmem.explain(trainer.model, optim, optim_args)
    assert optimizer.param_groups[0]["algorithm"] == explanation.algorithm
    declared = {row.name: row.state for row in explanation.rows if row.trainable}
    names = {id(param): row.name for param, row in zip(trainer.model.parameters(), explanation.rows, strict=True)}
    held = {
        names[id(param)]: {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state.items()
        }
        for param, state in optimizer.state.items()
    }
    assert held == declared
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == explanation.nbytes

    moments = [(param, state) for param, state in optimizer.state.items() if param.ndim > 1]
    if optim.endswith("8bit"):
        assert any(state["exp_avg"].dtype == torch.uint8 for _, state in moments)
    if optim.startswith("coap"):
        assert any("proj" in state for _, state in moments)
    else:
        assert any(state["exp_avg_sq"].numel() < param.numel() for param, state in moments)


def assert_the_trainers_groups(trainer: Trainer) -> None:
    """Each parameter has the weight decay and the learning rate that this trainer gives it under adamw_torch."""
    mine = {
        id(param): (group["initial_lr"], group["weight_decay"])
        for group in inner(trainer).param_groups
        for param in group["params"]
    }
    trainer.args.optim, trainer.args.optim_args, trainer.optimizer = "adamw_torch", None, None
    theirs = trainer.create_optimizer()
    assert type(theirs) is torch.optim.AdamW
    assert mine == {
        id(param): (group["lr"], group["weight_decay"]) for group in theirs.param_groups for param in group["params"]
    }
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    named = [(name, param) for name, param in trainer.model.named_parameters() if param.requires_grad]
    assert mine == {id(param): (1e-3, 0.1 if name in decayed else 0.0) for name, param in named}
    assert {0.0, 0.1} == {weight_decay for _, weight_decay in mine.values()}


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trains_and_resumes(trainer: str, family: str, optim: str, run: Run, trl_table: dict) -> None:
    declared = TRAINERS[trainer]
    whole, resumed = run(declared, family, optim, OPTIMS[optim])
    assert_trained(whole)
    assert_declared_state(resumed, optim, OPTIMS[optim])
    if not declared.not_saved:
        assert same_weights(whole, resumed)
        assert same_state(whole, resumed)
    assert_the_trainers_groups(resumed)
    trl_table[trainer, family, optim] = "resumes" if declared.not_saved else EXACT


@pytest.mark.parametrize("case", NOT_SAVED)
def test_what_trl_does_not_save_no_optimizer_resumes(case: str, run: Run) -> None:
    whole, resumed = run(NOT_SAVED[case], "llama", "adamw_torch")
    assert_trained(whole)
    assert not same_weights(whole, resumed)


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
    families = " and a ".join(MODELS)
    lines = [
        "# TRL's trainers with our optim names",
        "",
        f"Written by `pytest tests/test_trl_trainers.py --trl-table docs/trl_trainers.md` with {versions}, on a CPU.",
        "",
        f"Each trainer trains a tiny {families} for four steps with each name, and once more from the checkpoint of",
        "the second step. Checked each time: the optimizer is ours and holds the state that `explain` declares; every",
        "parameter has the learning rate and the weight decay that it has under `adamw_torch`; the losses are finite.",
        "`bit-exact`: the resumed run ends with the same weights and optimizer state. `resumes`: it does not, and nor",
        "does `adamw_torch`.",
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


def test_the_committed_table_is_of_these_trainers_and_all_of_them_ran() -> None:
    complete = {
        (trainer, family, optim): "resumes" if declared.not_saved else EXACT
        for trainer, declared in TRAINERS.items()
        for family in MODELS
        for optim in OPTIMS
    }
    rows = [line for line in table_of(complete).splitlines() if line.startswith("|")]
    assert [line for line in TABLE.read_text().splitlines() if line.startswith("|")] == rows
