"""Gradients of a DistributedDataParallel module are handed over as soon as they are averaged over its processes.

A hook of a parameter would see the gradient of its own process alone, so that stepping and freeing it there would
train each process by itself. Here the averages of a bucket are handed over while those of the next are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_lowmem.log import get_logger
from hf_lowmem.sharding import is_sharded

logger = get_logger(__name__)

_FOUND: WeakKeyDictionary[Any, AveragedGradients] = WeakKeyDictionary()


class AveragedGradients:
    """The gradients of a DistributedDataParallel module; `of` returns those of a module.

    DDP takes one communication hook, which stays as long as the module does. Without a `taker` the averages become
    the gradients of the parameters, as without the hook, bit for bit.

    Args:
        module: the DistributedDataParallel module, which has no communication hook yet.

    Raises:
        ValueError: it has one.
    """

    def __init__(self, module: Any) -> None:
        if module._comm_hooks:
            raise ValueError(
                f"The DistributedDataParallel module has the communication hook "
                f"{module._comm_hooks[0][0].__name__}, but released gradients need its place: register none."
            )
        self._group, self._params = module.process_group, [p for p in module.parameters() if p.requires_grad]
        self._share = 1.0 / torch.distributed.get_world_size(self._group)
        self._taker: Callable[[Tensor], None] | None = None
        self._travelling: tuple[Any, Any] | None = None  # a bucket and the future of its averages
        self._may_be_unused = bool(module.find_unused_parameters)
        self._used: set[Tensor] = set()  # parameters that have had a gradient on this process
        self._unused: dict[Tensor, Tensor] = {}  # averages of the others
        module.register_comm_hook(None, lambda _, bucket: self._average(bucket))
        module.reducer._set_optimizer_in_backward()  # DDP does not write gradients, which would stay after their step
        if self._may_be_unused:
            for param in self._params:
                param.register_post_accumulate_grad_hook(self._used.add)

    @classmethod
    def of(cls, module: Any) -> AveragedGradients:
        """Return the gradients of a module, of which there is one object."""
        if module not in _FOUND:
            _FOUND[module] = cls(module)
        return _FOUND[module]

    def go_to(self, taker: Callable[[Tensor], None] | None) -> None:
        """Call `taker` with each parameter whose average is in `grad` from now on; None lets averages stay there."""
        self._taker = taker

    def _average(self, bucket: Any) -> Any:
        """Start to average a bucket, and hand over the one before."""
        # DDP multiplies by the share, too, which is not what dividing by the number of processes gives.
        future = torch.distributed.all_reduce(
            bucket.buffer().mul_(self._share), group=self._group, async_op=True
        ).get_future()
        self._hand_over()
        self._travelling = (bucket, future)
        if bucket.is_last():
            self._hand_over()
            self._hand_over_unused()
        return future.then(lambda done: done.value()[0])

    @torch.no_grad()
    def _hand_over(self) -> None:
        if self._travelling is None:
            return
        (bucket, future), self._travelling = self._travelling, None
        future.wait()
        for param, average in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if self._may_be_unused and param not in self._used:
                self._unused[param] = average.clone()
            else:
                self._take(param, average.clone())  # the bucket is written again in the next backward pass

    def _take(self, param: Tensor, average: Tensor) -> None:
        param.grad = average
        if self._taker is not None:
            self._taker(param)

    @torch.no_grad()
    def _hand_over_unused(self) -> None:
        """Hand over averages of parameters that had no gradient on this process, but had one on another.

        A parameter without a gradient on any process keeps none.
        """
        if not self._may_be_unused:
            return
        used = torch.tensor([param in self._used for param in self._params], dtype=torch.uint8)
        used = used.to(self._params[0].device)
        torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX, group=self._group)
        anywhere = {param for param, found in zip(self._params, used.tolist(), strict=True) if found}
        waiting, self._unused = self._unused, {}
        self._used.clear()
        for param, average in waiting.items():
            if param in anywhere:
                self._take(param, average)


def warn_if_apart(params: Iterable[Tensor]) -> None:
    """Warn if the gradients of whole weights are stepped on several processes as each of them has found them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1 and not all(map(is_sharded, params)):
        logger.warning(
            "Released gradients are stepped on each of %d processes as it has found them, without averaging: under "
            "DistributedDataParallel call release_gradients(replicas=...) with its module.",
            torch.distributed.get_world_size(),
        )
