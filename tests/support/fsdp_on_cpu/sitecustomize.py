"""In processes that a launcher has started, accelerate uses FSDP2 although they have no accelerators.

A test puts this folder on PYTHONPATH. Python imports this file as it starts.
"""

from __future__ import annotations

import os
from typing import Any

if "LOCAL_RANK" in os.environ:
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def backend_on_cpu(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = backend_on_cpu
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
