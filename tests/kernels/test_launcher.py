"""Triton's own launcher, its C code included, on a driver that notes what it is given: the same bytes either way.

The driver is a library of the test's that stands for libcuda.so.1. Kernels are really compiled, for Hopper; each pass
is run as ``JITFunction`` runs it and then prepared, and every parameter of every launch is compared, maps included.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from reslora_kernels.backends import kinds, triton
from reslora_kernels.tuning import gpus

from .test_prepared import CALLS, _passes

ROOT = Path(__file__).parents[2]
# Every entry that Triton 3.7 looks for; what is launched is copied to ``noted`` by the sizes of its parameters.
DRIVER = """
#include <string.h>
#define NOTHING(name) int name() { return 0; }
NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col)
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = 232448; return 0; }
int cuDriverGetVersion(int* version) { *version = 12090; return 0; }
int cuFuncGetAttribute(int* value, int which, void* function) { *value = which ? 0 : 1024; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error"; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)1; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)1; return 0; }
int cuPointerGetAttribute(unsigned long long* to, int which, unsigned long long at) { *to = at; return 0; }
int cuTensorMapEncodeTiled(unsigned char* map, int type, unsigned rank, void* base, const long* sizes,
                           const long* strides, const unsigned* box, const unsigned* steps, int interleave, int swizzle,
                           int promotion, int fill) {
    memset(map, 0, 128);
    memcpy(map, &base, 8), memcpy(map + 8, &type, 4), memcpy(map + 12, &swizzle, 4), memcpy(map + 16, sizes, 8 * rank);
    memcpy(map + 48, strides, 8 * (rank - 1)), memcpy(map + 80, box, 4 * rank), memcpy(map + 112, &fill, 4);
    return 0;
}
unsigned char sizes[256], noted[1 << 16];
int parameters;
long length;
int cuLaunchKernelEx(const void* configuration, void* function, void** given, void** extra) {
    memcpy(noted, configuration, 28);
    length = 28;
    for (int i = 0; i < parameters; length += sizes[i++]) memcpy(noted + length, given[i], sizes[i]);
    return 0;
}
"""
SIZES = {1: 8, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 2, 12: 4, 13: 8, 14: 128}  # of its extractors


@pytest.mark.slow
def test_the_driver_is_given_the_same_bytes(tmp_path: Path) -> None:
    installed = pytest.importorskip("triton").__version__
    if not installed.startswith("3.7") or shutil.which("gcc") is None:
        pytest.skip(f"reads the signatures of Triton 3.7's launcher, with gcc; this is {installed}")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(tmp_path / "driver.c"), "-o", str(library)],
        check=True,
    )
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.kernels.test_launcher", str(library)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["prepared"] and all(found["prepared"])
    assert len(found["passes"]) >= 10
    for name, (first, again) in found["passes"].items():
        assert first and first == again, name


def _compare(library: str) -> dict[str, Any]:
    noting = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    class Driver:
        utils, launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)

    Driver.__name__ = "StubDriver"
    launches: list[list[Any]] = []
    Driver.utils.launch = _noted(Driver.utils.launch, noting, launches)
    driver.set_active(Driver())
    passes = {}
    with mock.patch.dict(gpus.GENERATIONS, interpreter=gpus.GENERATIONS["sm_90"]):
        for call in CALLS[:7]:
            for name, once in _passes(triton, call).items():
                passes[f"{call.why}, {name}"] = [_launches_of(once, launches) for _ in range(2)]
    return {"passes": passes, "prepared": [known is not None for known in triton._kinds._known.values()]}


def _launches_of(once: Callable[[], Any], launches: list[list[Any]]) -> list[list[Any]]:
    launches.clear()
    once()
    return _without_addresses(launches)


def _noted(launch: Callable[..., None], noting: Any, launches: list[list[Any]]) -> Callable[..., None]:
    """``launch``, and every parameter that reaches the driver as bytes."""
    sizes = (ctypes.c_ubyte * 256).in_dll(noting, "sizes")
    count, length = (ctypes.c_int.in_dll(noting, "parameters"), ctypes.c_long.in_dll(noting, "length"))
    memory = (ctypes.c_ubyte * (1 << 16)).in_dll(noting, "noted")

    def launching(*given: Any) -> None:
        widths = [SIZES[extractor] for extractor in given[14]] + [8, 8]  # two scratch pointers come last
        sizes[: len(widths)], count.value = widths, len(widths)
        launch(*[None if type(value).__name__ == "HookChain" else value for value in given])
        at, parameters = 28, [bytes(memory[:28])]
        for width in widths:
            parameters.append(bytes(memory[at : at + width]))
            at += width
        assert at == length.value
        launches.append(parameters)

    return launching


def _without_addresses(launches: list[list[bytes]]) -> list[list[str]]:
    """An address is the number of different ones before it; a tensor map begins with one."""
    order: dict[int, int] = {}

    def plain(value: bytes) -> str:
        first = int.from_bytes(value[:8], "little")
        if len(value) not in (8, 128) or first < 1 << 24:
            return value.hex()
        return f"address {order.setdefault(first, len(order))} {value[8:].hex()}"

    return [[plain(value) for value in parameters] for parameters in launches]


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds.forget()
    json.dump(_compare(sys.argv[1]), sys.stdout)
