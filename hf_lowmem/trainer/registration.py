"""Adds our optim names to transformers. The only file that touches transformers' and accelerate's internals.

Five places are changed, and `tests/contract/test_transformers_internals.py` pins each:

- `OptimizerNames` gets one member per name. A member pickles as a call of `optim_member`, so a `training_args.bin`
  also loads in a process that has not registered.
- The handler table gets one entry per name.
- In `transformers.trainer`, `_parse_optim_args` lets JSON pass, `get_last_checkpoint` passes over checkpoints that
  were cut short, and `DEFAULT_CALLBACKS` gets the callbacks of `callbacks.py`, which act under our optimizers only.
- `Trainer.train` first looks at a checkpoint that is named by its path.
- `Accelerator.clip_grad_norm_`, by which a Trainer clips, is left to our optimizers under `fused_clip=true`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

import transformers
from accelerate import Accelerator

from hf_lowmem.log import get_logger
from hf_lowmem.trainer.build import optimizer_cls_and_kwargs, refuse_sharding
from hf_lowmem.trainer.callbacks import CALLBACKS
from hf_lowmem.trainer.checkpoints import last_whole_checkpoint, refuse_incomplete, refuse_ours
from hf_lowmem.trainer.clipping import clip_grad_norm_
from hf_lowmem.trainer.names import OPTIM_NAMES
from hf_lowmem.trainer.optim_args import read_optim_args

logger = get_logger(__name__)

TESTED_VERSIONS = "5.2.0 to 5.24.0"


def _internal(module: str, name: str) -> Any:
    """Look up one of transformers' internals, or fail naming it."""
    try:
        return attrgetter(name)(import_module(module))
    except (ModuleNotFoundError, AttributeError) as error:
        raise ImportError(
            f"hf_lowmem cannot register with transformers {transformers.__version__}, which has no {module}.{name}: "
            f"install a version that it was tested with ({TESTED_VERSIONS})."
        ) from error


_trainer: Any = import_module("transformers.trainer")
_OptimizerNames = _internal("transformers.training_args", "OptimizerNames")
_member_by_value = _internal("transformers.training_args", "OptimizerNames._value2member_map_")
_member_by_name = _internal("transformers.training_args", "OptimizerNames._member_map_")
_member_names = _internal("transformers.training_args", "OptimizerNames._member_names_")
_handlers = _internal("transformers.trainer_optimizer", "_OPTIMIZER_HANDLERS")
_transformers_parse = _internal("transformers.trainer", "_parse_optim_args")
_internal("transformers.trainer", "get_last_checkpoint")
_default_callbacks = _internal("transformers.trainer", "DEFAULT_CALLBACKS")
_transformers_train = _internal("transformers.trainer", "Trainer.train")


def register() -> None:
    """Make every name of `optim_names()` a legal `optim` of `TrainingArguments` and of every TRL config.

    Calling it again changes nothing. Call it before an argument parser is built: `--optim` choices are fixed then.

    Raises:
        ImportError: when the installed transformers lacks an internal that registration needs.
    """
    for name in OPTIM_NAMES:
        if name not in _member_by_value:
            _handlers[_add_member(name)] = _handler
        elif _handlers.get(_member_by_value[name]) is not _handler:
            logger.warning("transformers %s has its own optim %r, which is kept.", transformers.__version__, name)
    _trainer._parse_optim_args = _parse_optim_args
    _trainer.get_last_checkpoint = last_whole_checkpoint
    _trainer.Trainer.train = _train
    Accelerator.clip_grad_norm_ = clip_grad_norm_
    _default_callbacks.extend(callback for callback in CALLBACKS if callback not in _default_callbacks)


def optim_member(name: str) -> Any:
    """The `OptimizerNames` member of one of our names, registered if need be. Pickled members call this."""
    register()
    return _OptimizerNames(name)


def _add_member(name: str) -> Any:
    """Add one member to the `OptimizerNames` enum, with the attributes that the class statement would give it."""
    member = str.__new__(_OptimizerNames, name)
    member._name_ = name.upper()
    member._value_ = name
    member.__objclass__ = _OptimizerNames
    member._sort_order_ = len(_member_names)
    member.__reduce_ex__ = lambda protocol: (optim_member, (name,))
    setattr(_OptimizerNames, member._name_, member)
    _member_names.append(member._name_)
    _member_by_name[member._name_] = member
    _member_by_value[name] = member
    if hasattr(_OptimizerNames, "_hashable_values_"):  # Python 3.12 and newer
        _OptimizerNames._hashable_values_.append(name)
    return member


def _handler(context: Any) -> tuple[type, dict[str, Any]]:
    """What the Trainer calls for our names; the options are read from the raw text, not from its naive split."""
    refuse_sharding(context.args)
    return optimizer_cls_and_kwargs(
        context.model,
        _OptimizerNames(context.args.optim).value,
        **context.optimizer_kwargs,
        **context.adam_kwargs,
        optim_args=context.args.optim_args,
        target_modules=context.args.optim_target_modules,
    )


def _parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, str]:
    """transformers' parser, and ours for what it cannot take: JSON, a mapping, values that hold '='."""
    try:
        return dict(_transformers_parse(optim_args))
    except (ValueError, AttributeError):
        return {key: str(value) for key, value in read_optim_args(optim_args).items()}


@functools.wraps(_transformers_train)
def _train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.train`, before which a checkpoint that cannot be resumed from is refused in one sentence."""
    folder = resume_from_checkpoint
    if isinstance(folder, (str, os.PathLike)):
        refuse_incomplete(folder)
    optim = str(getattr(self.args.optim, "value", self.args.optim))
    by_name = self.optimizer is None and getattr(self, "optimizer_cls_and_kwargs", None) is None
    if folder and by_name and optim not in OPTIM_NAMES:
        folder = last_whole_checkpoint(self.args.output_dir) if folder is True else folder
        if folder is not None:
            refuse_ours(folder, optim)
    return _transformers_train(self, resume_from_checkpoint, *args, **kwargs)
