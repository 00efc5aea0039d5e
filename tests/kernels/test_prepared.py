"""Passes that are prepared once for a kind of call: results and launches as the first time, and what they cost.

Numbers come from the interpreter and the emulator; counts from a driver that launches nothing, in a process of its
own, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels import ResLoRAConfig, ResLoRALinear, link
from reslora_kernels.backends import cuda, kinds, triton
from reslora_kernels.backends import torch as library
from reslora_kernels.dropout import Dropout
from reslora_kernels.side_channel import Needs, SideChannel
from reslora_kernels.testing import relative_error
from reslora_kernels.tuning.launch import Launch
from tests import cuda_on_cpu

from .calls import Call, draw, run, truth

ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
CALLS = [
    Call("two passes, handing on", 40, 72, 136, 34, 17, BF16, BF16, hand=(17, 34), residual=True, c=2.0),
    Call("one pass", 40, 72, 136, 24, 8, BF16, BF16, "one_pass", hand=(8, 24), residual=True),
    Call("dropout", 40, 72, 136, 16, 16, FP32, FP32, p=0.5, hand=(0, 16), residual=True),
    Call("dy read twice", 100, 100, 257, 34, 17, BF16, FP32, hand=(17, 34), residual=True, reads_of_dy=2),
    Call("K in parts", 3, 520, 40, 80, 80, BF16, FP32, p=0.5),
    Call("the matmul's K in parts", 3, 1032, 40, 16, 16, BF16, BF16, residual=True),
    Call("the library's matmul", 40, 72, 100, 24, 8, BF16, FP32, "library", hand=(8, 24), residual=True),
    Call("for Hopper, adapters to be converted", 130, 264, 136, 24, 16, BF16, FP32, hand=(8, 24), residual=True),
    Call("u is given", 40, 72, 136, 0, 12, residual=True),
    Call("sliced", 40, 72, 64, 24, 8, BF16, FP32, residual=True, layout="sliced"),
]
SHORTCUTS = {"none": 0, "input": 1, "middle": 2, "block": 1}
# Of a layer, with either backend and whatever the shortcut; backward reads stacks as forward has joined them.
LAUNCHES = {"forward": 1, "backward": 3, "joined in backward": 0}
HOST_CALLS = {"triton": (26, 33), "cuda": (25, 26)}  # Python functions that prepared passes of a backend call
COMPILE_KEYS = 21  # of both passes of a layer over 300 numbers of tokens up to 4096


def name_of(value: object) -> str | None:
    return value.why if isinstance(value, Call) else None


@pytest.fixture(autouse=True)
def _known_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of ``calls.run`` are prepared too, though it says what to choose: always the same here."""
    monkeypatch.setattr(kinds, "_is_watched", lambda: False)
    kinds.forget()


def _tensor_at(address: int, like: Tensor) -> Tensor:
    """A tensor of ``like``'s form over memory at ``address``."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    held = (ctypes.c_byte * (span * like.element_size())).from_address(address)
    return torch.frombuffer(held, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, like.stride())


def _interpreted_launches(
    ran: list[tuple[Launch, Any]], place: dict[int, int], count: int, device: int
) -> Callable[[list[int]], None]:
    """``direct.launches`` for the interpreter, whose kernels take tensors."""
    from reslora_kernels.kernels.device import descriptor

    def moved(value: Any, addresses: list[int]) -> Any:
        if isinstance(value, Tensor):
            return _tensor_at(addresses[place[value.data_ptr()]], value)
        if hasattr(value, "block_shape"):
            return descriptor(moved(value.base, addresses), *value.block_shape)
        return value

    def launch_all(addresses: list[int]) -> None:
        assert len(addresses) == count
        for launch, _ in ran:
            arguments = {name: moved(value, addresses) for name, value in launch.arguments.items()}
            launch.kernel[launch.grid](**arguments, **launch.options)

    return launch_all


def _twice(call: Call, device: torch.device, backend: Any) -> None:
    """Other values in other memory: the second run is a prepared one, and right."""
    first, second = draw(call, device, integers=True), draw(call, device, integers=True)
    for name in ("x", "dy", "residual", "a_cat"):
        if second[name] is not None:
            second[name].neg_()
    run(call, first, backend)
    kept = list(backend._kinds._known.values())
    assert kept and None not in kept
    with mock.patch.object(kinds.Prepared, "run", autospec=True, side_effect=kinds.Prepared.run) as prepared:
        results = run(call, second, backend)
    assert prepared.call_count == len(kept)
    for name, expected in truth(call, second).items():
        assert torch.equal(results[name], expected.to(results[name].dtype)), name
    for _ in range(0 if call.p else 2):
        onto = torch.full_like(second["x"], 3)
        adding = SimpleNamespace(forward=backend.forward, backward=partial(_onto, backend, onto))
        results = run(call, second, adding)
        assert results["dx"].data_ptr() == onto.data_ptr()
        for name, expected in truth(call, second).items():
            assert relative_error(results[name], expected + (3 if name == "dx" else 0)) < 1e-2, name


def _onto(backend: Any, onto: Tensor, *given: Any) -> Any:
    """The backward pass whose dx is added to what the layer that read x next has found."""
    return backend.backward(*given, onto)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_a_prepared_pass_of_triton_is_the_same_pass(
    call: Call, interpreted: bool, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not interpreted:
        pytest.skip("a GPU's launcher is what test_on_gpu runs")
    monkeypatch.setattr(triton._direct(), "launches", _interpreted_launches)
    _twice(call, torch.device("cpu"), triton)


@pytest.mark.parametrize("call", [c for c in CALLS if c.form != "library"], ids=name_of)
@pytest.mark.parametrize("setting", ["off", "cooperative-pair", "one-pass"])
def test_a_prepared_pass_of_cuda_is_the_same_pass(
    call: Call, setting: str, hopper_extension: Path | None, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hopper_extension is None:
        pytest.skip("the emulator's count of launches is compared")
    monkeypatch.setenv("RESLORA_CUDA_HOPPER", setting)
    _twice(call, torch.device("cpu"), cuda)
    values = draw(call, torch.device("cpu"), integers=True)
    counts = []
    for _ in range(2):
        cuda_on_cpu.take_statistics(hopper_extension)
        run(call, values, cuda)
        counts.append(cuda_on_cpu.take_statistics(hopper_extension).launches)
        kinds.forget()
    assert counts[0] == counts[1] > 0


def test_one_tensor_for_two_operands_is_not_prepared(hopper_extension: Path | None, device: torch.device) -> None:
    """Which of them an address belongs to could not be told; the result is right all the same."""
    x, weight, a = (torch.randint(-2, 3, (16, 16), device=device).to(FP32) for _ in range(3))
    for _ in range(2):
        y = cuda.forward(x, weight, None, (a,), (a,), None, SideChannel(), None).y
        assert torch.equal(y, x @ weight.T + (x @ a.T) @ a.T)
    assert list(cuda._kinds._known.values()) == [None]


def test_kinds_differ_in_all_but_addresses_and_values() -> None:
    x, weight = torch.ones(4, 16), torch.ones(8, 16)
    kind, addresses = kinds.kind_of((x, weight, None), "forward", 1.0)
    assert addresses == [x.data_ptr(), weight.data_ptr(), 0]
    assert kinds.kind_of((x.clone(), weight.clone(), None), "forward", 1.0)[0] == kind
    odd = torch.ones(4 * 16 + 1)[1:].view(4, 16)
    others = [
        (x[:3], weight, None), (x, weight, x), (x.double(), weight, None), (x, torch.ones(16, 8).T, None),
        (odd, weight, None),
    ]  # fmt: skip
    assert len({kinds.kind_of(operands, "forward", 1.0)[0] for operands in others} | {kind}) == 1 + len(others)
    assert kinds.kind_of((x, weight, None), "backward", 1.0)[0] != kind


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """What this file finds as a script, with a driver that launches nothing."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_prepared"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_launches_of_a_layer(counted: dict[str, Any], backend: str, shortcut: str) -> None:
    assert counted["launches"][backend][shortcut] == LAUNCHES


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_python_calls_of_a_prepared_pass(counted: dict[str, Any], backend: str) -> None:
    calls = counted["host calls"][backend]
    assert tuple(calls) == ("forward", "backward")
    assert all(0 < made <= most for made, most in zip(calls.values(), HOST_CALLS[backend], strict=True)), calls


def test_a_handful_of_kernels_serves_any_number_of_tokens(counted: dict[str, Any]) -> None:
    for layer, compiled in counted["compiled"].items():
        assert 0 < compiled <= COMPILE_KEYS, layer


def test_the_driver_is_given_what_jit_functions_would_give_it(counted: dict[str, Any]) -> None:
    """Every argument of every launch, with and without preparation, addresses by the order in which they turn up."""
    assert len(counted["same"]) >= 6
    for name, (first, again) in counted["same"].items():
        assert first == again and len(first) > 2, name


def test_tensor_maps_are_encoded_once_for_an_address(counted: dict[str, Any]) -> None:
    assert counted["maps"] == [3, 0, 1]


# What the process of its own does


def _count() -> dict[str, Any]:
    from reslora_kernels.backends.stubs import stubbed_cuda, stubbed_triton

    def empty(t: Tensor, b: Tensor, scale: float, bias: Tensor | None, x: Tensor, w: Tensor, *onto: Any) -> Tensor:
        return x.new_empty(x.shape[0], w.shape[1])

    found: dict[str, Any] = {"launches": {}, "host calls": {}, "compiled": {}, "same": {}}
    with stubbed_cuda() as extension:
        _count_costs(found, "cuda", lambda: extension.launches)
    with stubbed_triton() as stub, mock.patch.object(library, "product_then_matmul", empty):
        _count_costs(found, "triton", lambda: len(stub.launched))
        found["maps"] = _maps(stub)
        for call in CALLS[:7]:
            found["same"][call.why] = _launched_twice(stub, call)
    for k, n, r, p in ((4096, 4096, 16, 0.0), (4096, 4096, 16, 0.1), (4096, 1024, 64, 0.0)):
        with stubbed_triton() as stub, mock.patch.object(library, "product_then_matmul", empty):
            for m in random.Random(0).sample(range(1, 4097), 300):
                for once in _passes(triton, Call("", m, k, n, r, r, BF16, BF16, p=p)).values():
                    once()
            found["compiled"][f"{k} to {n}, r = {r}, p = {p}"] = len(stub.compiled)
    return found


def _count_costs(found: dict[str, Any], backend: str, launches: Callable[[], int]) -> None:
    layers = {shortcut: _of_a_layer(launches, backend, shortcut, pre_num) for shortcut, pre_num in SHORTCUTS.items()}
    found["launches"][backend] = layers
    passes = _passes({"triton": triton, "cuda": cuda}[backend], Call("", 8, 64, 64, 16, 16))
    found["host calls"][backend] = {name: _python_calls(once) for name, once in passes.items()}


def _of_a_layer(launches: Callable[[], int], backend: str, shortcut: str, pre_num: int) -> dict[str, int]:
    """Launches of the middle one of three layers, in a prepared forward, and a third of those of backward."""
    config = ResLoRAConfig(r=8, shortcut=shortcut, pre_num=pre_num, lora_dropout=0.0, backend=backend)
    layers = [ResLoRALinear(64, 64, dtype=BF16, config=config) for _ in range(3)]
    stack = nn.Sequential(*layers)
    link(layers, root=stack)
    marks: list[int] = []
    layers[1].register_forward_pre_hook(lambda *_: marks.append(launches()))
    layers[1].register_forward_hook(lambda *_: marks.append(launches()))
    x = torch.randn(8, 64, dtype=BF16, requires_grad=True)
    for _ in range(2):
        marks.clear()
        y = stack(x)
        before = launches()
        with mock.patch("torch.cat", wraps=torch.cat) as cat:
            y.sum().backward()
    backward = (launches() - before) // 3
    return {"forward": marks[1] - marks[0], "backward": backward, "joined in backward": cat.call_count}


def _passes(backend: ModuleType, call: Call) -> dict[str, Callable[[], Any]]:
    """A forward and a backward pass of a backend, on memory that holds anything."""
    dtype, adapter = call.dtype, call.adapter
    x, weight = torch.empty(call.m, call.k, dtype=dtype), torch.empty(call.n, call.k, dtype=dtype)
    a, b = torch.empty(call.rank, call.k, dtype=adapter), torch.empty(call.n, call.own, dtype=adapter)
    residual = torch.empty(call.m, call.own, dtype=dtype) if call.residual else None
    dropout = Dropout(torch.zeros((), dtype=torch.int64), call.p) if call.p else None
    side = SideChannel(call.c, call.scaling, *call.hand)
    width = call.hand[1] - call.hand[0]
    dhanded = torch.empty(call.m, width, dtype=dtype) if width else None
    dy, u = torch.empty(call.m, call.n, dtype=dtype), torch.empty(call.m, call.own, dtype=dtype)
    needs = Needs(dresidual=call.residual)
    return {
        "forward": lambda: backend.forward(x, weight, None, (a,), (b,), residual, side, dropout),
        "backward": lambda: backend.backward(dy, dhanded, x, weight, (a,), (b,), u, side, dropout, needs),
    }


def _python_calls(once: Callable[[], Any]) -> int:
    """Python functions that a prepared run calls, the least of ten: an address that is new has its map encoded."""
    counts = []

    def count(frame: Any, event: str, argument: Any) -> None:
        counts[-1] += event == "call"

    once()
    for _ in range(10):
        counts.append(0)
        sys.setprofile(count)
        try:
            once()
        finally:
            sys.setprofile(None)
    return min(counts)


def _maps(stub: Any) -> list[int]:
    """Tensor maps of x, W and y that are encoded first, again with the same, and with another x; y is let alone."""
    call = Call("", 256, 512, 512, 16, 16)
    weight, a, b = (torch.empty(*shape, dtype=BF16) for shape in ((512, 512), (16, 512), (512, 16)))
    x, other, counts, results = torch.empty(256, 512, dtype=BF16), torch.empty(256, 512, dtype=BF16), [], []
    assert call.m == len(x)
    triton.forward(x, weight, None, (a,), (b,), None, SideChannel(), None)
    memory = torch.empty(256, 512, dtype=BF16)
    with mock.patch.object(kinds.Prepared, "run", lambda self, like, at: _into(self, memory, like, at)):
        for given in (x, x, other):
            before = len(stub.maps)
            results.append(triton.forward(given, weight, None, (a,), (b,), None, SideChannel(), None))
            counts.append(len(stub.maps) - before)
    return counts


def _into(prepared: Any, memory: Tensor, like: Tensor, addresses: list[int]) -> list[Tensor | None]:
    """A prepared pass whose y goes to ``memory``."""
    u = like.new_empty(like.shape[0], 16)
    prepared.launch([*addresses, memory.data_ptr(), 0, u.data_ptr(), *prepared.offsets])
    return [memory, None, u]


def _launched_twice(stub: Any, call: Call) -> list[list[Any]]:
    """What the launcher is given by ``JITFunction``, and what by a prepared pass."""
    seen: list[list[Any]] = [[], []]
    for once in _passes(triton, call).values():
        for launches in seen:
            stub.launched.clear()
            once()
            launches += _without_addresses(stub.launched)
    return seen


def _without_addresses(launched: list[tuple[str, Any]]) -> list[Any]:
    """Launches as plain values; an address is the number of different ones before it."""
    order: dict[int, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.data_ptr()
        if isinstance(value, (tuple, list)):
            return [plain(each) for each in value]
        if isinstance(value, int) and value > 1 << 24:
            return f"address {order.setdefault(value, len(order))}"
        return value if isinstance(value, (int, float, str)) or value is None else type(value).__name__

    hooks = "HookChain"
    return [
        [name, [plain(None if type(value).__name__ == hooks else value) for value in given]] for name, given in launched
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(_count(), sys.stdout)
