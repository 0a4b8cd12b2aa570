"""The registration of our optim names, and the only file that changes internals of transformers and accelerate.

It changes six places, each of which `tests/contract/test_transformers_internals.py` pins:

- `OptimizerNames` gets a member per name. A member pickles as a call of `optim_member`, so that a `training_args.bin`
  can be loaded in a process that has not registered.
- The table of optimizer handlers gets an entry per name.
- In `transformers.trainer`, `_parse_optim_args` accepts JSON, `get_last_checkpoint` skips incomplete checkpoints, and
  `DEFAULT_CALLBACKS` gets the callbacks of `callbacks.py`, which act on our optimizers only.
- `Trainer.train` first checks a checkpoint that is given by its path, and calls what `before_train` was given.
- `Accelerator.clip_grad_norm_`, which the Trainer clips with, lets our optimizers clip under `fused_clip=true`.
- `Accelerator.backward`, which the Trainer computes gradients with, takes two passes under `clip=recompute`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from typing import Any

import transformers
from accelerate import Accelerator

from hf_lowmem.log import get_logger
from hf_lowmem.optimizer import LowMemOptimizer
from hf_lowmem.trainer.build import optimizer_cls_and_kwargs, refuse_sharding, refuse_to_save
from hf_lowmem.trainer.callbacks import CALLBACKS, ReleaseGradients, unwrapped
from hf_lowmem.trainer.checkpoint_layouts import DEEPSPEED, SINGLE, refuse_other_layout, refuse_ours
from hf_lowmem.trainer.checkpoints import last_whole_checkpoint, refuse_incomplete
from hf_lowmem.trainer.clipping import backward, clip_grad_norm_
from hf_lowmem.trainer.names import legal_names, optim_name
from hf_lowmem.trainer.optim_args import read_optim_args

logger = get_logger(__name__)

TESTED_VERSIONS = "5.2.0 to 5.24.0"
_BEFORE_TRAIN: list[Callable[[Any, bool], None]] = []


def _internal(module: str, name: str) -> Any:
    """Return one of transformers' internals, or raise ImportError with its name."""
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

    Call it before an argument parser is built, because that fixes the choices of `--optim`. A second call has no
    effect.

    Raises:
        ImportError: the installed transformers lacks an internal that the registration needs.

    >>> from transformers import TrainingArguments
    >>> hf_lowmem.register()
    >>> args = TrainingArguments(optim="slim_adamw_8bit")
    """
    for name in legal_names():
        if name not in _member_by_value and name.upper() not in _member_by_name:
            _handlers[_add_member(name)] = _handler
        elif name not in _member_by_value or _handlers.get(_member_by_value[name]) is not _handler:
            logger.warning("transformers %s has its own optim %r, which is kept.", transformers.__version__, name)
    _trainer._parse_optim_args = _parse_optim_args
    _trainer.get_last_checkpoint = last_whole_checkpoint
    _trainer.Trainer.train = _train
    Accelerator.clip_grad_norm_, Accelerator.backward = clip_grad_norm_, backward
    _default_callbacks.extend(callback for callback in CALLBACKS if callback not in _default_callbacks)


@contextmanager
def before_train(prepare: Callable[[Any, bool], None]) -> Iterator[None]:
    """Call `prepare` meanwhile with each Trainer before it trains, and whether it resumes; after registration."""
    _BEFORE_TRAIN.append(prepare)
    try:
        yield
    finally:
        _BEFORE_TRAIN.remove(prepare)


def optim_member(name: str) -> Any:
    """Return the `OptimizerNames` member of one of our names, after registration. Unpickling a member calls this."""
    register()
    return _OptimizerNames(name)


def _add_member(name: str) -> Any:
    """Add a member to the `OptimizerNames` enum, with the attributes that the class statement would give it."""
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
    """Return the optimizer class and its arguments to the Trainer, with options from the raw text of `optim_args`."""
    refuse_sharding(context.args)
    if context.model is not None:
        refuse_to_save(context.model, context.args)
    return optimizer_cls_and_kwargs(
        context.model,
        _OptimizerNames(context.args.optim).value,
        **context.optimizer_kwargs,
        **context.adam_kwargs,
        optim_args=context.args.optim_args,
        target_modules=context.args.optim_target_modules,
    )


def _parse_optim_args(optim_args: str | Mapping[str, Any] | None) -> dict[str, str]:
    """Parse as transformers does, or by our parser what transformers cannot: JSON, mappings and values with '='."""
    try:
        return dict(_transformers_parse(optim_args))
    except (ValueError, AttributeError):
        return {key: str(value) for key, value in read_optim_args(optim_args).items()}


def _layout_of_run(trainer: Any) -> str:
    """Return the layout in which a Trainer writes and reads checkpoints."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return SINGLE if plugin is None else str(plugin.state_dict_type.name).lower()


@functools.wraps(_transformers_train)
def _train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Train as `Trainer.train` does, but first refuse a checkpoint that cannot be resumed from, in one sentence."""
    for callback in self.callback_handler.callbacks:
        if isinstance(callback, ReleaseGradients):
            callback.trainer = self
    for prepare in _BEFORE_TRAIN:
        prepare(self, bool(resume_from_checkpoint))
    folder = resume_from_checkpoint
    if isinstance(folder, (str, os.PathLike)):
        refuse_incomplete(folder)
    optim = str(getattr(self.args.optim, "value", self.args.optim))
    by_name = self.optimizer is None and getattr(self, "optimizer_cls_and_kwargs", None) is None
    if folder and by_name:
        folder = last_whole_checkpoint(self.args.output_dir) if folder is True else folder
        if folder is not None and optim_name(optim):
            model = getattr(getattr(self.model, "config", None), "_name_or_path", None)
            refuse_other_layout(folder, _layout_of_run(self), model, self.args.optim_args)
        elif folder is not None:
            refuse_ours(folder, optim)
    try:
        return _transformers_train(self, resume_from_checkpoint, *args, **kwargs)
    finally:  # an interrupted run does not step in the backward passes of the next one
        if isinstance(optimizer := unwrapped(self.optimizer), LowMemOptimizer):
            optimizer.keep_gradients()
