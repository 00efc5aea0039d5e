"""The choice of form and tile: always one that fits, explained in words; what a call costs, counted without a GPU."""

from __future__ import annotations

import ctypes
import json
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.bytes_moved import STANDARD, Call, cuda_traffic, floors, record, split, traffic
from reslora_kernels.backends import hopper, kinds, select, triton
from reslora_kernels.side_channel import SideChannel
from reslora_kernels.tuning import forms, gpus, launch, tiles
from reslora_kernels.tuning.forms import assume, choose
from reslora_kernels.tuning.gpus import GENERATIONS
from reslora_kernels.tuning.tiles import fits, matmul_tiles

from .test_prepared import CALLS, _passes

BF16 = torch.bfloat16
FORMS = ("one_pass", "two_pass", "library")


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [(BF16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")])
@pytest.mark.parametrize("m", [1, 64, 65, 8192])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_candidates_fit(generation: str, one_pass: bool, dtype: torch.dtype, precision: str, m: int, rank: int) -> None:
    gpu = GENERATIONS[generation]
    found = matmul_tiles(gpu, m, rank, dtype, precision, one_pass)
    assert found
    assert all(fits(tile, gpu, dtype.itemsize, one_pass) for tile in found)
    assert not one_pass or all(tile.block_r >= rank for tile in found)


def test_the_cost_model_explains_itself() -> None:
    """Few tokens: one launch. Many on a wide layer: a pass over x is cheap, and a Triton matmul is below cuBLAS."""
    hopper = GENERATIONS["sm_90"]
    few = choose(hopper, 16, 4096, 4096, 16, BF16, "ieee", FORMS)
    many = choose(hopper, 8192, 4096, 4096, 16, BF16, "ieee", FORMS)
    assert (few.form, many.form) == ("one_pass", "library")
    assert few.reason.startswith("one_pass by the cost model of sm_90:")
    assert "against" in few.reason and "two_pass" in few.reason
    assert choose(hopper, 16, 4096, 4096, 80, BF16, "ieee", ("two_pass", "library")).form in ("two_pass", "library")


@pytest.mark.parametrize(
    ("device", "n", "rank", "form"),
    [
        ("NVIDIA H100 80GB HBM3", 4096, 16, "one_pass"),  # 6.3 % more products against 7 % for x once more
        ("NVIDIA H100 80GB HBM3", 14336, 16, "two_pass"),
        ("NVIDIA H100 80GB HBM3", 4096, 64, "two_pass"),
        ("NVIDIA H200", 4096, 16, "two_pass"),
        ("NVIDIA H200", 1024, 16, "one_pass"),
    ],
)
def test_one_pass_at_any_width_where_its_products_cost_less_than_x(device: str, n: int, rank: int, form: str) -> None:
    gpu = gpus.with_rates(GENERATIONS["sm_90"], device)
    assert choose(gpu, 8192, n, 4096, rank, BF16, "ieee", FORMS[:2]).form == form


@pytest.mark.parametrize("form", FORMS)
def test_a_form_can_be_assumed(form: str) -> None:
    gpu = GENERATIONS["sm_80"]
    with forms.assume(gpu, (form,)):
        assert choose(gpu, 4096, 4096, 4096, 16, BF16, "ieee", FORMS).form == form
        assert choose(gpu, 4096, 4096, 4096, 16, BF16, "ieee", ("two_pass",)).form == "two_pass"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measured shape, contrary to the cost model."""
    shape = {"dtype": "torch.bfloat16", "m": 8192, "n": 4096, "k": 4096, "rank": 16}
    tile = {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4}
    matmul = shape | {"one_pass": True, "form": "one_pass", "tile": tile, "seconds": 4e-4}
    call = shape | {"microseconds": {"torch": 700.0, "triton": 900.0}}
    content = {"interpreter": {"matmuls": [matmul], "calls": [call]}}
    monkeypatch.setattr(gpus, "table", lambda: content)
    forms._choose.cache_clear()
    yield
    forms._choose.cache_clear()


def test_measured_rows_come_first(table: None) -> None:
    gpu = GENERATIONS["interpreter"]
    near = choose(gpu, 6000, 4096, 4096, 16, BF16, "ieee", FORMS)
    assert (near.form, near.tile.num_stages, near.reason) == (
        "one_pass",
        4,
        "one_pass, measured fastest near this shape",
    )
    far = choose(gpu, 512, 4096, 4096, 16, BF16, "ieee", FORMS)
    assert "cost model" in far.reason
    assert "cost model" in choose(gpu, 8192, 4096, 4096, 16, torch.float16, "ieee", FORMS).reason


def test_rates_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = GENERATIONS["sm_90"]
    monkeypatch.setattr(gpus, "table", lambda: {"sm_90": {"rates": {"NVIDIA H100 NVL": [7e14, 3.5e12]}}})
    known = {"NVIDIA H100 NVL": (7e14, 3.5e12), "NVIDIA H100 80GB HBM3": (798e12, 3.0e12)}
    known |= {"NVIDIA H200": (790e12, 4.3e12), "NVIDIA GH200 480GB": (hopper.flops, hopper.bandwidth)}
    for name, rates in known.items():
        found = gpus.with_rates(hopper, name)
        assert (found.flops, found.bandwidth) == rates


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="a setting of PyTorch 2.9")
@pytest.mark.parametrize(
    ("places", "value", "expected"),
    [
        (("cuda.matmul",), "tf32", "tf32"),
        (("",), "tf32", "tf32"),
        (("mkldnn.matmul",), "bf16", "ieee"),
        (("", "cuda.matmul"), "ieee", "ieee"),
    ],
)
def test_float32_is_multiplied_as_torch_is_set(places: tuple[str, ...], value: str, expected: str) -> None:
    """Wherever it is set, also where ``torch.get_float32_matmul_precision`` raises; other dtypes have no such thing."""
    settings = {"cuda.matmul": "none"} | dict.fromkeys(places, value)  # whatever was set there by a test before
    holders = [operator.attrgetter(f"backends.{place}".rstrip("."))(torch) for place in settings]
    before = [holder.fp32_precision for holder in holders]
    try:
        for holder, setting in zip(holders, settings.values(), strict=True):
            holder.fp32_precision = setting
        assert (launch.precision(torch.float32), launch.precision(BF16)) == (expected, "ieee")
    finally:
        for holder, setting in zip(holders, before, strict=True):
            holder.fp32_precision = setting
    assert (torch.get_float32_matmul_precision(), launch.precision(torch.float32)) == ("highest", "ieee")


def test_a_thread_is_given_the_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that autograd started has none, and without it the driver encodes no tensor map."""
    devices = [torch.device("cuda", index) for index in (0, 1)]
    recorded: list[torch.device] = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: recorded.append(device))
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(device))

    def call(device: torch.device) -> int:
        tensor: Any = SimpleNamespace(is_cuda=True, device=device)
        with kinds.on_device(tensor):
            return len(recorded)

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        bound = [pool.submit(call, device).result() for pool in (first, second) for device in (*devices, devices[0])]
    assert bound == [1, 2, 2, 3, 4, 4]


def test_auto_never_takes_a_backend_that_was_measured_slower(table: None) -> None:
    x, weight = torch.empty(8192, 4096, dtype=BF16), torch.empty(4096, 4096, dtype=BF16)
    name, reason = select._fastest(["triton", "torch"], x, weight, 16)
    assert (name, reason) == ("torch", "measured fastest near this shape (700 us)")
    assert select._fastest(["triton", "torch"], x[:100], weight, 16) == ("triton", "first choice")
    assert select._fastest(["triton", "torch"], x, weight, 16, dropout=True) == ("triton", "first choice")
    unmeasured = ("torch", "first choice: cuda was not measured near this shape")
    assert select._fastest(["cuda", "torch"], x, weight, 16) == unmeasured
    gpus.table()["interpreter"]["calls"][0]["microseconds"]["cuda"] = 800.0
    assert select._fastest(["cuda", "torch"], x, weight, 16) == (name, reason)  # without Triton, too


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(8, 16), torch.ones(4, 16)
    assert select.explain("auto", x, weight, 2).name == "torch"
    monkeypatch.setenv("RESLORA_BACKEND", "torch")
    assert select.choose("triton", x, weight, 2).__name__.endswith("torch")
    assert select.explain("triton", x, weight, 2).reason.startswith("RESLORA_BACKEND=torch; ")
    monkeypatch.setenv("RESLORA_BACKEND", "cublas")
    with pytest.raises(ValueError, match=r"RESLORA_BACKEND must be one of 'auto', 'triton', .*, got 'cublas'"):
        select.choose("auto", x, weight, 2)


def test_a_machine_without_triton_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    select._warn_of_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="without its Triton kernels: Triton is not installed"):
        select._warn_of_missing("triton", "Triton is not installed")
    select._warn_of_missing("triton", "Triton is not installed")


def test_why_triton_cannot_run_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the fixture of this folder lets the interpreter serve
    reason = triton.unavailable_reason()
    if not torch.cuda.is_available():
        assert reason == "TRITON_INTERPRET is set, and Triton's CPU interpreter is for tests of the kernels only"
        monkeypatch.setattr(triton, "_interpreted", lambda: False)
        triton.unavailable_reason.cache_clear()
        assert triton.unavailable_reason() == "no GPU that torch can use"
    monkeypatch.setattr(triton, "version", lambda name: "3.1.0")
    triton.unavailable_reason.cache_clear()
    assert "Triton 3.1.0 is too old, 3.4 is needed" in str(triton.unavailable_reason())
    triton.unavailable_reason.cache_clear()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("rank", [1, 64, 256, 1000])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_skinny_passes_fit(generation: str, rank: int, dtype: torch.dtype) -> None:
    gpu = GENERATIONS[generation]
    for tile in (
        tiles.project_tile(gpu, 8192, 4096, rank, dtype),
        tiles.grads_tile(gpu, 8192, 4096, rank, dtype),
        tiles.outer_tile(gpu, 8192, 8192, rank, dtype),
    ):
        assert tile.shared_bytes(dtype.itemsize) <= gpu.shared_bytes, tile
        assert tile.num_stages >= 2


HOPPER = gpus.GENERATIONS["sm_90"]


@pytest.mark.parametrize("form", ["one_pass", "two_pass"])
@pytest.mark.parametrize(
    "call", [STANDARD[0], Call(16, 4096, 4096), Call(512, 768, 768), Call(8192, 4096, 1024, 64)], ids=str
)
def test_launches(call: Call, form: str) -> None:
    forward, backward = split(record(call, HOPPER, (form, "two_pass")))
    parts = sum(entry.name == "finish_projection" for entry in forward)  # few rows: K in parts, added up at the end
    assert len(forward) == (1 if form == "one_pass" else 2 + parts)
    assert not (parts and call.m == 8192)
    passes = ["pass_over_dy", "pass_over_x"] if call.rank <= 32 else ["project", "outer_products"]
    assert [entry.name for entry in backward] == [*passes, "augmented_matmul"]


@pytest.mark.parametrize(("rank", "p"), [(8, 0.0), (16, 0.1), (64, 0.0)])
@pytest.mark.parametrize("call", STANDARD, ids=str)
def test_bytes_moved(call: Call, rank: int, p: float) -> None:
    """Against what any implementation must move, and the one operand that each direction reads again."""
    forward, backward = traffic(replace(call, rank=rank, p=p), HOPPER)
    assert forward.overhead <= 0.10
    assert backward.overhead <= 0.15


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("call", STANDARD, ids=str)
def test_one_pass_moves_what_must_be_moved(call: Call, rank: int) -> None:
    """Forward is one launch: one read of x and W, one write of y. Backward reads dy once more, for dB.

    Backward is one launch where the blocks that dx leaves free have the time for dA and dB.
    """
    call = replace(call, rank=rank)
    for setting in hopper.ONE_PASS_VARIANTS:
        forward, backward = cuda_traffic(call, setting)
        assert (forward.launches, backward.launches) == (1, 1 if call.n > 4096 else 3)
        assert 0 <= forward.overhead <= 0.03 and 0 <= backward.overhead <= 0.04
    launches, _ = split(record(call, HOPPER, ("one_pass", "two_pass")))
    assert len(launches) == 1 and launches[0].bytes_moved() <= 1.03 * floors(call)[0]


def test_nothing_the_size_of_x_is_allocated_between_the_passes() -> None:
    """Workspaces stay below a tenth of x, the mask's packed bits included."""
    call = Call(8192, 4096, 4096, 16, p=0.1, hand=8)
    forward, _ = split(record(call, HOPPER, ("two_pass",)))
    project = forward[0]
    sizes = {name: t.numel() for name, t in project.arguments.items() if isinstance(t, torch.Tensor)}
    assert max(size for name, size in sizes.items() if name != "x") <= call.m * call.rank
    bits = record(call, HOPPER, ("two_pass",))[-1].arguments["bits"]
    assert bits.numel() * bits.element_size() == call.m * call.k // 8


def test_recording_runs_nothing_when_told_so(device: torch.device) -> None:
    x, weight = torch.ones(16, 32, device=device), torch.ones(8, 32, device=device)
    a, b = torch.ones(4, 32, device=device), torch.ones(8, 4, device=device)
    arguments = (x, weight, None, (a,), (b,), None, SideChannel(), None)
    forms = ("two_pass",)
    with assume(gpus.gpu_of(device), forms), launch.recording() as executed:
        y, _, u = triton.forward(*arguments)
    assert y.unique().tolist() == [32 + 4 * 32]
    assert u.unique().tolist() == [32]
    with assume(gpus.gpu_of(device), forms), launch.recording(execute=False) as planned:
        triton.forward(*arguments)
    assert [entry.name for entry in planned] == [entry.name for entry in executed] == ["project", "augmented_matmul"]
    assert "BLOCK_M=" in str(planned[1])


# Triton's own launcher, its C code included, on a driver that notes what it is given: the same bytes either way. The
# driver is a library of the test's that stands for libcuda.so.1. Kernels are really compiled, for Hopper; each pass is
# run as ``JITFunction`` runs it and then prepared, and every parameter of every launch is compared, maps included.
ROOT = Path(__file__).parents[2]
# Every entry that Triton 3.7 to 3.9 looks for; what is launched is copied to ``noted`` by the sizes of its parameters.
DRIVER = """
#include <string.h>
#define NOTHING(name) int name() { return 0; }
NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuTensorMapEncodeIm2col) NOTHING(cuCtxGetDevice) NOTHING(cuModuleUnload)
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int which, int device) { *value = 232448; return 0; }
int cuStreamIsCapturing(void* stream, int* whether) { *whether = 0; return 0; }
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
    if not installed.startswith(("3.7", "3.8", "3.9")) or shutil.which("gcc") is None:
        pytest.skip(f"reads the signatures of the launcher of Triton 3.7 to 3.9, with gcc; this is {installed}")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(tmp_path / "driver.c"), "-o", str(library)],
        check=True,
    )
    (tmp_path / "libcuda.so").symlink_to(library)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.kernels.test_tiles", str(library)]
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
