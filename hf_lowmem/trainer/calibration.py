"""A calibration: the user's own training script, measured for some steps with full second moments and then stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.log import announce
from hf_lowmem.trainer import registration
from hf_lowmem.trainer.names import LAYERWISE, optim_name
from hf_lowmem.trainer.optim_args import read_optim_args
from hf_lowmem.trainer.snr import SnrCallback

FULL_ADAMW = "lowmem_adamw"


class CalibrationDone(BaseException):
    """Ends a script whose calibration is complete or refused; no `except Exception` of the script's stops it.

    Args:
        refused: the sentence that says why nothing can be measured, "" where the calibration is complete.
    """

    def __init__(self, refused: str = "") -> None:
        super().__init__(refused)
        self.refused = refused


class Calibration(SnrCallback):
    """Measures a Trainer's first steps, without its evaluations and checkpoints, and then ends the script.

    Args:
        path: the CSV.
        steps: the number of steps.
        every: as for `SnrCallback`.
    """

    def __init__(self, path: Path, steps: int, every: int | None) -> None:
        super().__init__(path, every)
        self.steps = steps

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        with _refusals():
            super().on_train_begin(args, state, control, model, optimizer, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        with _refusals():
            super().on_step_end(args, state, control, optimizer, **kwargs)
        control.should_evaluate = control.should_save = False
        if state.global_step >= self.steps:
            raise CalibrationDone

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise CalibrationDone  # the script has fewer steps


@contextmanager
def _refusals() -> Iterator[None]:
    """End the script with the sentence of a ValueError, which the script might catch."""
    try:
        yield
    except ValueError as error:
        raise CalibrationDone(str(error)) from error


@contextmanager
def calibrate(path: Path, steps: int, every: int | None) -> Iterator[None]:
    """Make every Trainer measure its second moments meanwhile, with full ones if its optim is one of ours.

    A name that reduces them is replaced by `lowmem_adamw`, in as many bits and with the Trainer's hyperparameters.
    """

    def prepare(trainer: Any, resumes: bool) -> None:
        if resumes:
            raise CalibrationDone(
                "A calibration measures a run from its start, and the script resumes from a checkpoint: call "
                "Trainer.train without resume_from_checkpoint."
            )
        optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        ours = optim_name(optim)
        if ours and ours.algorithm != FULL_ADAMW:
            full = FULL_ADAMW + ("_8bit" if ours.state_bits == 8 else "") + (LAYERWISE if LAYERWISE in optim else "")
            announce("The calibration trains with %s in place of %s, whose second moments are reduced.", full, optim)
            trainer.args.optim = registration.optim_member(full)
            trainer.args.optim_args = _options_of_full(trainer.args.optim_args)
            trainer.args.optim_target_modules = None
        trainer.args.eval_on_start = False
        trainer.add_callback(Calibration(path, steps, every))

    with registration.before_train(prepare):
        yield


def _options_of_full(optim_args: Any) -> str | None:
    """Return those of the options that `lowmem_adamw` has too."""
    legal = RECIPES[FULL_ADAMW].arguments()
    kept = {key: value for key, value in read_optim_args(optim_args).items() if key in legal}
    return ",".join(f"{key}={value}" for key, value in kept.items()) or None
