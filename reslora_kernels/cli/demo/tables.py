"""The results as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from reslora_kernels.cli.demo.experiment import Results
from reslora_kernels.cli.demo.settings import Settings
from reslora_kernels.cli.demo.wording import added, findings
from reslora_kernels.config import Shortcut


def show_results(results: Results, console: Console) -> None:
    """Two tables and what they say in words."""
    console.print(training_table(results), merging_table(results), sep="\n")
    for finding in findings(results):
        console.print(f"- {finding}", highlight=False)


def training_table(results: Results) -> Table:
    table = Table(title="Fine-tuning: loss on held-out modules, nats per byte", title_justify="left")
    table.add_column("run", no_wrap=True)
    for title in ("pre_num", "trainable", "first loss", "last loss", "steps to LoRA's last", "step / frozen"):
        table.add_column(title, justify="right")
    for run in results.runs:
        reached, time = run.steps_to_reach_lora, run.step_time
        table.add_row(
            run.title,
            pre_num(results.settings, run.shortcut),
            f"{run.trainable_parameters:,}",
            f"{run.curve.losses[0]:.4f}",
            f"{run.curve.losses[-1]:.4f}",
            "not reached" if reached is None else f"{reached:.0f}",
            "-" if time is None else f"{time.relative:.2f}",
        )
    return table


def merging_table(results: Results) -> Table:
    table = Table(title="Merging, and the export in PEFT: rank, largest difference of a logit", title_justify="left")
    table.add_column("run", no_wrap=True)
    table.add_column("merge", no_wrap=True)
    for title in ("merged loss", "loss added", "PEFT rank", "PEFT logits", "PEFT loss"):
        table.add_column(title, justify="right")
    for run in results.runs:
        for merge in run.merges:
            peft = run.peft if run.peft is not None and run.peft.method == merge.method else None
            served = (
                (str(peft.max_lora_rank), f"{peft.logit_difference:.1e}", f"{peft.loss:.4f}") if peft else ("", "", "")
            )
            table.add_row(run.title, merge.method, f"{merge.loss:.4f}", added(merge.loss_added), *served)
    return table


def pre_num(settings: Settings, shortcut: Shortcut) -> str:
    """How many earlier blocks the shortcut uses, where that is a choice."""
    return str(settings.adapter_config(shortcut).pre_num) if shortcut in ("block", "middle") else "-"
