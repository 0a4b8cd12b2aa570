"""What reaches the terminal, and how a user of the library has it otherwise."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments

import hf_lowmem
from hf_lowmem.log import PACKAGE, get_logger
from hf_lowmem.sizes import readable
from hf_lowmem.trainer.build import show_summary

START = "of optimizer state, AdamW"
WARNING = "[hf_lowmem] WARNING: 1 matrices have an unknown role"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """A root logger as in a process that has set no logging; pytest's has handlers."""
    fresh, level = logging.RootLogger(logging.WARNING), PACKAGE.level
    monkeypatch.setattr(PACKAGE, "parent", fresh)
    monkeypatch.setattr(PACKAGE, "handlers", [])
    PACKAGE.setLevel(logging.NOTSET)
    yield fresh
    PACKAGE.setLevel(level)


@pytest.fixture
def terminal(root: logging.Logger, capsys: pytest.CaptureFixture) -> Callable[[], str]:
    """What has been written to standard error since the last call."""
    return lambda: capsys.readouterr().err


def mystery() -> nn.Module:
    """A model that is worth a warning: the role of its matrix is unknown."""
    return nn.ModuleDict({"mystery": nn.Linear(64, 64, bias=False)})


def build(name: str = "slim_adamw", model: nn.Module | None = None, **options: object) -> torch.optim.Optimizer:
    return hf_lowmem.build_optimizer(mystery() if model is None else model, name, lr=1e-3, **options)


def test_one_line_and_the_warnings_are_shown_where_no_logging_is_set(terminal: Callable[[], str]) -> None:
    build()
    start, warning = terminal().splitlines()
    assert start == (
        "[hf_lowmem] slim_adamw: 32.00 KiB of optimizer state, AdamW 32.00 (+0 %); "
        'details: print(hf_lowmem.explain(model, "slim_adamw"))'
    )
    assert warning.startswith(WARNING)


def test_the_name_of_training_arguments_is_shown_as_it_is_written(terminal: Callable[[], str]) -> None:
    hf_lowmem.register()
    build(TrainingArguments(report_to=[], optim="slim_adamw").optim)
    assert terminal().startswith("[hf_lowmem] slim_adamw: 32.00 KiB")


@pytest.mark.parametrize(("dtype", "adamw"), [("float32", 8), ("bfloat16", 4), ("float16", 4), ("float64", 16)])
@pytest.mark.parametrize("name", ["slim_adamw_8bit", "lowmem_adamw", "coap_adafactor_8bit", "soap"])
def test_adamw_is_counted_in_the_weights_dtype(name: str, dtype: str, adamw: int, terminal: Callable[[], str]) -> None:
    frozen = nn.Linear(64, 64).requires_grad_(False)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), frozen).to(getattr(torch, dtype))
    build(name, model)
    found = re.search(r"\] (\w+): ([\d.]+) MiB of optimizer state, AdamW ([\d.]+) \(([+-]\d+) %\)", terminal())
    assert found is not None
    ours = hf_lowmem.explain(model, name).nbytes / 2**20
    assert found[1] == name
    assert float(found[2]) == pytest.approx(ours, abs=0.005)
    assert float(found[3]) == adamw
    assert int(found[4]) == round(100 * (ours / adamw - 1))


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (2**40 - 1, "1.00 TiB")],
)
def test_units_fit_the_size(nbytes: int, said: str) -> None:
    assert readable(nbytes) == said


@pytest.mark.parametrize(
    "options",
    [
        {"optim_args": "rank=8,scale=0.5"},
        {"optim_args": '{"rank": 8}'},
        {"optim_args": {"rank": 8, "align": "none"}},
        {"optim_args": "rank=8", "target_modules": ["mystery"]},
    ],
    ids=str,
)
def test_the_line_for_details_works(options: dict, terminal: Callable[[], str], capsys: pytest.CaptureFixture) -> None:
    model = mystery()
    hf_lowmem.optimizer_cls_and_kwargs(model, "coap_adamw", lr=1e-3, **options)
    start = terminal().splitlines()[0]
    state = re.search(r": ([\d.]+) KiB", start)
    assert state is not None
    exec(start.partition("details: ")[2], {"hf_lowmem": hf_lowmem, "model": model})  # noqa: S102
    nbytes = re.search(r"([\d,]+) bytes of state", capsys.readouterr().out)
    assert nbytes is not None
    assert f"{int(nbytes[1].replace(',', '')) / 1024:.2f}" == state[1]


def test_the_trainer_says_it_once(terminal: Callable[[], str], tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    hf_lowmem.register()
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    args = TrainingArguments(tmp_path, optim="adam_mini_8bit", max_steps=2, use_cpu=True, report_to=[])
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 16
    Trainer(model, args, train_dataset=rows).train()
    said = terminal()
    assert said.count(START) == 1
    assert said.count("[hf_lowmem] adam_mini_8bit: ") == 1


def test_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch, terminal: Callable[[], str]) -> None:
    monkeypatch.setenv("RANK", "1")
    build()
    assert not terminal()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    build()
    assert terminal().count(START) == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    build()
    assert not terminal()


def test_a_model_that_trains_nothing_has_no_line(terminal: Callable[[], str]) -> None:
    hf_lowmem.optimizer_cls_and_kwargs(mystery().requires_grad_(False), "slim_adamw", lr=1e-3)
    assert not terminal()


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR, logging.CRITICAL])
@pytest.mark.parametrize("of_root", [False, True])
def test_a_level_of_the_users_holds(
    level: int, of_root: bool, root: logging.Logger, terminal: Callable[[], str]
) -> None:
    (root if of_root else logging.getLogger("hf_lowmem")).setLevel(level)
    build()
    said = terminal()
    # The root logger's level is WARNING where nobody has set it.
    assert (START in said) == (level == logging.WARNING and of_root)
    assert (WARNING in said) == (level == logging.WARNING)


def test_the_role_summary_is_shown_on_request(terminal: Callable[[], str]) -> None:
    build()
    assert "by role" not in terminal()
    show_summary()
    build()
    said = terminal()
    assert said.count("[hf_lowmem] Optimizer state by role:\n") == 1
    assert said.count(START) == 1


@pytest.mark.parametrize("of_root", [False, True])
def test_a_handler_of_the_users_takes_over(of_root: bool, root: logging.Logger, terminal: Callable[[], str]) -> None:
    build()
    assert terminal().count(START) == 1
    mine = io.StringIO()
    (root if of_root else logging.getLogger("hf_lowmem")).addHandler(logging.StreamHandler(mine))
    build()
    assert not terminal()
    assert mine.getvalue().count(START) == 1
    assert mine.getvalue().count("unknown role") == 1


@pytest.mark.parametrize(
    ("configured", "said"),
    [
        ("", "[hf_lowmem] the start\n[hf_lowmem] WARNING: a warning\n"),
        ("logging.basicConfig()", "INFO:hf_lowmem:the start\nWARNING:hf_lowmem.test:a warning\n"),
        ("logging.basicConfig(format='%(message)s', level=logging.INFO)", "the start\na warning\n"),
        ("logging.getLogger('hf_lowmem').addHandler(logging.NullHandler())", ""),
    ],
)
def test_a_process_of_its_own(configured: str, said: str) -> None:
    code = (
        f"import logging\n{configured}\nfrom hf_lowmem.log import announce, get_logger\n"
        "announce('the %s', 'start')\nget_logger('hf_lowmem.test').warning('a warning')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == said


def test_transformers_logging_does_not_say_it_again(terminal: Callable[[], str]) -> None:
    from transformers.utils import logging as theirs

    theirs.set_verbosity_info()
    theirs.enable_propagation()
    try:
        build()
    finally:
        theirs.disable_propagation()
        theirs.set_verbosity_warning()
    assert terminal().count(START) == 1


def test_many_records_bring_one_handler(terminal: Callable[[], str]) -> None:
    loggers = [get_logger(f"hf_lowmem.test.{n}") for n in range(3)]
    for logger in loggers * 2:
        logger.warning("said")
    assert terminal() == "[hf_lowmem] WARNING: said\n" * 6


def test_records_stand_on_lines_of_their_own_beside_a_progress_bar(terminal: Callable[[], str]) -> None:
    with tqdm(total=2, desc="training", miniters=1, mininterval=0) as bar:
        bar.update()
        get_logger("hf_lowmem.test").warning("something to\nsay")
        build()
    # What a terminal shows: a carriage return goes back to the start of the line, and what follows overwrites it.
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in terminal().split("\n")]
    assert "[hf_lowmem] WARNING: something to" in shown
    assert "say" in shown
    assert [line for line in shown if line.startswith("[hf_lowmem] slim_adamw: ")]
    assert shown[-2].startswith("training:  50%")


def test_caplog_sees_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    build()
    (start,) = (record for record in caplog.records if START in record.getMessage())
    assert (start.levelno, start.name) == (logging.INFO, "hf_lowmem")


def test_importing_leaves_logging_as_it_was() -> None:
    code = (
        "import logging, hf_lowmem.algorithms, hf_lowmem.log\n"
        "found = logging.getLogger('hf_lowmem')\n"
        "assert not found.handlers and not logging.root.handlers and found.level == 0 and found.propagate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
