"""``reslora demo``: a tiny run of the real thing, what its report says, and every input it refuses before training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from reslora_kernels import load_adapter
from reslora_kernels.adapt.record import adapted_layers
from reslora_kernels.cli import demo as command
from reslora_kernels.cli import main
from reslora_kernels.cli.demo import fine_tuning
from reslora_kernels.cli.demo.fine_tuning import QUICK, Curve, Settings, adapted, evaluate, new_model, steps_to_reach

for library in command.LIBRARIES:
    pytest.importorskip(library)

TINY = QUICK.replace(
    name="tiny",
    hidden_size=32,
    intermediate_size=64,
    layers=3,
    sequence=48,
    pretraining_steps=60,
    pretraining_rate=1e-2,
    finetuning_steps=20,
    evaluations=4,
    evaluation_sequences=24,
    calibration_batches=4,
    timing_rounds=2,
    sample_bytes=16,
)
PNGS = ("loss_curves.png", "merging.png")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command.run_demo(TINY, folder)
    return folder


@pytest.fixture
def report(demo_run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((demo_run / "report.json").read_text())
    return values


def run_of(report: dict[str, Any], shortcut: str) -> dict[str, Any]:
    return next(run for run in report["runs"] if run["shortcut"] == shortcut)


def test_runs_are_compared_on_equal_terms(report: dict[str, Any]) -> None:
    runs = report["runs"]
    assert [run["shortcut"] for run in runs] == ["none", "input", "block", "middle"]
    assert len({run["trainable_parameters"] for run in runs}) == 1
    assert {run["first_loss"] for run in runs} == {report["base"]["python_loss"]}  # B is zero: the base model's
    for run in runs:
        assert run["curve"]["steps"] == [0, 5, 10, 15, 20]
        assert (run["first_loss"], run["last_loss"]) == (run["curve"]["losses"][0], run["curve"]["losses"][-1])
        assert run["last_loss"] < run["first_loss"]
        assert set(run["chains"].values()) == {TINY.layers}
    shared = [
        {k: v for k, v in adapter.items() if k != "shortcut"} for adapter in report["settings"]["adapters"].values()
    ]
    assert all(adapter == shared[0] for adapter in shared)
    before, after = report["base"]["prose_losses"]
    assert after < before


def test_loss_added_is_merged_minus_unmerged(report: dict[str, Any]) -> None:
    for run in report["runs"]:
        for merge in run["merges"]:
            assert merge["loss_added"] == pytest.approx(merge["loss"] - run["last_loss"], abs=1e-12)


@pytest.mark.parametrize("shortcut", ["none", "block"])
def test_exact_merges_add_nothing(report: dict[str, Any], shortcut: str) -> None:
    (merge,) = run_of(report, shortcut)["merges"]
    assert merge["method"] == "exact"
    assert abs(merge["loss_added"]) < 1e-4


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_least_squares_fits_every_layer_best(report: dict[str, Any], shortcut: str) -> None:
    """On the calibration data this holds for any weights; of the loss it is true in practice only."""
    errors = {merge["method"]: merge["worst_layer"] for merge in run_of(report, shortcut)["merges"]}
    assert errors.keys() == {"input", "weights", "least_squares"}
    assert errors["least_squares"] <= min(errors.values())


@pytest.mark.parametrize("shortcut", ["none", "input", "block", "middle"])
def test_peft_runs_the_export_as_the_merged_model(report: dict[str, Any], shortcut: str) -> None:
    run = run_of(report, shortcut)
    peft = run["peft"]
    assert peft["logit_difference"] < 1e-4 * peft["largest_logit"]
    assert peft["loss"] == pytest.approx(peft["merged_loss"], abs=1e-5)
    assert peft["merged_loss"] == next(m["loss"] for m in run["merges"] if m["method"] == peft["method"])
    assert peft["max_lora_rank"] == (TINY.r * (TINY.pre_num + 1) if shortcut == "block" else TINY.r)


def test_steps_times_and_samples_are_there(report: dict[str, Any]) -> None:
    assert run_of(report, "none")["steps_to_reach_lora"] == TINY.finetuning_steps
    for run in report["runs"]:
        assert run["step_time"]["relative"] > 0
        assert all(len(sample.encode()) >= TINY.sample_bytes for sample in run["samples"])
    assert report["base"]["step_milliseconds"] > 0
    assert {"torch", "transformers", "peft", "python", "cpus"} <= report["machine"].keys()


def test_saved_adapter_gives_the_reported_loss(demo_run: Path, report: dict[str, Any]) -> None:
    from transformers import LlamaForCausalLM

    held_out = fine_tuning.spread_batch(fine_tuning.python_source().held_out, TINY.evaluation_sequences, TINY.sequence)
    for shortcut in ("input", "block"):
        model: Any = LlamaForCausalLM.from_pretrained(demo_run / "base-model")
        load_adapter(model, demo_run / "adapters" / shortcut / "reslora")
        assert evaluate(model, held_out) == pytest.approx(run_of(report, shortcut)["last_loss"], abs=1e-6)


def test_html_is_self_contained(demo_run: Path, report: dict[str, Any]) -> None:
    html = (demo_run / "report.html").read_text()
    assert not any(sign in html for sign in ("http:", "https:", "<script", "<link", "@import", "url("))
    assert html.count("data:image/png;base64,") == 2 * len(PNGS)  # light and dark
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    for run in report["runs"]:
        assert f"{run['last_loss']:.4f}" in html
        assert all(f"{merge['loss']:.4f}" in html for merge in run["merges"])


@pytest.mark.parametrize("name", PNGS)
def test_figure_is_a_png(demo_run: Path, name: str) -> None:
    from PIL import Image

    with Image.open(demo_run / name) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50  # something is drawn


def test_nothing_else_is_left(demo_run: Path) -> None:
    assert [entry.name for entry in demo_run.parent.iterdir()] == [demo_run.name]
    assert sorted(entry.name for entry in demo_run.iterdir()) == sorted((*command.WRITTEN, *command.MODELS))


def test_every_shortcut_starts_from_the_same_a() -> None:
    base = new_model(TINY)
    first, *others = (
        torch.cat([layer.lora_A.flatten() for layer in adapted_layers(adapted(base, shortcut, TINY)).values()])
        for shortcut in TINY.runs
    )
    assert all(torch.equal(first, other) for other in others)


def test_held_out_text_is_not_trained_on() -> None:
    for corpus in (fine_tuning.prose(), fine_tuning.python_source()):
        train, held_out = bytes(corpus.train.tolist()), bytes(corpus.held_out.tolist())
        assert held_out[1000:1300] not in train
        assert len(train) > len(held_out)


@pytest.mark.parametrize(
    ("target", "steps"), [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 15.0), (1.0, 20.0), (0.9, None)]
)
def test_steps_to_reach_interpolates(target: float, steps: float | None) -> None:
    assert steps_to_reach(Curve([0, 10, 20], [4.0, 2.0, 1.0]), target) == steps


def unreachable(*_: object) -> NoReturn:
    pytest.fail("training began")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_experiment", unreachable)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shortcut", "residual"], "--shortcut must be one of input, block, middle, got 'residual'"),
        (["--shortcut", "none"], "--shortcut must be one of input, block, middle, got 'none'"),
        (["--seed", "-1"], "--seed"),
        (["--out", "file"], "--out 'file' is a file"),
        (["--out", "file/below"], "'file/below' cannot be made"),
        (["--out", "."], "must not be the folder you are in"),
        (["--out", ".."], "must not be the folder you are in"),
        (["--out", "mine"], "not an earlier demo's folder"),
        (["--out", "foreign"], "not an earlier demo's folder"),
        (["--out", "earlier"], "holds an earlier demo and 'notes.txt', which would be lost"),
    ],
)
def test_bad_input_is_refused_before_training(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "file": "x",
        "mine/thesis.tex": "x",
        "foreign/report.json": '{"format": "another"}',
        "earlier/report.json": '{"format": "reslora demo"}',
        "earlier/notes.txt": "x",
    }
    for name, content in contents.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert all(Path(name).read_text() == content for name, content in contents.items())


@pytest.mark.usefixtures("no_training")
def test_missing_libraries_are_named_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "jinja2") else find(name))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "reslora: error: the demo needs peft and jinja2, which are not installed; "
        'run: pip install "reslora_kernels[hf,plots]"\n'
    )


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("no memory")], ids=["Ctrl-C", "error"])
def test_a_run_that_ends_early_leaves_the_earlier_report(
    failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings, folder: Path, console: object) -> NoReturn:
        (folder / "half").write_text("written")
        raise failure

    monkeypatch.setattr(command, "run_experiment", fail)
    earlier = tmp_path / "out" / "report.json"
    earlier.parent.mkdir()
    earlier.write_text('{"format": "reslora demo"}')
    status = main(["demo", "--quick", "--out", str(earlier.parent)])
    assert status == (130 if failure is KeyboardInterrupt else 2)
    error = capsys.readouterr().err
    assert "nothing was written" in error if failure is KeyboardInterrupt else "no memory" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "report.json"]


def test_shortcuts_can_be_chosen() -> None:
    assert command.chosen(None) == ("input", "block", "middle")
    assert command.chosen(["middle", "input", "middle"]) == ("input", "middle")
