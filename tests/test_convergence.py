"""The convergence benchmarks: runs are resumable and repeatable, and the report says what the runs say."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from benchmarks.convergence import measures, runs, settings, summary
from benchmarks.convergence.__main__ import app
from benchmarks.convergence.methods import METHODS, UNGATED, adapted, base_of
from benchmarks.convergence.report import write_report
from benchmarks.convergence.settings import Sizes
from benchmarks.convergence.tasks import TASKS, images, language, sources

SIZES = Sizes(
    hidden_size=32, intermediate_size=48, layers=2, sequence=32, batch=2, pretraining_steps=4, pretraining_rate=1e-3
)  # fmt: skip
BUDGET = settings.Budget(
    methods=("lora", "middle", "adalora"), steps=6, evaluations=2, batch=2, held_out=4, rates=(5e-3, 1e-2),
    calibration_batches=2, calibration_batch=2, warmup_steps=2,
)  # fmt: skip
TINY = settings.Experiments(
    name="tiny",
    sizes={"decoder": SIZES, "encoder": SIZES, "unet": dataclasses.replace(SIZES, hidden_size=16, layers=1)},
    budgets={
        "python": BUDGET,
        "code": dataclasses.replace(BUDGET, methods=("lora", "input"), rates=(1e-2,)),
        "slanted": dataclasses.replace(BUDGET, methods=("lora", "block"), rates=(1e-2,)),
    },
    seeds=(0, 1),
)
CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
APPEND_MANY = """
import sys
from pathlib import Path
from benchmarks.convergence.runs import append
for i in range(40):
    append({"name": sys.argv[2], "i": i, "long": "x" * 20_000}, Path(sys.argv[1]))
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(settings.SETS, "tiny", TINY)


def run(folder: Path, *more: str) -> str:
    result = CliRunner().invoke(app, ["run", "--set", "tiny", "--device", "cpu", "--out", str(folder), *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_set_runs_resumes_and_reports(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    file = tmp_path / runs.FILE
    first = file.read_text().splitlines(keepends=True)
    count = 3 * (2 * 2 + 2) + 2 * (2 + 2)  # methods times rates' runs and seeds, or seeds alone
    assert len(first) == count + 3 * 2 * 2  # and again with their merges, but for AdaLoRA's
    spec = runs.Spec("python", "middle", 0.01, settings.TUNING_SEED)
    (lost,) = (line for line in first if json.loads(line)["spec"] == dataclasses.asdict(spec))
    kept = [line for line in first if line != lost]
    file.write_text("".join(kept) + lost[:100])  # killed while it wrote
    run(tmp_path, "--tasks", "python")
    *others, last = file.read_text().splitlines(keepends=True)
    again = json.loads(last)
    assert others == kept and again["curve"] == json.loads(lost)["curve"]
    assert not runs.missing(TINY, TASKS, tmp_path, tuning=False)
    other = dataclasses.replace(TINY, budgets={"python": dataclasses.replace(BUDGET, steps=7)})
    with pytest.raises(ValueError, match=r"other settings \(budget.steps\)"):
        runs.missing(other, TASKS, tmp_path, tuning=True)
    if (Path(__file__).parents[1] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", again["commit"][0])
    rows = summary.summarize(list(runs.read_all(tmp_path).values()), runs.read_step_times(tmp_path))
    assert len(rows) == 3 + 2 + 2
    for name in ("REPORT.md", "report.html"):
        report = (tmp_path / name).read_text()
        for row in rows:
            assert f"{row.loss:.4f} ± {row.spread:.4f}" in report
        assert "Accuracy before and after merging" in report and "F1 before and after merging" in report
        shown = set(re.findall(r"[a-z]+\.png", report))
        assert shown == {f"{name}.png" for name in ("learning", "merging", "layers", "samples")}
        assert all((tmp_path / figure).stat().st_size > 3000 for figure in shown)
    more = dataclasses.replace(TINY.budgets["code"], methods=("lora", "block-1"))
    monkeypatch.setitem(settings.SETS, "tiny", dataclasses.replace(TINY, budgets={"code": more}))
    run(tmp_path)  # a method that comes later is timed with those that are there
    assert runs.read_step_times(tmp_path)["code"].keys() == {"lora", "input", "block-1"}
    assert "ResLoRA block, 1" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.slow
def test_processes_append_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    command = [sys.executable, "-c", APPEND_MANY, str(path)]
    processes = [subprocess.Popen([*command, name], cwd=Path(__file__).parents[1]) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    found = runs.read_lines(path)
    assert [one["i"] for one in sorted(found, key=lambda one: (one["name"], one["i"]))] == [*range(40)] * 3
    assert {len(one["long"]) for one in found} == {20_000}


def test_a_crash_in_a_line_loses_no_other(tmp_path: Path) -> None:
    path, one, two = tmp_path / "all.jsonl", {"a": [1.5, "é"]}, {"b": None}
    assert runs.read_lines(path) == []
    runs.append(one, path)
    whole, line = path.read_bytes(), json.dumps(two).encode()
    for end in range(len(line) + 1):
        path.write_bytes(whole + line[:end])
        found = [one, two] if end == len(line) else [one]  # whole but for its line feed
        assert runs.read_lines(path) == found
        runs.append(two, path)
        assert runs.read_lines(path) == [*found, two] and path.read_bytes().startswith(whole)
    for bad in (b'{"a": \n', b"7\n"):
        path.write_bytes(whole + bad + whole)
        with pytest.raises(ValueError, match=r"all\.jsonl, line 2 must be a JSON object"):
            runs.read_lines(path)


@pytest.mark.slow
@pytest.mark.skipif(not RESULTS.exists(), reason="the sdist has no results")
def test_the_committed_report_is_that_of_the_committed_runs(tmp_path: Path) -> None:
    folders = [path.parent for path in RESULTS.glob(f"*/{runs.FILE}")]
    assert folders
    for folder in folders:
        for name in (runs.FILE, runs.STEP_TIMES):
            shutil.copy(folder / name, tmp_path)
        write_report(tmp_path)
        report = (folder / "REPORT.md").read_text()
        assert (tmp_path / "REPORT.md").read_text() == report
        assert {path.name for path in folder.glob("*.png")} == set(re.findall(r"\((\S+\.png)\)", report))


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.slow
def test_every_task_is_the_same_for_the_same_seed_and_shows_its_figures(task: str, tmp_path: Path) -> None:
    own, sizes = TASKS[task], TINY.sizes[TASKS[task].kind]
    first, again, other = (own.train(sizes, 1, 3, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    held_out = own.held_out(sizes, 4)
    base = base_of(own, dataclasses.replace(sizes, pretraining_steps=1), tmp_path, CPU)
    figures = own.figures(base, held_out)
    assert figures["loss"] == pytest.approx(own.loss(base, held_out).item(), rel=1e-4)
    assert set(own.metrics) <= figures.keys() | own.final_figures(base, held_out).keys()


def test_every_method_has_the_rank_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, task = base_of(TASKS["python"], SIZES, tmp_path, CPU), TASKS["python"]
    assert "r" not in task.description()
    monkeypatch.setattr(task, "r", 2)
    assert task.description()["r"] == 2
    for method, r in {"lora": 2, "middle": 2, "rslora": 2, "pissa": 2, "adalora": 3, "lora-8": 8}.items():
        model = adapted(base, task, method, 20, 0)
        shapes = {tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
        assert {shape[0] for shape in shapes} == {r}, method


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method in ("lora", "block", "middle-all-gates") else pytest.mark.slow)
        for method in [*sorted(UNGATED), "input-scalar", "block-gates-0", "middle-all-gates"]
    ],
)
def test_every_method_learns_and_starts_from_the_base_model(method: str, tmp_path: Path) -> None:
    base, task = base_of(TASKS["python"], SIZES, tmp_path, CPU), TASKS["python"]
    steps = dataclasses.replace(BUDGET, steps=12, evaluations=1)
    experiments = dataclasses.replace(TINY, budgets={"python": steps})
    spec = runs.Spec("python", method, 1e-2 / (METHODS[method].ratio or 1), settings.TUNING_SEED)
    result = runs.train_one(base, task, experiments, spec, tmp_path)
    untrained = adapted(base, task, method, steps.steps, 0).eval()
    with torch.no_grad():
        loss = task.loss(untrained, task.held_out(SIZES, BUDGET.held_out)).item()
    assert result["curve"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]


def test_gradient_norms_are_those_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["python"]
    model = adapted(base_of(task, SIZES, tmp_path, CPU), task, "input", 1, 0)
    monkeypatch.setattr(measures, "GRADIENT_EXAMPLES", 11)
    norms = measures.gradient_norms(model, task, task.held_out(SIZES, 12), 8)  # in two pieces
    batch = {name: tensor[:11] for name, tensor in task.held_out(SIZES, 12).items()}
    task.loss(model, batch).backward()
    for name, layer in measures.adapted_layers(model).items():
        expected = torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()]).norm().item()
        assert norms[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_texts_held_out_are_not_trained_on() -> None:
    for source in (sources.docstrings, sources.lines, sources.sentence_pairs):
        split = source()
        train, held_out = ({text for text, _ in part} for part in split)
        assert not train & held_out and len(held_out) > 100
        assert len({label for _, label in split.held_out}) == len({label for _, label in split.train}) > 1


def test_styles_change_the_digits_and_the_classifier_knows_them() -> None:
    upright = images._digits()[1][0]
    assert torch.equal(images.inverted(upright), -upright)
    slanted = images.slanted(upright)
    assert slanted.shape == upright.shape and slanted.min() >= -1 and slanted.max() <= 1
    for name in ("inverted", "slanted"):
        task = TASKS[name]
        drawn, labels = task._styled(1)
        assert (task._classifier.predict(drawn.flatten(1).numpy()) == labels.numpy()).mean() > 0.9


def test_problems_have_their_answers() -> None:
    generator = random.Random(0)
    for _ in range(50):
        question, answer = language.problem(generator)
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if "buys" in question:
            expected = numbers[0] + numbers[1]
        elif "gives" in question:
            expected = numbers[0] - numbers[1]
        else:
            expected = 2 * numbers[0] + numbers[1]
        assert int(answer) == expected >= 0
        assert len(question + answer) <= language.PROBLEM_BYTES


def curve(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "loss": loss} for i, loss in enumerate(losses)]


def result(method: str, seed: int, last: float, rate: float = 0.01, added: float = 0.0) -> dict[str, Any]:
    own = curve(4.0, last)
    return {
        "spec": {"task": "python", "method": method, "rate": rate, "seed": seed}, "curve": own, "final": own[-1],
        "trained_parameters": 7, "merges": {"joint": {"loss": last + added}},
    }  # fmt: skip


def test_seeds_that_never_reach_loras_loss_count_last() -> None:
    loras = [result("lora", seed, 2.0) for seed in range(4)]
    for lasts, reached, steps in (((1, 1, 1, 3), 3, 20 / 3), ((1, 3, 3, 3), 1, None)):
        own = [result("block", seed, last) for seed, last in enumerate(lasts)]
        block = summary.summarize(loras + own, {"python": {"lora": 1.0, "block": 1.0}})[1]
        assert block.reached == reached and block.steps == (steps and pytest.approx(steps))


def test_the_share_that_a_merge_loses_is_of_a_gain_beyond_noise() -> None:
    for lasts, lost in (((2.0, 1.0), 0.08), ((5.0, 1.0), None)):  # gains of 2 and 3; of -1 and 3
        runs_of_lora = [result("lora", seed, last, added=0.2) for seed, last in enumerate(lasts)]
        share = summary.summarize(runs_of_lora, {"python": {"lora": 1.0}})[0].lost("joint")[0]
        assert math.isnan(share) if lost is None else share == pytest.approx(lost)


def test_a_rate_is_judged_by_all_its_tuning_runs(tmp_path: Path) -> None:
    losses = {0.01: (1.0, 4.0), 0.02: (2.0, 2.0), 0.04: (math.nan, 1.0)}
    budget = dataclasses.replace(BUDGET, rates=tuple(reversed(losses)))
    experiments = dataclasses.replace(TINY, budgets={"python": budget})
    first = settings.TUNING_SEED
    found = [result("lora", first + i, loss, rate) for rate, own in losses.items() for i, loss in enumerate(own)]
    for one in found:
        runs.append(one, tmp_path / runs.FILE)
    assert runs.best_rate(experiments, runs.read_all(tmp_path), "python", "lora") == 0.02
    tried = summary.rates_tried(found)["python"]
    assert tried["lora", 0.01][0] == 2.5 and math.isnan(tried["lora", 0.04][0])


def test_holms_correction() -> None:
    assert summary.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert summary.holm([0.6, 0.5]) == [1.0, 1.0] and summary.holm([]) == []


def test_families_of_comparisons() -> None:
    """Each pair by the seeds that both have, whatever others lack; p of the paired differences, then Holm's."""
    losses = {"lora": (2.0, 2.1, 2.2, 2.3), "block": (1.9, 1.9, 2.1), "input": (2.2, 2.0, 2.3, 2.3), "dora": (2.0, 2.1)}
    results = [result(method, seed, last) for method, own in losses.items() for seed, last in enumerate(own)]
    pairs = [("block", "lora"), ("input", "lora"), ("input", "block")]
    found = summary.compared(results, ["python"], pairs, "loss")
    for one, seeds in zip(found, (3, 4, 3), strict=True):
        own, theirs = losses[one.method][:seeds], losses[one.beside][:seeds]
        assert (one.seeds, one.figure) == (seeds, "loss")
        assert (one.mean, one.besides) == pytest.approx((statistics.mean(own), statistics.mean(theirs)))
        differences = [a - b for a, b in zip(own, theirs, strict=True)]
        t = statistics.mean(differences) / (statistics.stdev(differences) / math.sqrt(seeds))
        assert one.difference == pytest.approx(statistics.mean(differences))
        assert one.p == pytest.approx(2 * stats.t.sf(abs(t), seeds - 1))
    assert [one.corrected for one in found] == summary.holm([one.p for one in found])
    assert (
        summary.compared(results, ["python"], [("block", "lora")], "headline")[0].figure == "loss"
    )  # no other is there
    with pytest.raises(ValueError, match=r"'dora' and 'lora' must have three seeds in common, got \[0, 1\]"):
        summary.compared(results, ["python"], [("dora", "lora")], "loss")


def test_what_a_shortcut_takes_off_over_tasks() -> None:
    """Shares of 10, 20 and 30 %: mean 20 %, standard error 10 / √3 %, t of 2 degrees 4.303."""
    results = []
    for task, loss in (("python", 1.9), ("code", 1.8), ("order", 1.7)):
        for method, last in (("lora", 2.0), ("block-1", loss), ("lora-16", 1.0)):
            own = result(method, 0, last) | {"curve": curve(3.0, last)}
            results.append(own | {"spec": own["spec"] | {"task": task}})
    times = {task: dict.fromkeys(("lora", "block-1", "lora-16"), 1.0) for task in ("python", "code", "order")}
    (found,) = summary.over_tasks(summary.summarize(results, times))
    assert found.method == "block-1" and found.shares == pytest.approx([0.1, 0.2, 0.3])
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, -0.0484, 0.4484), abs=1e-4)
    assert found.better == 3 and found.p == pytest.approx(0.25)


def test_ranks_of_an_update(tmp_path: Path) -> None:
    """Orthonormal A and B of all layers but for B's first column, which is twice as long in one."""
    task = TASKS["python"]
    for method, layers in (("lora", 1), ("block-1", 2)):
        model = adapted(base_of(task, SIZES, tmp_path, CPU), task, method, 1, 0)
        last = [layer for name, layer in measures.adapted_layers(model).items() if name.endswith("1.self_attn.q_proj")]
        with torch.no_grad():
            for name, layer in measures.adapted_layers(model).items():
                own = torch.eye(max(layer.lora_A.shape[1], layer.lora_B.shape[0]))[4 * (".1." in name) :]
                layer.lora_A.copy_(own[:4, : layer.lora_A.shape[1]])
                layer.lora_B.copy_(own[:4, : layer.lora_B.shape[0]].mT)
            last[0].lora_B[:, 0] *= 2
        (found,) = (own for name, own in measures.update_ranks(model).items() if name.endswith("1.self_attn.q_proj"))
        shares = torch.tensor([2.0] + [1.0] * (4 * layers - 1)) / (4 * layers + 1)
        assert found["rank"] == 4 * layers
        assert found["norm"] == pytest.approx(2 * math.sqrt(4 + 4 * layers - 1))  # alpha / r is 2
        assert found["effective_rank"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert measures.update_ranks(adapted(base_of(task, SIZES, tmp_path, CPU), task, "middle", 1, 0)) == {}


def test_crossings_and_paired_tests() -> None:
    falling = curve(4.0, 2.0, 1.0)
    assert summary.crossing(falling, 1.5) == 15
    assert summary.crossing(falling, 4.5) == 0
    assert summary.crossing(falling, 0.5) is None
    assert summary.loss_at(falling, 15) == 1.5 and summary.loss_at(falling, 90) == 1.0

    results = [result("lora", s, 2 + s / 10) for s in range(3)] + [result("block", s, 1.9 + s / 9) for s in range(3)]
    lora, block = summary.summarize(results, {"python": {"lora": 1.0, "block": 2.0}})
    assert (lora.method, lora.p, lora.difference, lora.seconds) == ("lora", None, 0, 10)
    assert block.difference == pytest.approx(-0.1 + 1 / 9 - 1 / 10)
    assert block.p is not None and block.p < 0.05 and block.verdict == "better than LoRA"
    assert block.loss_at_loras_time == pytest.approx((4.0 + 1.9 + 1 / 9) / 2)  # five of its ten steps
    with pytest.raises(ValueError, match=r"block: final runs with rates \[0.01, 0.02\]"):
        summary.summarize([*results, result("block", 3, 1.0, 0.02)], {"python": {"lora": 1.0, "block": 2.0}})
    two = summary.summarize(results[:-1], {"python": {"lora": 1.0, "block": 2.0}})
    assert [row.seeds for row in two] == [2, 2]  # of an unfinished set what can be compared
    assert summary.final_runs(results[:2] + results[5:]) == {}
    with pytest.raises(ValueError, match="no step times of block"):
        summary.summarize(results, {"python": {"lora": 1.0}})
    with pytest.raises(ValueError, match="no final run of 'lora'"):
        summary.summarize(results[3:], {"python": {"block": 2.0}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "huge"], "--set must be one of quick, cpu, controls, gates, gpu, got 'huge'"),
        (["--tasks", "python,chess"], "--tasks must be of python"),
        (["--model", "x"], "--model and --data go together"),
        (["--model", "x", "--data", "y", "--methods", "lora,best"], "got 'best'"),
        (["--model", "x", "--data", "y", "--rates", "fast"], "--rates must be numbers above 0"),
        (["--model", "x", "--data", "y", "--dtype", "int8"], "--dtype must be one of"),
        (["--kind", "oracle", "--model", "x", "--data", "y"], "kind must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", *options, "--out", str(tmp_path / "new")])
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and message in said, said
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="has no runs"):
        write_report(tmp_path)
