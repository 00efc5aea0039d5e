"""Markdown tables from result files, so that no number of them is typed by hand.

python -m benchmarks.tables RESULT.json             print the table of one result file
python -m benchmarks.tables --pages PAGE.md ...     write the newest results' tables between the markers

A page has the tables for which it has markers; each kind stands on one of the pages at least. Figures go beside their
results. What no result file holds is shown as not yet measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence import report as convergence
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.runs import read_all, read_lines, read_step_times
from benchmarks.convergence.settings import BASELINE, SHORTCUTS
from benchmarks.convergence.summary import (
    Comparison,
    compared,
    description_of,
    every_final_run,
    gradient_ratios,
    mean_update,
    over_tasks,
    summarize,
)
from reslora_kernels.bench import results as bench
from reslora_kernels.bench.figures import Figure, by_case, draw_all, label, timed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def layers_table(path: Path) -> str:
    """One row per shortcut; the machine, versions and commit under it."""
    result: dict[str, Any] = json.loads(path.read_text())
    rows = [
        "| shortcut | time / frozen linears | speed-up over plain layers | over PEFT LoRA | 20-80 % of rounds |",
        "|---|---|---|---|---|",
    ]
    benchmarks = [benchmark for benchmark in result["benchmarks"] if "shortcut" in benchmark["extra_info"]]
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        rows.append(
            f"| {_title(info['shortcut'], info['pre_num'])} | {info['times_frozen']:.2f} | "
            f"{info['speedup_over_plain']:.2f}x | {info['speedup_over_peft']:.2f}x | "
            f"{info['seconds_20'] * 1e3:.0f}-{info['seconds_80'] * 1e3:.0f} ms |"
        )
    machine, commit = result["machine_info"], result["commit_info"]
    first = benchmarks[0]
    rows.append(
        f"\nForward and backward, {first['extra_info']['shape']}; medians of {first['stats']['rounds']} interleaved "
        f"rounds. {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{commit['id'][:10]} ([{path.name}](benchmarks/results/{path.name}))."
    )
    return "\n".join(rows)


def demo_table(path: Path) -> str:
    """One row per run of ``reslora demo``: losses, and what each merge adds."""
    result: dict[str, Any] = json.loads(path.read_text())
    rows = [
        "| run | last loss | steps to LoRA's | added by merge `input` | `weights` | `least_squares` | step / frozen |",
        "|---|---|---|---|---|---|---|",
    ]
    settings, machine = result["settings"], result["machine"]
    for run in result["runs"]:
        added = {merge["method"]: f"{merge['loss_added']:+.4f}" for merge in run["merges"]}
        merges = [
            added.get(name, "exact" if "exact" in added else "-") for name in ("input", "weights", "least_squares")
        ]
        reached = run["steps_to_reach_lora"]
        name = "LoRA" if run["baseline"] else _title(run["shortcut"], settings["pre_num"])
        rows.append(
            f"| {name} | {run['last_loss']:.4f} | {'not reached' if reached is None else f'{reached:.0f}'} | "
            f"{' | '.join(merges)} | {run['step_time']['relative']:.2f} |"
        )
    rows.append(
        f"\nByte-level LLaMA, {settings['layers']} layers of width {settings['hidden_size']}, r = {settings['r']} on "
        f"{settings['target_modules']}, {settings['finetuning_steps']} steps from English prose to Python source, loss "
        f"in nats per byte on held-out modules ({result['runs'][0]['first_loss']:.4f} before), one seed: "
        f"differences of a few thousandths are no ranking. {machine['processor']}, {machine['torch_threads']} threads, "
        f"torch {machine['torch']}, commit {result['commit'][:10]} ([{path.name}](benchmarks/results/{path.name}))."
    )
    return "\n".join(rows)


def convergence_table(folder: Path) -> str:
    """Of a folder of convergence runs: how the shortcuts learn, and what merging costs, a row for each task."""
    parts = [f"{convergence.table(section)}\n\n{section.text}" for section in convergence.in_short(folder)]
    link = f"[the report](benchmarks/results/{folder.name}/REPORT.md)"
    return "\n\n".join([*parts, f"Everything else, and what it was measured on: {link}."])


def shortcuts_table(folder: Path) -> str:
    """Is a shortcut better than LoRA? From all tasks of a folder of convergence runs, and all pretrained ones."""
    small = list(read_all(folder).values())
    over = {found.method: found for found in over_tasks(summarize(small, read_step_times(folder)))}
    tests = compared(small, every_final_run(small), [(method, BASELINE) for method in SHORTCUTS], "loss")
    lines = [["", *(f"`{method}`" for method in SHORTCUTS)]]
    own = (over[method] for method in SHORTCUTS)
    shares = (f"{100 * one.mean:+.1f} % ({100 * one.low:.1f} to {100 * one.high:.1f})" for one in own)
    lines.append(["taken off the loss beside LoRA, as a share of what LoRA takes off: small models", *shares])
    lines += _counts("small models", tests)
    if path := newest("pretrained"):
        lines += _counts("pretrained models", _beside_lora(read_lines(path)))
    return (
        f"{_markdown(lines)}\n\nThe mean over the tasks with a 95 % interval; paired tests over the seeds, corrected "
        "by Holm for a set's number of tests. Parameters and batches are the same, rates tuned for each method."
    )


def _counts(models: str, tests: list[Comparison]) -> list[list[str]]:
    """On how many tasks a shortcut's loss is below LoRA's, and on how many it is so, or above, after the correction."""
    of = [[one for one in tests if one.method.split("-")[0] == shortcut] for shortcut in SHORTCUTS]
    below = (f"{sum(one.difference < 0 for one in own)} of {len(own)}" for own in of)
    sure = [[one.difference < 0 for one in own if one.corrected < 0.05] for own in of]
    different = (
        f"{sum(lower)} and {len(lower) - sum(lower)} of {len(own)}" for lower, own in zip(sure, of, strict=True)
    )
    return [
        [f"tasks with a lower loss than LoRA's: {models}", *below],
        [f"tasks where it is significantly lower, and higher: {models}", *different],
    ]


def _beside_lora(lines: list[dict[str, Any]]) -> list[Comparison]:
    """The losses of the shortcuts alone, each in its family; one with another rank or rate is the same task."""
    results, found = [line for line in lines if "spec" in line], []
    for family in (family for line in lines for family in line.get("compared", ())):
        if "loss" in family["figures"]:
            found += compared(results, family["tasks"], family["pairs"], "loss")
    own = {SHORTCUTS[0], *(f"{shortcut}-1" for shortcut in SHORTCUTS)}
    return [
        one for one in found
        if one.method in own and one.beside == BASELINE and not re.search(r"-(r\d+|svamp-rates)$", one.task)
    ]  # fmt: skip


def comparisons_table(path: Path) -> str:
    """Of a file of convergence runs that says what is compared: a table for each ``compared`` of its lines."""
    lines = read_lines(path)
    results = [line for line in lines if "spec" in line]
    parts = [_comparisons(results, family) for line in lines for family in line.get("compared", ())]
    parts.append(
        "Means after the last step; in brackets the mean difference between runs with the same seed, p of a paired "
        "t-test, and p after Holm's correction over all losses of a table, or all its other figures: bold below 0.05. "
        + _where_from(results, path)
    )
    return "\n\n".join(parts)


def _comparisons(results: list[dict[str, Any]], family: dict[str, Any]) -> str:
    """Whichever are more go down: the methods, or the tasks' figures."""
    of_task = {result["spec"]["task"]: result for result in results}
    pairs, alike = family["pairs"], len({beside for _, beside in family["pairs"]}) == 1
    names = [METHODS[method].title + ("" if alike else f" / {METHODS[beside].title}") for method, beside in pairs]
    lines, seeds = [["", *([METHODS[pairs[0][1]].title] if alike else []), *names]], set()
    for figure in family["figures"]:
        found = compared(results, family["tasks"], pairs, figure)
        for task in family["tasks"]:
            own = [comparison for comparison in found if comparison.task == task]
            title, steps = of_task[task]["task"]["title"], of_task[task]["budget"]["steps"]
            base = [_figure(own[0].besides, figure)] if alike else []
            cells = [_comparison(comparison, figure) for comparison in own]
            lines.append([f"{title}, {steps} steps, {own[0].figure.replace('_', ' ')}", *base, *cells])
            seeds |= {str(comparison.seeds) for comparison in own}
    if len(lines) < len(lines[0]):
        lines = [list(line) for line in zip(*lines, strict=True)]
    return f"**{family['title']}**, {' or '.join(sorted(seeds))} seeds:\n\n{_markdown(lines)}"


def _comparison(one: Comparison, figure: str) -> str:
    difference = f"{one.difference:+.3f}" if figure == "loss" else f"{100 * one.difference:+.1f}"
    corrected = f"**{one.corrected:.2g}**" if one.corrected < 0.05 else f"{one.corrected:.2g}"
    return f"{_figure(one.mean, figure)} ({difference}; {one.p:.2g}; {corrected})"


def _figure(value: float, figure: str) -> str:
    return f"{value:.3f}" if figure == "loss" else f"{value:.1%}"


def updates_table(path: Path) -> str:
    """Of the same runs: held-out loss before and after each merge, and the size of updates and of gradients."""
    results = [line for line in read_lines(path) if "spec" in line]
    ways = {
        "the paper's two": ("input", "weights"), "least squares": ("least_squares",), "in sequence": ("sequential",),
        "joint, or exact": ("joint", "exact"), "served by PEFT": ("served",), "in bfloat16": ("served in bfloat16",),
    }  # fmt: skip
    steps = [str(step) for step in results[0]["budget"]["gradient_steps"]]
    merged = [["held-out loss", "before", *ways]]
    moved = [["", "rate", "norm of ΔW", "effective rank", *(f"gradient, step {step}" for step in steps)]]
    for methods in every_final_run(results).values():
        for method in (method for method in METHODS if method in methods):
            runs = methods[method]
            title = f"{description_of(methods)['title']}, {METHODS[method].title}"
            first, update = next(iter(runs.values())), mean_update(runs)
            if own := [run for run in runs.values() if run["merges"]]:
                loss = {way: statistics.mean(run["merges"][way]["loss"] for run in own) for way in own[0]["merges"]}
                cells = (" / ".join(f"{loss[way]:.4f}" for way in names if way in loss) for names in ways.values())
                merged.append([title, f"{statistics.mean(run['final']['loss'] for run in own):.4f}", *cells])
            if any(first["gradient_norms"].values()):
                size = [f"{update['norm']:.2f}", f"{update['effective_rank']:.1f}"] if update else ["", ""]
                ratios = gradient_ratios(runs, methods[BASELINE]) if method != BASELINE else {}
                cells = ("{:.2f} / {:.2f}".format(*ratios[step]) if step in ratios else "" for step in steps)
                moved.append([title, f"{first['spec']['rate']:g}", *size, *cells])
    return "\n\n".join(
        [
            _markdown(merged),
            "Means over the seeds that were merged, most often the first; the paper's two are `input` and `weights`.",
            _markdown(moved),
            "The learning rate; ΔW's Frobenius norm, and exp of the entropy of its singular values' shares, where it "
            "is one matrix; the gradient's norm at the adapters to that of LoRA with the same seed, in the first third "
            f"of the layers / in the last. {_where_from(results, path)}",
        ]
    )


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return convergence.table(convergence.Section("", header=tuple(lines[0]), rows=[tuple(line) for line in lines[1:]]))


def _where_from(results: list[dict[str, Any]], path: Path) -> str:
    machine, commits = results[0]["machine"], sorted({str(result["commit"][0])[:10] for result in results})
    return (
        f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, commit {', '.join(commits)} "
        f"([{path.name}](benchmarks/results/{path.name}))."
    )


def bench_table(path: Path) -> str:
    """Of one result of ``reslora bench`` or of the GPU check: a row for each case, one for each model, one figure."""
    result = bench.read(path)
    rows = [*_bench_rows(result), "", *_model_rows(result)]
    machine = result.machine
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    driver = f"driver {machine['driver']}, " if machine["driver"] else ""
    rows.append(
        f"\nForward and backward of all layers relative to the frozen ones in the same rounds (medians), ± what that "
        f"may be off by. {device}, {driver}torch {machine['torch']}, commit {(result.commit or 'unknown')[:10]}"
        f"{' with changes' if result.uncommitted_changes else ''} "
        f"([{path.name}](benchmarks/results/{path.name}))."
    )
    for figure in shown_figures(result):
        rows.append(f"\n![{figure.alt}](benchmarks/results/{image_of(path, figure).name})")
    return "\n".join(rows)


def host_table(path: Path) -> str:
    """Of a result of ``reslora bench --set host``: microseconds a layer, and ours over PEFT, in each mode."""
    result = bench.read(path)
    modes = {"no grad": "forward, no gradients", "training": "forward + backward", "compiled": "the same, compiled"}
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in result.measurements:
        if row.shape["mode"] in modes and row.least:
            name = "PEFT LoRA" if row.provider == "peft" else f"{row.provider} {row.method}".strip()
            cells.setdefault((row.provider, name), {})[row.shape["mode"]] = (
                row.least["both"] / row.shape["layers"] * 1e6
            )
    peft = next((found for (provider, _), found in cells.items() if provider == "peft"), {})
    rows = [f"| microseconds a layer (/ PEFT) | {' | '.join(modes.values())} |", "|---|" + "---|" * len(modes)]
    for (provider, name), found in cells.items():
        whole = {} if "without launches" in provider else peft  # Python's part of a call is not compared with a call
        shown = [_host_cell(found.get(mode), whole.get(mode)) for mode in modes]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    machine = result.machine
    rows.append(
        f"\nLayers so small that arithmetic is nothing, the least of interleaved runs; hand-written is the plainest "
        f"`autograd.Function` for LoRA. {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
        f"commit {(result.commit or 'unknown')[:10]} ([{path.name}](benchmarks/results/{path.name}))."
    )
    return "\n".join(rows)


def _host_cell(value: float | None, peft: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" + (f" ({value / peft:.2f})" if peft else "")


def shown_figures(result: bench.Result) -> list[Figure]:
    """Of a CPU; the table says it all of a GPU."""
    return [] if result.machine["gpu"] else [f for f in draw_all(result) if f.name in SHOWN_FIGURES]


def image_of(path: Path, figure: Figure) -> Path:
    return path.with_name(f"{path.stem}-{figure.name}.png")


def _bench_rows(result: bench.Result) -> list[str]:
    names = ["plain block-1", "peft lora", "peft-float32 lora", "ours lora", "ours block-1"]
    rows = [
        "| layers, / frozen | plain `block` | PEFT LoRA | PEFT LoRA, float32 adapters | ours, LoRA | ours, `block` |",
        "|---|---|---|---|---|---|",
    ]
    for case, group in by_case(timed(result)).items():
        found = {label(row).replace("ours-torch", "ours"): row for row in group if row.provider != "ours-triton"}
        found |= {label(row): row for row in group if row.provider == "ours"}
        cells = [
            _ratio(found[name].times_frozen["both"], found[name].noise["both"]) if name in found else "–"
            for name in names
        ]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return rows


def _model_rows(result: bench.Result) -> list[str]:
    groups: dict[str, dict[str, bench.ModelMeasurement]] = {}
    for row in result.models:
        if row.status == bench.TIMED and row.times_frozen is not None:
            name = row.provider if row.method in ("", "lora") else f"{row.provider} shortcut"
            groups.setdefault(row.key[0], {})[name] = row
    if not groups:
        return []
    rows = ["| training step, / frozen model | plain | PEFT LoRA | ours, LoRA | ours | ours, per second |"]
    rows.append("|---|---|---|---|---|---|")
    for name, found in groups.items():
        order = ("plain shortcut", "peft", "ours", "ours shortcut")
        cells = [_ratio(found[key].times_frozen, found[key].noise) if key in found else "–" for key in order]
        last = found.get("ours shortcut")
        rate = f"{last.per_second or 0:,.0f} {last.unit}" if last is not None else "–"
        rows.append(f"| {name} | {' | '.join(cells)} | {rate} |")
    return rows


def _ratio(value: float | None, noise: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ± {value * (noise or 0):.2f}"


TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-layers": layers_table,
    "demo-cpu": demo_table,
    "convergence-cpu": convergence_table,
    "convergence-cpu, shortcuts": shortcuts_table,
    "pretrained": comparisons_table,
    "pretrained, updates": updates_table,
    "gates-cpu": comparisons_table,
    "host-cpu": host_table,
    "bench-cpu": bench_table,
    "bench-gpu": bench_table,
}
SHOWN_FIGURES = ("speedup", "over-pre-num")
NOT_MEASURED = "Not measured yet."


def newest(kind: str) -> Path | None:
    """The latest result of a kind; None if there is none."""
    stem = kind.split(",")[0]
    if kind.startswith("convergence-"):
        return max((path for path in RESULTS.glob(f"{stem}-*") if path.is_dir()), default=None)
    if not kind.startswith("bench-"):
        return max(RESULTS.glob(f"{stem}-*.json*"), default=None)
    found = []
    for path in RESULTS.glob("*.json"):
        try:
            result = bench.read(path)
        except ValueError:  # a result of another kind
            continue
        if result.settings.get("sets") in (["host"], ["experts"]):  # too small for arithmetic, and no linears
            continue
        if bool(result.machine["gpu"]) == (kind == "bench-gpu") and result.rows():
            found.append((result.date, path.stat().st_mtime, path))
    return max(found)[-1] if found else None


def with_tables(page: Path) -> str:
    """The text of a page with the newest table of each kind that it has markers for."""
    text = page.read_text()
    up = "../" * len(page.resolve().parent.relative_to(ROOT).parts) if page.resolve().is_relative_to(ROOT) else ""
    for kind in kinds_of(text):
        path = newest(kind)
        filled = NOT_MEASURED if path is None else TABLES[kind](path).replace("](benchmarks/", f"]({up}benchmarks/")
        text = _markers(kind).sub(lambda match, filled=filled: f"{match[1]}{filled}\n{match[2]}", text)  # type: ignore[misc]
    return text


def kinds_of(text: str) -> list[str]:
    """The kinds of table that a page has markers for."""
    return [kind for kind in TABLES if _markers(kind).search(text)]


def _markers(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {kind}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def write_pages(pages: Sequence[Path]) -> None:
    """Write the tables of all pages, and the figures that they show.

    Raises:
        SystemExit: a kind of table stands on none of them.
    """
    missing = set(TABLES) - {kind for page in pages for kind in kinds_of(page.read_text())}
    if missing:
        raise SystemExit(f"{', '.join(map(str, pages))} have no markers for {', '.join(sorted(missing))}")
    for page in pages:
        page.write_text(with_tables(page))
    for path in filter(None, (newest("bench-cpu"), newest("bench-gpu"))):
        for figure in shown_figures(bench.read(path)):
            image_of(path, figure).write_bytes(figure.png["light"])


def table_of(path: Path) -> str:
    """The table of a result file, whichever kind it is."""
    if path.suffix == ".jsonl":
        return comparisons_table(path)
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") in (bench.FORMAT, bench.GPU_CHECK):
        return host_table(path) if content["settings"].get("sets") == ["host"] else bench_table(path)
    return demo_table(path) if "runs" in content else layers_table(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--pages", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.pages is not None:
        write_pages(arguments.pages)
    else:
        print(table_of(arguments.result or newest("cpu-layers") or parser.error("no result; give one")))


def _title(shortcut: str, pre_num: int) -> str:
    return shortcut if shortcut in ("none", "input") else f"{shortcut}, pre_num {pre_num}"


if __name__ == "__main__":
    main()
