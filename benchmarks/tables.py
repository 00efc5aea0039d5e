"""Markdown tables from result files, so that no number in README.md is typed by hand.

python -m benchmarks.tables RESULT.json            print the table of one result file
python -m benchmarks.tables --readme README.md     write the newest committed results' tables between the markers
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def layers_table(path: Path) -> str:
    """One row per shortcut; the machine, versions and commit under it."""
    result: dict[str, Any] = json.loads(path.read_text())
    rows = [
        "| shortcut | time / frozen linears | speed-up over plain layers | over PEFT LoRA | 20-80 % of rounds |",
        "|---|---|---|---|---|",
    ]
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        rows.append(
            f"| {_title(info['shortcut'], info['pre_num'])} | {info['times_frozen']:.2f} | "
            f"{info['speedup_over_plain']:.2f}x | {info['speedup_over_peft']:.2f}x | "
            f"{info['seconds_20'] * 1e3:.0f}-{info['seconds_80'] * 1e3:.0f} ms |"
        )
    machine, commit = result["machine_info"], result["commit_info"]
    first = result["benchmarks"][0]
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


TABLES: dict[str, Callable[[Path], str]] = {"cpu-layers": layers_table, "demo-cpu": demo_table}


def newest(kind: str) -> Path:
    """The committed result of a kind with the latest date in its name."""
    found = sorted(RESULTS.glob(f"{kind}-*.json"))
    if not found:
        raise SystemExit(f"no {kind}-DATE.json in {RESULTS}")
    return found[-1]


def write_readme(readme: Path) -> None:
    text = readme.read_text()
    for kind, table in TABLES.items():
        markers = re.compile(rf"(<!-- {kind}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
        if not markers.search(text):
            raise SystemExit(f"{readme} has no markers for {kind}")
        filled = table(newest(kind))
        text = markers.sub(lambda match, filled=filled: f"{match[1]}{filled}\n{match[2]}", text)  # type: ignore[misc]
    readme.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    if arguments.readme is not None:
        write_readme(arguments.readme)
    else:
        result = arguments.result or newest("cpu-layers")
        print((demo_table if "demo" in result.name else layers_table)(result))


def _title(shortcut: str, pre_num: int) -> str:
    return shortcut if shortcut in ("none", "input") else f"{shortcut}, pre_num {pre_num}"


if __name__ == "__main__":
    main()
