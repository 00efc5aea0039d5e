"""What a result file says of its origin: the machine without its name, the versions, the settings."""

from __future__ import annotations

import platform
from typing import Any

import torch

import reslora_kernels


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=cpu.get("count"),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        reslora_kernels=reslora_kernels.__version__,
    )


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every round's time: the percentiles say enough
