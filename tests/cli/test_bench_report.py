"""The report: one file that needs nothing else, opened in a real browser where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from reslora_kernels.bench import series
from reslora_kernels.bench.cases import Method
from reslora_kernels.bench.report import write_report
from reslora_kernels.bench.results import REFUSED, TIMED, Measurement, ModelMeasurement, Result
from reslora_kernels.cli import main

from .fake_clock import CASE, FakeClock, result, row

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
TIMES = {"frozen": 1.0, "plain": 1.4, "ours-torch": 0.7, "peft": 2.8}
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
    made = result(TIMES, FakeClock(1))
    for m in (2048, 4096):
        for measured in result(TIMES, FakeClock(m)).measurements:
            measured.case, measured.shape["m"] = str(CASE.replace(m=m)), m
            made.measurements.append(measured)
    for reach in (1, 2, 4):
        for name, factor in (("plain", 1.0 + reach / 4), ("ours-torch", 1.1)):
            made.measurements.append(row(name, Method("block", reach), lambda r, f=factor: fill(r, f)))
    for value in (1, 2):
        for name in ("plain", "ours"):
            measured = ModelMeasurement("tiny llama", "pre_num", value, name, "block-1", TIMED, rounds=5)
            measured.seconds, measured.per_second, measured.settings = [0.1, 0.2, 0.3], 5.0, {"shortcut": "block"}
            made.models.append(measured)
    made.measurements.append(Measurement("standard", str(CASE), "planted", "lora", REFUSED, "wrong <dA> & more"))
    return made


def fill(measured: Measurement, factor: float) -> None:
    for phase in ("forward", "backward", "both"):
        measured.seconds[phase] = [factor] * 3
        measured.times_frozen[phase], measured.noise[phase] = factor, 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    write_report(full_result(), where)
    return where


def test_a_speed_up_and_a_slowdown_by_two_are_equally_long(folder: Path) -> None:
    bars = {bar.label: bar for bar in series.bars(full_result().measurements[:4])}
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
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_a_fault_in_the_page_would_be_noticed(folder: Path, tmp_path: Path) -> None:
    page = (folder / "report.html").read_text().replace("</script>\n</body>", "missing.call();</script>\n</body>")
    with pytest.raises(AssertionError, match=r"CONSOLE|data-found|missing"):
        found = open_in_browser(page, tmp_path)
        assert found["faults"] == [], found["faults"]
