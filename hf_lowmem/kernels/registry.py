"""The backends that can take a step, in the order in which they are asked.

The first backend that covers a parameter steps it. `tiles` takes what no kernel covers, and `rule`, which makes
temporaries as large as the weight, takes the rest; both say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lowmem.kernels.bucket import Bucket, Hyper, ParamStep
from hf_lowmem.kernels.means import average, square_sums
from hf_lowmem.log import get_logger
from hf_lowmem.state import FULL_SPACE

logger = get_logger(__name__)


class Backend:
    """One way to take steps: each computes what the update rule defines, and changes weights and state in place.

    A step is `reduce`, then `apply`: first the sums of squares that the means of second moments need, which clipping
    and collectives may change, and then the update, by means that have been averaged. `step` does both, in one pass
    over the gradient where a backend can.
    """

    name: str
    devices: tuple[str, ...] = ()  # the types of device that it is written for; empty for all
    is_slow = False  # whether it takes steps as the rule is written
    adds_up_shards = False  # whether it adds sums up over the shards of a weight within a step
    takes_numbers_on_device = False  # whether a captured graph's steps lose nothing by it

    def available(self) -> bool:
        """Return whether what it needs is installed; what is missing is logged once."""
        return True

    def covers(self, rule: str, step: ParamStep) -> bool:
        """Return whether it can step a parameter, whatever the gradient's address and the numbers of the step."""
        raise NotImplementedError

    def reduce(self, bucket: Bucket) -> list[dict[str, Tensor]]:
        """Return, for each parameter, the sums of its squared gradient by the name of the state that averages them.

        A parameter without means has none. Sums are float64, of the state's shape, and clipping has scaled them.
        """
        return [square_sums(step) for step in bucket]

    def apply(self, bucket: Bucket, hyper: Hyper) -> None:
        """Step all parameters of the bucket by means that hold this step's gradients already."""
        raise NotImplementedError

    def step(self, bucket: Bucket, hyper: Hyper) -> None:
        """Step all parameters of the bucket."""
        for step, sums in zip(bucket, self.reduce(bucket), strict=True):
            average(step, sums, hyper.beta2)
        self.apply(bucket, hyper)

    def square_norms(self, bucket: Bucket, kept: dict[Any, Any]) -> list[Tensor]:
        """Return 0-D sums that add up to the squared norm of the bucket's gradients, finite or not.

        Args:
            kept: takes what the coming step can use of this pass; it is `Clip.partial_sums` there.
        """
        return norms_of(bucket.grads)


def norms_of(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared norm of the gradients of each dtype, 0-D: float32, or float64 for float64."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad)
    squares = []
    for dtype, same in by_dtype.items():
        norms = torch._foreach_norm(same, 2, torch.promote_types(dtype, torch.float32))
        squares.append(torch.stack(norms).square().sum())
    return squares


SMALL = 1 << 12  # entries of a weight; a smaller one gets no warning that its steps are slow
BACKENDS: dict[str, Backend] = {}
_forced: ContextVar[tuple[str, ...]] = ContextVar("forced", default=())


def register(backend: Backend, before: str | None = None) -> None:
    """Add a backend before the one called `before`, or after all that are there.

    Raises:
        ValueError: another backend has its name, or there is none called `before`.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"A backend is called {backend.name!r} already: give this one another name.")
    names = [*BACKENDS, None]
    if before not in names:
        raise ValueError(f"The backends are {', '.join(BACKENDS)}, not {before}.")
    later = {name: BACKENDS.pop(name) for name in list(BACKENDS)[names.index(before) :]}
    BACKENDS[backend.name] = backend
    BACKENDS.update(later)


def find_backend(rule: str, step: ParamStep, after: str | None = None) -> Backend:
    """Return the first backend that covers a parameter, of those after the one called `after`.

    Raises:
        LookupError: none does, of those that `forced` names.
    """
    device, names = step.param.device.type, list(BACKENDS if after else choice() or BACKENDS)
    for name in names[names.index(after) + 1 if after in names else 0 :]:
        backend = BACKENDS[name]
        if (choice() or not backend.devices or device in backend.devices) and backend.covers(rule, step):
            if not backend.devices and step.param.numel() >= SMALL:
                _warn(backend, rule, step)
            return backend
    raise LookupError(f"None of the backends {', '.join(names)} covers {described(rule, step)}.")


def _warn(backend: Backend, rule: str, step: ParamStep) -> None:
    device = step.param.device.type
    if device not in ("cpu", "cuda", "meta"):
        warn_of_plain_torch(device)
    elif (
        backend.is_slow
        and not choice()
        and all(each.available() for each in BACKENDS.values() if device in each.devices)
    ):
        warn_of_slow_steps(backend.name, described(rule, step))


@contextmanager
def forced(*names: str) -> Iterator[None]:
    """Take every step by the first of some backends that covers it, whatever the device, while the context lasts.

    It is meant for tests and comparisons:

        with hf_lowmem.kernels.forced("rule"):
            optimizer.step()

    Raises:
        ValueError: there is no such backend.
        LookupError: from a step, where no backend of them covers a parameter.
    """
    if unknown := set(names) - set(BACKENDS):
        raise ValueError(f"The backends are {', '.join(BACKENDS)}, not {', '.join(sorted(unknown))}.")
    token = _forced.set(names)
    try:
        yield
    finally:
        _forced.reset(token)


def choice() -> tuple[str, ...]:
    """Return the backends that are forced, if any: buckets that were made under another choice are outdated."""
    return _forced.get()


def described(rule: str, step: ParamStep) -> str:
    """Return what is stepped in words, without its sizes: rule, moments, storage, space, dtypes and device."""
    plan = step.plan
    moments = ", ".join(f"{name} as {type(moment).__name__}" for name, moment in plan.moments.items())
    space = "" if plan.projection is FULL_SPACE else f" in {type(plan.projection).__name__}"
    dense = "" if step.param.is_contiguous() and step.grad.is_contiguous() else " that are not contiguous"
    grads = "" if step.grad.dtype == step.param.dtype else f" and gradients of {step.grad.dtype}"
    return (
        f"{step.param.dtype} weights{dense}{grads} under the rule {rule!r} with {moments}{space}, "
        f"{type(plan.codec).__name__} storage, on {step.param.device.type}"
    )


@cache
def warn_of_plain_torch(device: str) -> None:
    logger.warning(
        "Optimizer steps on %s are taken in plain torch and take several times longer than they could: there are "
        "kernels for CUDA and the CPU only.",
        device,
    )


@cache
def warn_of_slow_steps(backend: str, described: str) -> None:
    """Say once for each kind of parameter that its steps are taken as the rule is written."""
    how = "on slices of the weight" if backend == "tiles" else "on whole weights, with temporaries as large as they"
    logger.warning(
        "Optimizer steps of %s are taken as the rule is written, %s, which takes several times longer: no kernel "
        "covers them.",
        described,
        how,
    )


@cache
def warn_of_capturable(device: str) -> None:
    logger.warning(
        "capturable=true makes optimizer steps on %s several times slower: leave it out where no CUDA graph captures "
        "them.",
        device,
    )
