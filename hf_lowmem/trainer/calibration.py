"""A calibration: the user's own training script, measured for some steps with full second moments and then stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lowmem.algorithms import RECIPES
from hf_lowmem.log import announce
from hf_lowmem.trainer import registration
from hf_lowmem.trainer.names import OPTIM_NAMES
from hf_lowmem.trainer.optim_args import read_optim_args
from hf_lowmem.trainer.snr import SnrCallback

FULL = "lowmem_adamw"


class CalibrationDone(BaseException):
    """Ends a script whose calibration is complete; no `except Exception` of the script's stops it."""


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

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, optimizer, **kwargs)
        control.should_evaluate = control.should_save = False
        if state.global_step >= self.steps:
            raise CalibrationDone

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise CalibrationDone  # the script has fewer steps


def calibrate(path: Path, steps: int, every: int | None) -> None:
    """Make every Trainer of this process measure its second moments, with full ones if its optim is one of ours.

    A name that reduces them is replaced by `lowmem_adamw`, in as many bits and with the Trainer's hyperparameters.
    """

    def prepare(trainer: Any) -> None:
        optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        if optim in OPTIM_NAMES and OPTIM_NAMES[optim].algorithm != FULL:
            full = FULL + ("_8bit" if OPTIM_NAMES[optim].state_bits == 8 else "")
            announce("The calibration trains with %s in place of %s, whose second moments are reduced.", full, optim)
            trainer.args.optim = registration.optim_member(full)
            trainer.args.optim_args = _options_of_full(trainer.args.optim_args)
            trainer.args.optim_target_modules = None
        trainer.add_callback(Calibration(path, steps, every))

    registration.BEFORE_TRAIN.append(prepare)


def _options_of_full(optim_args: Any) -> str | None:
    """Return those of the options that `lowmem_adamw` has, too."""
    legal = RECIPES[FULL].arguments()
    kept = {key: value for key, value in read_optim_args(optim_args).items() if key in legal}
    return ",".join(f"{key}={value}" for key, value in kept.items()) or None
