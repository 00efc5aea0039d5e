"""Which calls the Hopper kernels serve, by setting and by measured table, and the check of a GPU that measures them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu_check import hopper as gpu_check
from benchmarks.gpu_check import hopper_launches, hopper_layers, steps
from benchmarks.gpu_check.steps import Steps
from reslora_kernels.backends import cuda, hopper, select
from reslora_kernels.bench.timing import Rates, Samples, Subject
from reslora_kernels.tuning import gpus

from .calls import Call, draw, launched, run, truth

pytestmark = pytest.mark.usefixtures("hopper_extension")
CALL = Call("two passes", 300, 200, 520, 16, 16, torch.bfloat16, torch.bfloat16)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs ends the process, and here that would be pytest's: a loaded machine may take its time."""
    monkeypatch.setattr(steps, "STEP_SECONDS", 280.0)
    monkeypatch.setattr(steps, "KERNEL_SECONDS", 280.0)


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine; a CPU without bfloat16 takes half a minute to measure them."""
    monkeypatch.setattr(gpu_check, "measure_rates", lambda *_: Rates({"bfloat16": 1e11}, 1e10))


def test_named_variants_and_off(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    values = draw(CALL, device, integers=False)
    x, weight = values["x"], values["weight"]
    monkeypatch.setenv(hopper.VARIABLE, "ping-pong")
    asked = "Hopper kernel: RESLORA_CUDA_HOPPER=ping-pong"
    both = f"two passes (RESLORA_CUDA_HOPPER=ping-pong): h first, by the streaming {asked}; then the matmul on top of"
    both += f" the low-rank product, by the ping-pong {asked}"
    assert cuda.explain(x, weight, 16) == both
    assert cuda.explain(x[:63], weight, 16).count("not by a Hopper one: x has fewer than 64 rows") == 2
    assert "h first, by the portable kernel, not by a Hopper one: the result has more than 128" in cuda.explain(
        x, weight, 129
    )
    assert cuda.explain(x, weight[:264], 16).endswith("by the one-pass Hopper kernel: RESLORA_CUDA_HOPPER=ping-pong")
    monkeypatch.setenv(hopper.VARIABLE, "one-pass")
    one = "one pass: both products from one read of x, by the one-pass Hopper kernel: "
    one += "RESLORA_CUDA_HOPPER=one-pass"
    assert cuda.explain(x, weight, 16) == cuda.explain(x, weight, 64) == one
    many = cuda.explain(x, weight, 65)
    assert many.startswith("two passes (one pass takes at most 64 ranks, these are 65): h first, by the streaming")
    assert many.endswith("by the cooperative-pair Hopper kernel: RESLORA_CUDA_HOPPER=one-pass")
    by_columns = cuda.explain(x, weight.T.contiguous().T, 16)
    assert by_columns.startswith("two passes (one by no Hopper kernel: the weight lies by columns): h first")
    monkeypatch.setenv(hopper.VARIABLE, "off")
    assert (
        cuda.explain(x, weight, 16).count("by the portable kernel, not by a Hopper one: RESLORA_CUDA_HOPPER=off") == 2
    )
    monkeypatch.setenv(hopper.VARIABLE, "fast")
    with pytest.raises(ValueError, match="RESLORA_CUDA_HOPPER must be 'auto', 'off' or one of 'cooperative-pair', "):
        hopper.setting()


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The measured table is empty, and the environment asks for nothing."""
    monkeypatch.delenv(hopper.VARIABLE, raising=False)
    content: dict = {}
    monkeypatch.setattr(gpus, "table", lambda: content)
    hopper._choice.cache_clear()
    yield
    hopper._choice.cache_clear()


def launches(call: Call, values: dict) -> tuple[list[int], list[bool]]:
    """The number of the variant of each matmul, and whether each projection was streamed; all results exact."""
    expected = truth(call, values)
    results, projected = launched(call, values, "project")
    for name, result in results.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name
    multiplied = [given.get("hopper", 0) for given in launched(call, values, "augmented_matmul")[1]]
    return multiplied, [given["hopper"] for given in projected]


def test_the_table_admits_what_it_knows_to_be_fastest(no_table: None, device: torch.device) -> None:
    values = draw(CALL, device, integers=True)
    x, weight = values["x"], values["weight"]
    assert launches(CALL, values) == ([0, 0], [False, False])
    assert cuda.explain(x, weight, 16).count("by the portable kernel, not by a Hopper one: none was measured near") == 2
    bf16 = {"dtype": "torch.bfloat16", "m": CALL.m}
    forward = bf16 | {"form": "forward", "n": CALL.n, "k": CALL.k, "rank": 16}
    dx = bf16 | {"form": "dx", "n": CALL.k, "k": CALL.n, "rank": 16}
    h, dh = bf16 | {"form": "h", "n": 16, "k": CALL.k}, bf16 | {"form": "dh", "n": 16, "k": CALL.n}
    matmuls = [
        forward | {"microseconds": {"portable": 5.0, "cooperative": 4.0, "ping-pong": 3.0}},
        dx | {"microseconds": {"portable": 5.0, "cooperative-pair": 6.0}},
        dx | {"form": "dx with dropout", "microseconds": {"portable": 5.0, "cooperative": 4.0}},
    ]
    projections = [
        h | {"microseconds": {"portable": 3.0, "streaming": 4.0}},
        dh | {"microseconds": {"portable": 3.0, "streaming": 2.0}},
    ]
    hopper.admit({"cuda_matmuls": matmuls, "cuda_projections": projections})
    assert launches(CALL, values) == ([3, 0], [False, True])
    said = cuda.explain(x, weight, 16)
    assert "h first, by the portable kernel, not by a Hopper one: the portable one was measured fastest" in said
    assert said.endswith("by the ping-pong Hopper kernel: measured fastest near this shape (3 us)")
    for other, w in ((x.half(), weight), (x, weight[:0])):
        assert "none was measured" in cuda.explain(other, w, 16)
    assert launches(replace(CALL, p=0.5), values)[0] == [3, 1]


def test_the_table_admits_one_pass_where_it_is_faster_than_two(no_table: None, device: torch.device) -> None:
    values = draw(CALL, device, integers=True)
    x, weight = values["x"], values["weight"]
    row = {"dtype": "torch.bfloat16", "m": CALL.m, "rank": 16}
    forward, backward = {"form": "one pass", "n": 520, "k": 200}, {"form": "dx and dh", "n": 200, "k": 520}
    times = {"two passes": 7.0, "one-pass": 5.0}
    slower = {"two passes": 4.0, "one-pass": 5.0}
    rows = [row | forward | {"microseconds": times}, row | backward | {"microseconds": slower}]
    hopper.admit({"cuda_matmuls": rows, "cuda_projections": []})
    assert launches(CALL, values) == ([4, 0], [False])
    assert cuda.explain(x, weight, 16).endswith(
        "by the one-pass Hopper kernel: measured fastest near this shape (5 us)"
    )
    hopper.admit({"cuda_matmuls": [row | forward | {"microseconds": slower}, row | backward | {"microseconds": times}]})
    assert launches(CALL, values) == ([0, 4], [False])
    assert cuda.explain(x, weight, 16).startswith(
        "two passes (two passes were measured fastest near this shape (4 us))"
    )


def test_what_the_table_admits_is_looked_up_once(no_table: None, device: torch.device) -> None:
    values = draw(CALL, device, integers=False)
    with mock.patch.object(gpus, "nearest", wraps=gpus.nearest) as looked_up:
        first = run(CALL, values, cuda)
        assert looked_up.call_count == 6  # h, forward, dh, dx, and one pass instead in each direction
        again = run(CALL, values, cuda)
        assert looked_up.call_count == 6
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
def test_the_gpu_check_goes_through_its_motions(
    no_table: None, known_rates: None, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu":
        pytest.skip("make gpu-check ARGS='--part hopper' is the real thing")
    path = tmp_path / "hopper.json"
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(select, "check", lambda name: None)
    assert gpu_check.main(["--rehearse", f"--output={path}"]) == 0
    found = json.loads(path.read_text())
    assert found["finished"] and found["wrong"] == {} and found["running"] is None
    assert {goal["goal"] for goal in found["goals"]} == {"forward", "both", "ahead of torch", "matmul"}
    timed = found["steps"]
    for launch in gpu_check.REHEARSAL.rows:
        known = timed[f"time {launch}"]["row"]["microseconds"].keys() - {hopper.TWO_PASSES}
        assert known == set(gpu_check.kernels_for(launch))
        assert ("of_bandwidth" in timed[f"time {launch}"]) == isinstance(launch, hopper_launches.Projection)
    (case,) = gpu_check.REHEARSAL.layers
    assert timed[f"layer {case}"]["of_frozen"].keys() == {"frozen", "torch", "off", *gpu_check.SETTINGS}
    assert sum(name.startswith("replay") for name in timed) == len(hopper.NUMBERS)


@pytest.mark.parametrize(
    ("launch", "kernel", "changed"),
    [
        (gpu_check.SMALL[2], "ping-pong", {"scale": 3.0}),
        (gpu_check.SIDE_CHANNELS[0], hopper.STREAMING, {"raw_factor": 3.0}),
    ],
    ids=["matmul", "projection"],
)
def test_the_gpu_check_finds_what_is_wrong(
    launch: hopper_launches.Launch, kernel: str, changed: dict, device: torch.device
) -> None:
    right = type(launch).expected
    assert hopper_launches.faults(launch, [kernel], device) == {}
    with mock.patch.object(type(launch), "expected", lambda self, given, dtype: right(self, given | changed, dtype)):
        assert "largest error" in hopper_launches.faults(launch, [kernel], device)[kernel]
    few = replace(launch, m=63)
    assert "another kernel serves" in hopper_launches.faults(few, [kernel], device)[kernel]
    launched, once = type(launch).launch, count()

    def zeros_later(self: hopper_launches.Launch, given: dict) -> None:
        launched(self, given)
        for tensor in self.found(given).values() if next(once) else ():
            tensor.zero_()

    with mock.patch.object(type(launch), "launch", zeros_later):
        assert "other bits when it is launched again" in hopper_launches.faults(launch, [kernel], device)[kernel]


def test_what_is_wrong_in_one_form_is_out_of_that_form_and_of_layers() -> None:
    found, wide, narrow = Steps(), gpu_check.FULL.layers[0], gpu_check.FULL.replayed[1]
    settings = (hopper.OFF, *gpu_check.SETTINGS)
    found.wrong.update({"ping-pong, dx": "planted", "one-pass, one pass": "planted"})
    assert not gpu_check.is_right(found, "ping-pong", "dx") and gpu_check.is_right(found, "ping-pong", "forward")
    assert set(settings) - set(gpu_check.settings_for(found, wide, settings)) == {"ping-pong", "one-pass"}
    alone = [hopper.OFF, hopper.AUTO]
    assert gpu_check.settings_for(found, narrow, settings) == alone
    found.wrong.update({"cooperative": "planted", "streaming, dh": "planted"})
    assert not gpu_check.is_right(found, "cooperative", "forward")
    assert gpu_check.settings_for(found, wide, settings) == alone
    assert gpu_check.settings_for(found, replace(wide, p=0.1), settings) == [hopper.OFF, hopper.AUTO]


def test_a_layer_that_is_refused_fails_the_check(
    known_rates: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers_only = replace(gpu_check.REHEARSAL, checked=[], rows=[], alone=[], replayed=[])
    monkeypatch.setattr(gpu_check, "REHEARSAL", layers_only)
    for refused, status in (({}, 0), ({"auto": "y of layer 0: largest error"}, 1)):
        monkeypatch.setattr(hopper_layers, "times", lambda *_, refused=refused: {"refused": refused})
        assert gpu_check.main(["--rehearse", f"--output={tmp_path / str(status)}"]) == status


def test_tuning_admits_hopper_kernels_before_whole_calls(
    no_table: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type != "cpu":
        pytest.skip("make tune is the real thing")
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(gpu_check, "FULL", gpu_check.REHEARSAL)
    medians = {"library": 1e-5, "portable": 5e-6, "cooperative": 4e-6, "ping-pong": 1e-6, "streaming": 3e-6}

    def timed(subjects: list[Subject], *_: object) -> dict[str, Samples]:
        return {s.name: Samples([medians[s.name]], [0.0]) for s in subjects if s.name in medians}

    monkeypatch.setattr(hopper_launches, "measure", timed)
    wrong = {"ping-pong": "planted"}
    monkeypatch.setattr(hopper_launches, "faults", lambda launch, kernels, *_: wrong if "ping-pong" in kernels else {})
    chosen = [tune.Shape(CALL.m, CALL.k, CALL.n), tune.Shape(16, 64, 64), tune.Shape(300, 64, 64, 16, torch.float32)]
    table = tune.hopper_rows(chosen, device, gpu_check.ONCE, Steps())
    assert [(row["form"], row["n"], row["k"]) for row in table["cuda_matmuls"]] == [
        ("forward", 520, 200), ("dx", 200, 520), ("dx with dropout", 200, 520), ("one pass", 520, 200),
        ("dx and dh", 200, 520),
    ]  # fmt: skip
    assert [row["microseconds"] for row in table["cuda_matmuls"][3:]] == [{"two passes": 7.0}] * 2
    assert [row["form"] for row in table["cuda_projections"]] == ["h", "dh"]
    assert all("ping-pong" not in row["microseconds"] for row in table["cuda_matmuls"])
    assert launches(CALL, draw(CALL, device, integers=True)) == ([1, 1], [True, True])
