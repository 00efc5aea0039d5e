"""The benchmark itself on tiny cases: who is checked, refused, left out; what is kept when something breaks."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from reslora_kernels.backends import select
from reslora_kernels.bench import cases, model_cases, providers, suite, timing
from reslora_kernels.bench.cases import LORA, Case, Method
from reslora_kernels.bench.model_cases import ModelCase
from reslora_kernels.bench.models import run_model
from reslora_kernels.bench.providers import PROVIDERS, Provider
from reslora_kernels.bench.results import FAILED, REFUSED, SKIPPED, TIMED, read
from reslora_kernels.bench.timing import Rates, floor_seconds, stacked_ranks
from reslora_kernels.bench.workload import (
    Layers,
    Pass,
    Workload,
    draw,
    highest,
    input_sets,
    peak_bytes,
    replayed,
    saved_bytes,
)
from reslora_kernels.cli import bench as command
from reslora_kernels.cli import main

CPU = torch.device("cpu")
TINY = Case(24, 16, 20, r=4, dtype="float32", layers=3)
REACHES = (LORA, Method("input", 1), Method("block", 2), Method("middle", -1), Method("middle", 1))


@pytest.fixture
def bench() -> suite.Bench:
    plan = timing.Plan(most=4, least=2, seconds=1e9, warmup=1)
    return suite.Bench.on(CPU, plan, Rates({"float32": 1e11, "bfloat16": 1e11}, 1e10))


@pytest.fixture
def tiny_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's sets, so small that they take no time."""
    two = [TINY.replace(methods=(LORA, Method("block", 1))), TINY.replace(m=5)]
    monkeypatch.setitem(cases.SETS, "quick", lambda gpu: two)
    monkeypatch.setitem(model_cases.MODEL_SETS, "models", lambda gpu, quick: [])
    monkeypatch.setitem(model_cases.MODEL_SETS, "growth", lambda gpu, quick: [])
    monkeypatch.setattr(command, "measure_rates", lambda dtypes, device, clock: Rates({"float32": 1e11}, 1e10))


def changed(name: str, change: Callable[[Layers, Workload], Layers]) -> Provider:
    """A provider like ``ours-torch`` whose layers are changed."""
    sound = PROVIDERS["ours-torch"]
    return Provider(name, "planted", lambda w, method: change(sound.build(w, method), w))


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is 1 % off."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * 1.01


def test_every_provider_of_this_machine_computes_the_reference(bench: suite.Bench) -> None:
    case = TINY.replace(methods=REACHES)
    rows = suite.run_case(bench, "test", case, list(PROVIDERS.values()))
    timed = {(row.provider, row.method) for row in rows if row.status == TIMED}
    assert {row.status for row in rows} == {TIMED, SKIPPED}
    assert {("frozen", ""), ("peft", "lora"), ("plain", "middle-all"), ("ours-torch", "block-2")} <= timed
    assert all(row.reason for row in rows if row.status == SKIPPED)
    for row in rows:
        if row.status == TIMED:
            assert set(row.seconds) == set(row.times_frozen) == {"forward", "backward", "both"}
            assert row.rounds == 4 and row.peak_bytes > 0 and max(row.error.values()) < 1e-6


def test_dropout_is_checked_with_the_masks_drawn(bench: suite.Bench) -> None:
    """Ours at the case's own p; others without dropout, since nobody knows their masks. A wrong scale is noticed."""
    case = TINY.replace(p=0.3, methods=REACHES)
    chosen = [PROVIDERS[name] for name in ("frozen", "plain", "peft", "ours-torch")]
    assert {row.status for row in suite.run_case(bench, "test", case, chosen)} == {TIMED}
    no_dropout = PROVIDERS["ours-torch"].build
    forgetful = Provider(
        "forgets dropout", "", lambda w, m: no_dropout(Workload(TINY, *suite_tensors(w)), m), same_mask=True
    )
    rows = suite.run_case(bench, "test", case, [PROVIDERS["frozen"], forgetful])
    assert {row.status for row in rows if row.provider == "forgets dropout"} == {REFUSED}


def suite_tensors(w: Workload) -> tuple[list[Tensor], ...]:
    return w.weights, w.a, w.b, w.xs, w.dys


def test_half_precision_is_judged_against_plain_pytorch(bench: suite.Bench) -> None:
    rows = suite.run_case(bench, "test", TINY.replace(dtype="bfloat16"), list(PROVIDERS.values()))
    assert {row.status for row in rows} == {TIMED, SKIPPED}
    assert {row.status for row in rows if row.provider == "peft-float32"} == {TIMED}


@pytest.mark.parametrize("what", ["gradient", "output", "no adapters"])
def test_a_wrong_provider_is_refused_and_not_timed(what: str, bench: suite.Bench) -> None:
    def spoil(layers: Layers, workload: Workload) -> Layers:
        if what == "no adapters":
            return Layers(layers.run, [])
        wrong = WrongGradient.apply if what == "gradient" else lambda y: y * 1.01
        return Layers(lambda xs: [wrong(y) for y in layers.run(xs)], layers.parameters)

    rows = suite.run_case(bench, "test", TINY, [PROVIDERS["frozen"], PROVIDERS["plain"], changed("planted", spoil)])
    for row in rows:
        if row.provider == "planted":
            assert row.status == REFUSED and not row.seconds and row.rounds == 0
            expected = {
                "gradient": "wrong result: dx of layer 0: largest error",
                "output": "wrong result: y of layer 0",
            }
            assert str(row.reason).startswith(expected.get(what, "wrong result: gives 0 dA for 3 layers"))
        else:
            assert row.status == TIMED


def test_a_provider_that_raises_is_no_end_of_the_run(bench: suite.Bench) -> None:
    def spoil(layers: Layers, workload: Workload) -> Layers:
        raise RuntimeError("no such kernel\nin this build")

    rows = suite.run_case(bench, "test", TINY, [PROVIDERS["frozen"], changed("planted", spoil)])
    assert {(row.provider, row.status) for row in rows} == {("frozen", TIMED), ("planted", FAILED)}
    assert rows[1].reason == "RuntimeError: no such kernel"


def test_a_lost_gpu_keeps_the_results_so_far(
    tiny_sets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = command.run_case

    def vanishing(bench: suite.Bench, set_name: str, case: Case, *rest: object) -> object:
        if case.m == 5:
            raise timing.DeviceLostError("the GPU is lost: unspecified launch failure")
        return sound(bench, set_name, case, *rest)

    monkeypatch.setattr(command, "run_case", vanishing)
    path = tmp_path / "result.json"
    assert main(["bench", "--quick", "--provider", "ours-torch", "--output", str(path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error == f"reslora: error: the GPU is lost: unspecified launch failure; the 3 results before that are in {path}"
    )
    result = read(path)
    assert [row.status for row in result.measurements] == [TIMED] * 3
    assert result.stopped == "DeviceLostError: the GPU is lost: unspecified launch failure"


def test_an_interrupt_keeps_the_results_so_far(
    tiny_sets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sound = command.run_case

    def interrupted(bench: suite.Bench, set_name: str, case: Case, *rest: object) -> object:
        if case.m == 5:
            raise KeyboardInterrupt
        return sound(bench, set_name, case, *rest)

    monkeypatch.setattr(command, "run_case", interrupted)
    path = tmp_path / "result.json"
    assert main(["bench", "--quick", "--provider", "plain", "--output", str(path)]) == 130
    assert read(path).stopped == "interrupted" and len(read(path).measurements) == 3


@pytest.mark.slow
def test_the_command_writes_json_and_csv(tiny_sets: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--quick", "--output", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").glob("*.json")
    result = read(path)
    assert path.name.startswith(f"cpu-{result.date}-") and result.stopped is None
    assert json.loads(path.read_text())["format"] == "reslora bench"
    assert {"torch", "cpu", "python", "driver"} <= result.machine.keys() and os.uname().nodename not in path.read_text()
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert {row["phase"] for row in rows if row["status"] == TIMED} == {"forward", "backward", "both"}
    assert float(rows[0]["seconds_20"]) <= float(rows[0]["seconds_50"]) <= float(rows[0]["seconds_80"])
    printed = capsys.readouterr().out
    assert "quick: M=24 16->20 r=4 float32 layers=3" in printed
    assert "Skipped lorafusion: lorafusion is not installed" in printed
    assert main(["bench", "--quick", "--output", str(tmp_path / "new")]) == 0
    assert len(list((tmp_path / "new").glob("*.json"))) == 2  # the first is not overwritten


def test_no_case_begins_after_the_budget(tiny_sets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = iter([0.0, 0.5, 100.0, 200.0, 300.0, 400.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock, 500.0))
    path = tmp_path / "result.json"
    assert main(["bench", "--quick", "--provider", "plain", "--budget-seconds", "60", "--output", str(path)]) == 0
    result = read(path)
    assert result.stopped == "budget of 60 s used up" and {row.case for row in result.measurements} == {
        "M=24 16->20 r=4 float32 layers=3"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "cublas"], "unknown provider 'cublas'; the providers are frozen, plain,"),
        (["--set", "huge"], "unknown set 'huge'; the sets are quick, first, standard,"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
def test_bad_options_are_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    written = capsys.readouterr()
    assert message in written.err and written.err.count("\n") == 1 and not written.out


def test_a_forced_backend_is_refused(tiny_sets: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(select.OVERRIDE, "torch")
    with pytest.raises(ValueError, match="would time one backend under every name; unset it"):
        PROVIDERS["ours-torch"].missing(TINY, LORA, CPU)


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PROVIDERS, *cases.SETS, *model_cases.MODEL_SETS))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", cases.SETS)
def test_sets_hold_each_case_once(name: str, gpu: bool) -> None:
    found = cases.SETS[name](gpu)
    assert found and len({str(case) for case in found}) == len(found)
    assert all(set(case.compiled) <= set(case.methods) for case in found)
    assert gpu or all(not case.replay and case.input_bytes() < 200e6 for case in found)


def test_sets_hold_the_shapes_of_the_literature() -> None:
    grid = {(case.m, case.k) for case in cases.lorafusion(True) if case.k == case.n and case.r == 16}
    assert grid == {(m, k) for m in range(2048, 8193, 256) for k in (4096, 5120, 8192)}
    assert {(case.k, case.n) for case in cases.standard(True)} == {
        (4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)
    }  # fmt: skip
    assert {case.m for case in cases.small_m(True) if case.replay} == {1, 16, 128, 512}
    assert {case.r for case in cases.ranks(True)} == {8, 16, 32, 64}
    assert [case.dtype for case in cases.dtypes(True)] == ["bfloat16", "float16", "tf32", "float32"]


def test_a_case_that_another_set_covers_is_measured_once() -> None:
    tasks = command.Settings(("standard", "lorafusion-coarse", "compiled", "ranks")).tasks(True)
    names = [str(case) for _, case in tasks]
    assert names.count("M=8192 4096->4096 r=16 bfloat16") == 2  # once more for torch.compile alone
    assert [name for name, case in tasks if isinstance(case, Case) and case.compiled] == ["compiled"]


def test_input_sets_exceed_the_cache() -> None:
    small = Case(1, 1024, 1024)
    assert input_sets(small, 50 << 20, most=99) * small.input_bytes() >= 4 * (50 << 20)
    assert input_sets(Case(8192, 4096, 4096), 50 << 20) == 2


def test_the_floor_is_that_of_the_paper_table() -> None:
    """M = 8192, 4096 to 4096, r = 16 at 790 TFLOP/s: 350.7 us forward, 353.4 backward, 347.9 frozen, for each layer."""
    case, rates = Case(8192, 4096, 4096), Rates({"bfloat16": 790e12}, 4.3e12)
    floors = {name: seconds / case.layers * 1e6 for name, seconds in floor_seconds(case, LORA, rates).items()}
    assert floors == pytest.approx({"forward": 350.7, "backward": 353.4, "both": 704.1}, abs=0.2)
    assert floor_seconds(case, None, rates)["forward"] / case.layers * 1e6 == pytest.approx(347.9, abs=0.2)
    weight_bound = floor_seconds(Case(1, 4096, 4096, layers=1), None, rates)["forward"]
    assert weight_bound == pytest.approx(2 * (4096 * 4096 + 2 * 4096) / 4.3e12)
    four = case.replace(methods=())
    assert stacked_ranks(four, Method("block", 1)) == (7 * 16, 7 * 16)
    assert stacked_ranks(four, Method("block", -1)) == (10 * 16, 10 * 16)
    assert stacked_ranks(four, Method("input", 1)) == (7 * 16, 4 * 16)
    assert stacked_ranks(four, Method("middle", 3)) == (4 * 16, 4 * 16)


def test_memory_of_a_pass() -> None:
    """Saved: x and u of every layer. The peak covers the results and what is alive at the same time."""
    workload = draw(TINY, CPU)
    one = Pass(PROVIDERS["ours-torch"].build(workload, LORA), workload)
    assert saved_bytes(one) == 4 * TINY.layers * TINY.m * (TINY.k + TINY.r)
    grown = torch.randn(1000, 100)
    assert peak_bytes(lambda: (grown + 1).sum(), CPU) == pytest.approx(400_000, abs=200)
    assert highest([5, 5, -10, 7]) == 10 and highest([]) == 0


@pytest.mark.slow
def test_a_model_is_adapted_in_five_ways_on_shared_weights(bench: suite.Bench) -> None:
    rows = run_model(bench, ModelCase("llama", 2, 1, 8, r=2, pre_num=1, tiny=True))
    assert [(row.provider, row.method, row.status) for row in rows] == [
        ("frozen", "", TIMED),
        ("peft", "lora", TIMED),
        ("plain", "block-1", TIMED),
        ("ours", "lora", TIMED),
        ("ours", "block-1", TIMED),
    ]
    assert all(row.per_second and row.peak_bytes and row.times_frozen and row.unit == "tokens" for row in rows)


def test_a_model_with_a_wrong_gradient_is_refused(bench: suite.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from reslora_kernels.bench import models

    sound = models.adapt

    def planted(case: ModelCase, base: nn.Module, provider: str, method: Method) -> models.Trained:
        trained = sound(case, base, provider, method)
        if provider == "ours":
            next(iter(trained.adapters.values())).register_hook(lambda gradient: 2 * gradient)
        return trained

    monkeypatch.setattr(models, "adapt", planted)
    rows = run_model(bench, ModelCase("llama", 2, 1, 8, r=2, tiny=True))
    assert [row.status for row in rows] == [TIMED, TIMED, TIMED, REFUSED, REFUSED]
    assert str(rows[-1].reason).startswith("wrong gradients: error")


def test_chosen_providers_keep_frozen() -> None:
    assert [provider.name for provider in providers.chosen(["peft"])] == ["frozen", "peft"]


class StandInGpu:
    """torch.cuda's streams, graphs and events as far as the benchmark uses them: notes what is asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = 0.0

    def stream(self) -> object:
        asked = self.asked

        class Stream:
            def wait_stream(self, other: object) -> None:
                asked.append("wait")

        return Stream()

    def graph(self) -> object:
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.number = sum(entry.startswith("capture") for entry in gpu.asked)

            def pool(self) -> str:
                return "pool"

            def replay(self) -> None:
                gpu.asked.append("replay")

        return Graph()

    @contextmanager
    def capture(self, graph: object, **options: object) -> Iterator[None]:
        self.asked.append("capture" + (" in the first's pool" if options.get("pool") == "pool" else ""))
        yield

    def event(self, enable_timing: bool) -> object:
        gpu = self

        class Event:
            def record(self) -> None:
                gpu.now += 1.0
                self.at = gpu.now

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        assert enable_timing
        return Event()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandInGpu:
    stand_in = StandInGpu()
    for name, replacement in {
        "Stream": stand_in.stream,
        "current_stream": stand_in.stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: stand_in.asked.append("synchronize"),
        "CUDAGraph": stand_in.graph,
        "graph": stand_in.capture,
        "Event": stand_in.event,
        "_sleep": lambda cycles: stand_in.asked.append("hold"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return stand_in


def test_graphs_are_captured_apart_and_replayed_without_waiting(gpu: StandInGpu) -> None:
    workloads = [draw(TINY, CPU, seed) for seed in range(2)]
    passes = [Pass(PROVIDERS["ours-torch"].build(w, LORA), w) for w in workloads]
    subject = replayed("ours", passes)
    assert gpu.asked == ["wait", "wait", "synchronize", "capture", "capture in the first's pool"] * 2
    gpu.asked.clear()
    plan = timing.Plan(most=10, least=10, seconds=1e9, warmup=0, input_sets=2, hold=True)
    samples = timing.measure([subject], timing.CudaClock(), plan)
    assert gpu.asked == ["hold", "replay", "replay"] * 10 + ["synchronize"]
    assert samples["ours"].forward == samples["ours"].backward == [1e-3] * 10


def test_a_gpu_that_does_not_answer_is_lost(gpu: StandInGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(timing.DeviceLostError, match="the GPU is lost: RuntimeError: CUDA error: unspecified launch"):
        timing.check_alive(torch.device("cuda"))
    timing.check_alive(CPU)
