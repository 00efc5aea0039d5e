"""``reslora demo``: train, merge, export and compare all shortcuts on a small language model.

Here are the command's options, checked before the first step of training.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reslora_kernels.cli.demo.experiment import run_experiment
from reslora_kernels.cli.demo.fine_tuning import BASELINE, FULL, QUICK, TITLES, Settings
from reslora_kernels.cli.demo.report import REPORT_NAME, WRITTEN, as_dict, is_report, show_results, write_report
from reslora_kernels.cli.options import check_choice, out_option
from reslora_kernels.cli.output import check_writable, whole_folder
from reslora_kernels.config import Shortcut

MODELS = ("adapters", "base-model")  # folders
LIBRARIES = ("transformers", "peft", "matplotlib", "jinja2")


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model and fewer steps: under a minute.")] = False,
    out: Annotated[Path, out_option("Folder for the report; an earlier demo's folder is replaced.")] = Path(
        "reslora-demo"
    ),
    shortcut: Annotated[
        list[str] | None,
        typer.Option("--shortcut", help="Only this one: input, block or middle. May be repeated; LoRA always runs."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32, help="Of all random numbers.")] = 0,
) -> None:
    """Pre-train a small byte-level LLaMA on English prose, fine-tune it on Python source with plain LoRA and every
    shortcut, merge each in every way, export to PEFT, and report what happened as a table, HTML, PNG and JSON.

    It needs no network and no GPU: all text comes with Python. It takes about three minutes on two CPU cores.
    """
    settings = (QUICK if quick else FULL).replace(seed=seed, shortcuts=chosen(shortcut))
    run_demo(settings, out)


def run_demo(settings: Settings, out: Path) -> None:
    """Everything the command does, for any settings.

    Raises:
        ImportError: an optional library is missing.
        OSError, ValueError: the results cannot be put in ``out``. Nothing was trained then.
        RuntimeError: this Python comes without the text to train on.
    """
    require_libraries()
    check_folder(out)
    console = Console()
    console.print(introduction(settings), highlight=False)
    try:
        with whole_folder(out) as folder:
            results = run_experiment(settings, folder, Console(stderr=True))
            write_report(as_dict(results), folder)
    except KeyboardInterrupt:
        typer.echo(f"reslora: stopped; nothing was written to {out}", err=True)
        raise typer.Exit(130) from None
    show_results(results, console)
    written = [str(out / name) for name in (*WRITTEN, *MODELS)]
    console.print("Written:", *written, sep="\n  ", soft_wrap=True, highlight=False)


def chosen(shortcuts: list[str] | None) -> tuple[Shortcut, ...]:
    """The shortcuts to run, in the demo's order.

    Raises:
        ValueError: there is no such shortcut.
    """
    known = tuple(name for name in TITLES if name != BASELINE)
    for name in shortcuts or ():
        check_choice("--shortcut", name, known)
    return tuple(name for name in known if not shortcuts or name in shortcuts)


def check_folder(out: Path) -> None:
    """Refuse, before any work, a folder whose replacement would fail or lose files that no demo wrote."""
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"--out must not be the folder you are in, or one above it, got {str(out)!r}")
    check_writable("--out", out)
    found = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if found and not is_report(out / REPORT_NAME):
        raise FileExistsError(f"--out {str(out)!r} is not empty and not an earlier demo's folder; give another one")
    if others := sorted(found.difference(WRITTEN, MODELS)):
        raise FileExistsError(f"--out {str(out)!r} holds an earlier demo and {others[0]!r}, which would be lost")


def require_libraries() -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"the demo needs {' and '.join(missing)}, which {verb} not installed; "
            'run: pip install "reslora_kernels[hf,plots]"'
        )


def introduction(settings: Settings) -> str:
    """What is about to happen, in a few lines."""
    targets = settings.target_modules
    pre_num = ", ".join(
        f"{name} with pre_num={settings.adapter_config(name).pre_num}" if name != "input" else name
        for name in settings.shortcuts
    )
    return (
        f"[bold]reslora demo[/bold] ({settings.name}, seed {settings.seed}): a LLaMA of {settings.layers} layers "
        f"of width {settings.hidden_size} over bytes\n"
        f"1. pre-training on English prose (pydoc topics), {settings.pretraining_steps} steps\n"
        f"2. fine-tuning on Python source (standard library), {settings.finetuning_steps} steps, r={settings.r} on "
        f"{targets if isinstance(targets, str) else ', '.join(targets)}: LoRA; shortcuts {pre_num}\n"
        "3. every merge, export to PEFT, step times, samples\n"
    )
