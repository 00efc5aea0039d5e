"""python -m benchmarks.gpu_check                    build, correctness, Hopper, sanitizer, speed, in nine minutes
python -m benchmarks.gpu_check --part correctness    one part (repeatable), also tune, which it leaves out
python -m benchmarks.gpu_check --ready               whether this interpreter has all that the check needs

Runs in whatever interpreter starts it. The part build installs this package there, in place, with its CUDA extension;
the others install nothing. One JSON file with the machine, driver, versions, commit and every figure is written after
each part; `reslora bench report` and `compare` read it. What a part has found so far, test by test and case by case, is
in a folder beside it, which goes when the check is through. Exit status 1 where a part failed.

--rehearse goes through the motions without a GPU: its tests are some that hang, crash and take their time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import outcomes, parts
from benchmarks.gpu_check.steps import write

NEEDED = ("torch", "triton", "pytest", "pytest_timeout", "rich", "typer", "safetensors")
RESULTS = parts.ROOT / "benchmarks" / "results"
# Part, and the most seconds that it may take of a budget of nine minutes.
SHARES = {"build": 180.0, "correctness": 120.0, "hopper": 110.0, "sanitizer": 50.0, "speed": 540.0, "tune": 540.0}
DEFAULT_PARTS = ("build", "correctness", "hopper", "sanitizer", "speed")  # by what would be learnt
FULL_BUDGET = 540.0
RUNNING = "running"
REHEARSED = tuple(f"benchmarks/gpu_check/rehearsal.py::Test{name}" for name in ("Hangs", "Crashes", "IsSlow"))


def missing_modules() -> list[str]:
    """What the check needs and this interpreter does not have."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main(arguments: Sequence[str] | None = None, run: parts.Runner = parts.run_child) -> int:
    options = _options(arguments)
    if missing := missing_modules():
        print(f"gpu-check: {sys.executable} has no {', '.join(missing)}", file=sys.stderr)
        return 1
    if options.ready:
        return 0
    if options.commit:
        os.environ["RESLORA_COMMIT"] = options.commit
    machine, commit, changed = describe(options.rehearse)
    if not machine["gpu"] and not options.rehearse:
        print(
            "gpu-check needs a CUDA GPU that torch can use; this machine has none (see: reslora doctor)",
            file=sys.stderr,
        )
        return 1
    started = time.monotonic()
    report: dict[str, Any] = {"format": "reslora gpu check", "machine": machine, "commit": commit}
    report |= {"uncommitted_changes": changed, "date": time.strftime("%Y-%m-%d"), "parts": {}, "speed": None}
    path = options.output or default_path(machine, commit)
    chosen = options.part or list(DEFAULT_PARTS)
    folder = path.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        left = options.budget_seconds - (time.monotonic() - started)
        limit = part_limit(name, chosen, left, options.budget_seconds)
        print(f"== {name}: up to {limit:.0f} s", flush=True)
        begun = time.monotonic()
        report["parts"][name] = {"status": RUNNING, "summary": f"so far in {folder.name}", "seconds": 0.0}
        write(path, report)
        late = parts.Outcome(parts.UNFINISHED, "")
        outcome = execute(name, run, limit, folder, options.rehearse) if limit > 5 else late
        if "result" in outcome.details:
            report["speed"] = outcome.details.pop("result")
        entry = {"status": outcome.status, "summary": outcome.summary, "seconds": round(time.monotonic() - begun, 1)}
        report["parts"][name] = entry | outcome.details
        report["seconds"] = round(time.monotonic() - started, 1)
        write(path, report)
    shutil.rmtree(folder)
    print_summary(report, path)
    return int(any(part["status"] == parts.FAILED for part in report["parts"].values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=list(SHARES), help="repeatable")
    parser.add_argument("--budget-seconds", type=float, default=FULL_BUDGET)
    parser.add_argument("--output", type=Path, help="result file; default: benchmarks/results/gpu-check-...json")
    parser.add_argument("--commit", help="of the files, where they were copied without their history")
    parser.add_argument("--ready", action="store_true", help="exit 0 if nothing is missing in this interpreter")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions on a machine without a GPU")
    return parser.parse_args(arguments)


def part_limit(name: str, chosen: Sequence[str], left: float, budget: float) -> float:
    """Seconds for a part: what is left, but where others follow no more than its share of the budget."""
    if name == chosen[-1]:
        return left
    return min(left, SHARES[name] * budget / FULL_BUDGET)


def execute(name: str, run: parts.Runner, limit: float, folder: Path, rehearse: bool) -> parts.Outcome:
    if name == "build" and rehearse:
        return parts.Outcome(parts.SKIPPED, "no GPU to build for")
    if name == "correctness" and rehearse:
        return as_planted(parts.correctness(run, min(limit, 30.0), folder, REHEARSED, test_seconds=3.0))
    if name == "speed" and rehearse:
        return parts.speed(run, limit, folder, ("first",), "cpu")
    every: dict[str, Callable[[parts.Runner, float, Path], parts.Outcome]] = {
        "build": parts.build,
        "correctness": parts.correctness,
        "sanitizer": parts.sanitizer,
        "speed": parts.speed,
        "hopper": parts.hopper,
        "tune": parts.tune,
    }
    return every[name](run, limit, folder)


def as_planted(outcome: parts.Outcome) -> parts.Outcome:
    """Of the rehearsal's tests one fails, one hangs and one crashes: passed if just that was found."""
    found = {name: outcome.details[name] for name in (outcomes.FAILED, outcomes.ENDED)}
    right = found == {outcomes.FAILED: 1, outcomes.ENDED: 2} and outcome.details["unfinished"] == [REHEARSED[-1]]
    summary = f"{'as' if right else 'not as'} planted: {outcome.summary}"
    return parts.Outcome(parts.PASSED if right else parts.FAILED, summary, outcome.details)


def describe(rehearse: bool) -> tuple[dict[str, Any], str | None, bool | None]:
    """Machine and commit. This process looks at the GPU and starts nothing on it."""
    import torch

    from reslora_kernels.bench import results

    device = torch.device("cuda" if torch.cuda.is_available() and not rehearse else "cpu")
    return results.machine_of(device), *results.commit_of(results.SOURCE)


def default_path(machine: dict[str, Any], commit: str | None) -> Path:
    """gpu-check-<gpu>-<date>-<commit>.json among the results; a later run of the day takes a number."""
    slug = "".join(c if c.isalnum() else "-" for c in (machine["gpu"] or "cpu").lower())
    stem = f"gpu-check-{slug}-{time.strftime('%Y-%m-%d')}-{(commit or 'unknown')[:10]}"
    path, number = RESULTS / f"{stem}.json", 2
    while path.exists():
        path, number = RESULTS / f"{stem}-{number}.json", number + 1
    return path


def print_summary(report: dict[str, Any], path: Path) -> None:
    """A short table, last of all that is printed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    machine = report["machine"]
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"\n{machine['gpu'] or machine['cpu']}, driver {machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, commit {(report['commit'] or 'unknown')[:10]}",
        highlight=False,
    )
    table = Table("part", "status", "seconds", "found")
    for name, part in report["parts"].items():
        table.add_row(name, part["status"], f"{part['seconds']:.0f}", escape(part["summary"]))
    console.print(table)
    if report["speed"]:
        console.print(goals_table(report["speed"]))
        for table in model_tables(report["speed"]):
            console.print(table)
    console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def goals_table(speed: dict[str, Any]) -> Any:
    """The first cases of the standard set: times relative to the frozen linears', for ours and the main peers."""
    from rich.table import Table

    table = Table("case", "provider", "forward", "backward", "both", title="Time relative to the frozen linears")
    rows = [row for row in speed["measurements"] if row["set"] in ("first", "standard", "peers", "small-m", "quick")]
    for row in rows:
        if row["status"] == "timed" and row["times_frozen"] and row["method"] in ("lora", "block-1"):
            ratios = [f"{row['times_frozen'][phase]:.3f}" for phase in ("forward", "backward", "both")]
            table.add_row(row["case"], f"{row['provider']} {row['method']}", *ratios)
    return table


def model_tables(speed: dict[str, Any]) -> list[Any]:
    """A training step of each model, with what others publish for one like it."""
    from reslora_kernels.bench.report import model_table
    from reslora_kernels.bench.results import ModelMeasurement

    rows = [ModelMeasurement(**row) for row in speed["models"]]
    return [model_table(name, list(group)) for name, group in groupby(rows, key=lambda row: row.key[0])]


if __name__ == "__main__":
    raise SystemExit(main())
