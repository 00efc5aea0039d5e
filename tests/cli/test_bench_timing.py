"""How the benchmark tells a slowdown from noise, and what its report shows, under a clock that the test moves."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from reslora_kernels.bench import figures, timing
from reslora_kernels.bench.cases import LORA, Case, Method
from reslora_kernels.bench.report import compare_results, write_report
from reslora_kernels.bench.results import FAILED, REFUSED, TIMED, Measurement, ModelMeasurement, Result, read
from reslora_kernels.bench.suite import AGAIN, fill
from reslora_kernels.cli import main

from .. import processes

CASE = Case(8192, 4096, 4096)
MACHINE = {"gpu": None, "cpu": "test", "threads": 1, "torch": "2", "driver": None, "triton": None}
MACHINE |= {"reslora_kernels": "0", "gpu_l2_bytes": None}


class FakeClock:
    """Advances when work is done on it, and by a bit at each mark. ``speed`` is the machine's, and may drift."""

    def __init__(self, seed: int = 0, jitter: float = 0.0, drift: float = 0.0) -> None:
        self.now, self.drained, self.held, self.speed = 0.0, 0, 0.0, 1.0
        self.jitter, self.drift, self.random = jitter, drift, random.Random(seed)

    def mark(self) -> float:
        return self.now

    def hold(self, seconds: float) -> None:
        self.held += seconds

    def drain(self) -> None:
        self.drained += 1

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def work(self, seconds: float) -> None:
        self.speed *= 1 + self.drift
        self.now += seconds * self.speed * (1 + self.jitter * self.random.random())

    def subject(self, name: str, forward: float, backward: float) -> timing.Subject:
        return timing.Subject(name, lambda i: self.work(forward), lambda i, outputs: self.work(backward))


def result(times: dict[str, float], clock: FakeClock, rounds: int = 60) -> Result:
    """Providers of plain LoRA that take so many seconds forward and twice as many backward; "frozen" among them."""
    subjects = [clock.subject(name, seconds, 2 * seconds) for name, seconds in times.items()]
    subjects.append(clock.subject(AGAIN, times["frozen"], 2 * times["frozen"]))
    samples = timing.measure(subjects, clock, timing.Plan(most=rounds, least=rounds, seconds=1e9))
    made = Result(dict(MACHINE), "0" * 40, False, "2026-01-02", {}, {name: "" for name in times})
    made.rates = {"matmul": {CASE.dtype: 1e14}, "copy": 1e12}
    for name in times:
        made.measurements.append(row(name, LORA, lambda r, name=name: fill(
            r, samples[name], samples["frozen"], samples[AGAIN])))  # fmt: skip
    return made


def row(provider: str, method: Method, fill_in: Callable[[Measurement], None]) -> Measurement:
    label = "" if provider == "frozen" else str(method)
    made = Measurement("standard", str(CASE), provider, label, TIMED)
    made.shape = {"m": CASE.m, "k": CASE.k, "n": CASE.n, "r": CASE.r, "dtype": CASE.dtype, "p": 0.0, "layers": 4}
    made.shape |= {"replay": False, "shortcut": method.shortcut, "pre_num": method.pre_num}
    made.floor_seconds = {"forward": 0.5, "backward": 1.0, "both": 1.5}
    made.error = made.plain_error = {"y": 1e-3, "dx": 1e-3, "dA": 2e-3, "dB": 2e-3}
    made.peak_bytes, made.saved_bytes = 3 << 20, 1 << 20
    fill_in(made)
    return made


TIMES = {"frozen": 1.0, "plain": 1.4, "ours-torch": 1.1, "peft": 1.3}


def test_a_planted_slowdown_of_ten_per_cent_is_found() -> None:
    """Alone, although the machine is 30 % slower the second time, slows down further, and every time is noisy."""
    old = result(TIMES, FakeClock(1, jitter=0.05))
    slower_machine = {name: 1.3 * seconds for name, seconds in TIMES.items()}
    planted = slower_machine | {"ours-torch": 1.1 * slower_machine["ours-torch"]}
    new = result(planted, FakeClock(2, jitter=0.05, drift=1e-4))
    found = compare_results(old, new)
    assert {change.provider for change in found.slower} == {"ours-torch lora"}
    assert {change.phase for change in found.slower} == set(timing.PHASES)
    assert all(change.change == pytest.approx(0.1, abs=0.03) for change in found.slower)
    assert found.worse and not found.faster and not found.broken
    assert found.machine is not None and found.machine > 1.25


@pytest.mark.parametrize("jitter", [0.0, 0.02, 0.2])
@pytest.mark.slow
def test_two_runs_agree_within_the_stated_noise(jitter: float) -> None:
    for seed in range(5):
        old, new = (result(TIMES, FakeClock(s, jitter), rounds=40) for s in (seed, 100 + seed))
        found = compare_results(old, new)
        assert not found.worse and not found.faster
        assert found.compared == 3 * len(timing.PHASES)


@pytest.mark.slow
def test_the_noise_covers_the_truth() -> None:
    """Of the quotient 1.1, in at least 18 of 20 runs with 15 rounds each."""
    covered = 0
    for seed in range(20):
        made = result(TIMES, FakeClock(seed, jitter=0.3), rounds=15)
        row = next(row for row in made.measurements if row.provider == "ours-torch")
        covered += abs(row.times_frozen["both"] / 1.1 - 1) <= row.noise["both"]
    assert covered >= 18


def test_rounds_are_interleaved_in_a_new_order_each() -> None:
    ran: list[str] = []
    clock = FakeClock()
    subjects = [
        timing.Subject(name, lambda i, name=name: ran.append(f"{name}{i}") or clock.work(1.0)) for name in "abc"
    ]
    plan = timing.Plan(most=30, least=30, seconds=1e9, warmup=0, input_sets=2)
    samples = timing.measure(subjects, clock, plan)
    rounds = [ran[n : n + 3] for n in range(0, 90, 3)]
    assert all(sorted(names) == [f"{name}{n % 2}" for name in "abc"] for n, names in enumerate(rounds))
    assert len({"".join(name[0] for name in names) for names in rounds}) == 6
    assert samples["a"].forward == [1.0] * 30 and samples["a"].backward == [0.0] * 30
    assert clock.drained == 3  # once for ten rounds, never between subjects


def test_a_subject_that_raises_is_given_up_and_the_others_go_on() -> None:
    clock, calls = FakeClock(), []

    def breaks(i: int) -> None:
        calls.append(i)
        if len(calls) == 7:
            raise RuntimeError("out of luck\nand more")

    subjects = [clock.subject("sound", 1.0, 1.0), timing.Subject("broken", breaks)]
    asked: list[int] = []
    samples = timing.measure(subjects, clock, timing.Plan(most=20, least=20, seconds=1e9), lambda: asked.append(1))
    assert samples["broken"].failure == "RuntimeError: out of luck"
    assert len(samples["sound"].of("both")) == 20
    assert asked == [1]


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 200), (90.0, 30), (1.0, 10)])
def test_rounds_fit_the_time_given(seconds: float, rounds: int) -> None:
    clock = FakeClock()
    samples = timing.measure([clock.subject("a", 1.0, 2.0)], clock, timing.Plan(seconds=seconds))
    assert len(samples["a"].forward) == rounds


def test_no_chunk_begins_after_the_deadline() -> None:
    clock = FakeClock()
    samples = timing.measure([clock.subject("a", 1.0, 2.0)], clock, timing.Plan(seconds=1e9), deadline=-math.inf)
    assert len(samples["a"].forward) == 10


def test_graphs_are_launched_while_the_device_is_held() -> None:
    clock = FakeClock()
    plan = timing.Plan(most=10, least=10, seconds=1e9, warmup=2, hold=True)
    timing.measure([clock.subject("a", 1.0, 1.0), clock.subject("b", 1.0, 1.0)], clock, plan)
    assert clock.held == pytest.approx(12 * 2 * timing.LAUNCH_SECONDS)


def test_percentiles_and_confidence() -> None:
    assert timing.percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (2.0, 3.5, 5.0)
    assert timing.percentiles([7.0]) == (7.0, 7.0, 7.0)
    ordered = [float(n) for n in range(1, 26)]
    low, high = timing.confidence(ordered)
    assert (low, statistics.median(ordered), high) == (8.0, 13.0, 18.0)  # ranks of the binomial table for n = 25
    assert timing.confidence([1.0, 2.0, 3.0]) == (1.0, 3.0)


def write(made: Result, path: Path) -> Path:
    made.write(path)
    return path


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(result(TIMES, FakeClock(1)), tmp_path / "old.json")
    slow = write(result(TIMES | {"peft": 1.43}, FakeClock(2)), tmp_path / "slow.json")
    assert main(["bench", "compare", str(old), str(old)]) == 0
    assert "9 figures compared: 0 slower beyond the noise" in capsys.readouterr().out
    assert main(["bench", "compare", str(old), str(slow)]) == 1
    printed = capsys.readouterr().out
    assert "peft lora" in printed and "+10.0%" in printed and "ours-torch" not in printed
    assert main(["bench", "compare", str(old), str(slow), "--threshold", "0.2"]) == 0


def test_what_was_timed_and_now_fails_is_worse(tmp_path: Path) -> None:
    old, new = result(TIMES, FakeClock(1)), result(TIMES, FakeClock(1))
    row = new.measurements[1]
    row.status, row.reason, row.seconds, row.times_frozen = FAILED, "out of memory", {}, {}
    found = compare_results(old, new)
    assert found.broken == [f"{row.case}, plain lora: failed now, out of memory"] and found.worse
    assert read(write(new, tmp_path / "new.json")) == new


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no result file: not valid JSON"),
        ("[]", "is no result file of `reslora bench`"),
        ('{"format": "reslora demo"}', "is no result file of `reslora bench`"),
        ('{"format": "reslora bench", "version": 99}', "has format version 99, this release reads 1"),
        ('{"format": "reslora bench", "version": 1}', "is a damaged result file"),
        ('{"format": "reslora bench", "version": 1, "measurements": [{"x": 1}], "models": []}', "is a damaged result"),
    ],
)
def test_an_unreadable_result_is_one_clear_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    for arguments in (["compare", str(path), str(path)], ["report", str(path)]):
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["bench", "report", str(tmp_path / "none.json")]) == 2


def test_results_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match="no measurement in common"):
        compare_results(result(TIMES, FakeClock()), Result({}, None, None, "2026-01-01", {}))


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SHOWN = {"frozen": 1.0, "plain": 1.4, "ours-torch": 0.7, "peft": 2.8}
# Runs in the page before its own script: errors are kept, and written into the page at the end for --dump-dom.
RECORD = """<script>
window.faults = [];
window.addEventListener("error", event => window.faults.push(event.message));
for (const level of ["error", "warn"]) console[level] = (...words) => window.faults.push(words.join(" "));
</script>"""
DRIVE = """<script>
const column = name => [...document.querySelectorAll("#layers th")].find(th => th.textContent === name);
const rows = () => [...document.querySelectorAll("#layers tbody tr")];
const texts = name => rows().map(tr => tr.cells[column(name).cellIndex].textContent);
const found = {providers: [texts("provider")]};
for (const name of ["/ frozen", "/ frozen", "provider"]) {
  column(name).querySelector("button").click();
  found.providers.push(texts("provider"));
}
found.sorts = [...document.querySelectorAll("#layers th:not([aria-sort=none])")].map(th => th.ariaSort);
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const bars = [...document.querySelectorAll(".fill")].slice(0, 3);
found.bars = bars.map(bar => [bar.className, bar.getBoundingClientRect().width]);
found.images = [...document.images].map(image => image.complete && image.naturalWidth > 0);
found.faults = window.faults;
document.body.dataset.found = JSON.stringify(found);
</script>"""


def full_result() -> Result:
    """Layers at several M and reaches, a model, its growth, and one refused provider."""
    made = result(SHOWN, FakeClock(1))
    for m in (2048, 4096):
        for measured in result(SHOWN, FakeClock(m)).measurements:
            measured.case, measured.shape["m"] = str(CASE.replace(m=m)), m
            made.measurements.append(measured)
    for reach in (1, 2, 4):
        for name, factor in (("plain", 1.0 + reach / 4), ("ours-torch", 1.1)):
            made.measurements.append(row(name, Method("block", reach), lambda r, f=factor: filled(r, f)))
    for value in (1, 2):
        for name in ("plain", "ours"):
            measured = ModelMeasurement("tiny llama", "pre_num", value, name, "block-1", TIMED, rounds=5)
            measured.seconds, measured.per_second, measured.settings = [0.1, 0.2, 0.3], 5.0, {"shortcut": "block"}
            made.models.append(measured)
    made.measurements.append(Measurement("standard", str(CASE), "planted", "lora", REFUSED, "wrong <dA> & more"))
    return made


def filled(measured: Measurement, factor: float) -> None:
    for phase in ("forward", "backward", "both"):
        measured.seconds[phase] = [factor] * 3
        measured.times_frozen[phase], measured.noise[phase] = factor, 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    write_report(full_result(), where)
    return where


def test_a_speed_up_and_a_slowdown_by_two_are_equally_long(folder: Path) -> None:
    bars = {bar.label: bar for bar in figures.bars(full_result().measurements[:4])}
    assert {name: round(bar.speedup, 6) for name, bar in bars.items()} == {"ours-torch lora": 2.0, "peft lora": 0.5}
    page = (folder / "report.html").read_text()
    assert len(re.findall(r'class="fill faster"\s+style="width: 25.0%"', page)) >= 1
    assert len(re.findall(r'class="fill slower"\s+style="width: 25.0%"', page)) >= 1


def test_it_is_one_file_with_every_figure(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page) and "@import" not in page and "url(" not in page
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"speedup", "over-m", "over-pre-num", "memory", "roofline", "error", "growth"}
    assert page.count("data:image/png;base64,") == 2 * len(names)  # light and dark
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "wrong &lt;dA&gt; &amp; more" in page and "Measured on a CPU" in page


def test_a_result_without_figures_has_a_report_too(tmp_path: Path) -> None:
    empty = full_result()
    empty.measurements, empty.models, empty.rates, empty.stopped = [], [], {}, "interrupted"
    (page,) = write_report(empty, tmp_path)
    assert "Not measured in this run" in page.read_text() and "interrupted" in page.read_text()


@pytest.mark.slow
def test_the_command_writes_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_result().write(tmp_path / "cpu.json")
    assert main(["bench", "report", str(tmp_path / "cpu.json")]) == 0
    assert (tmp_path / "cpu" / "report.html").is_file() and "speedup.png" in capsys.readouterr().out


def open_in_browser(page: str, folder: Path, *options: str) -> dict[str, object]:
    """What the page found out about itself, see DRIVE."""
    driven = page.replace("<head>", f"<head>{RECORD}").replace("</body>", f"{DRIVE}</body>")
    path = folder / "driven.html"
    path.write_text(driven)
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    finished = processes.run(command)
    assert "CONSOLE" not in finished.stderr, finished.stderr
    dumped = re.search(r'data-found="([^"]*)"', finished.stdout)
    assert dumped, finished.stdout[-2000:] + finished.stderr[-2000:]
    found: dict[str, object] = json.loads(html.unescape(dumped[1]))
    return found


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 500], ids=["desktop", "phone"])
@pytest.mark.slow
def test_it_opens_in_a_browser_and_sorts(width: int, folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text()
    found = open_in_browser(page, tmp_path, f"--window-size={width},1000")
    assert found["faults"] == [] and all(found["images"]) and found["overflow"] <= 0
    as_written, ascending, descending, by_name = found["providers"]
    assert ascending[0] == "ours-torch" and ascending[-1] == "peft"
    assert descending[0] == "peft" and descending[-1] == "ours-torch"
    assert by_name == sorted(as_written) and len(by_name) == len(as_written) == 18
    assert found["sorts"] == ["ascending"]
    assert all(width > 1 for _, width in found["bars"])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_a_fault_in_the_page_would_be_noticed(folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text().replace("</script>\n</body>", "missing.call();</script>\n</body>")
    with pytest.raises(AssertionError, match=r"CONSOLE|data-found|missing"):
        found = open_in_browser(page, tmp_path)
        assert found["faults"] == [], found["faults"]
