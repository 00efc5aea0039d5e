"""accelerate ignores its FSDP plugin where there is no GPU; this Accelerator does not."""

from __future__ import annotations

from typing import Any

import accelerate
from accelerate import DistributedType, PartialState


class FSDPOnCPU(accelerate.Accelerator):
    """Serves FSDP2 on the CPU too."""

    def __init__(self, *, fsdp_plugin: Any) -> None:
        PartialState(cpu=True).distributed_type = DistributedType.FSDP
        super().__init__(fsdp_plugin=fsdp_plugin)
        self.state.fsdp_plugin = fsdp_plugin
