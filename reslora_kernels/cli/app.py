"""The typer application: global options, commands that are imported only when they run, errors as one line."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperGroup

from reslora_kernels._version import __version__

COMMANDS = {
    "doctor": "What is installed, built and working on this machine, and how to fix each gap.",
    "bench": "Measure speed, memory and accuracy against other libraries; compare runs; draw a report.",
    "demo": "Train, merge, export and compare all shortcuts on a small language model; write a report.",
    "finetune": "Fine-tune a Transformers model on your data.",
    "plan": "Say what each of N GPUs would hold and send while a model trains, by layout.",
    "inspect": "Show which layers of a model are adapted, their chains and backends, and which are not.",
    "merge": "Merge an adapter into its base model and save the model.",
    "export": "Export an adapter as a PEFT LoRA adapter.",
    "verify": "Check every backend of this machine against the golden vectors.",
}
HOMES = {"export": "merge", "verify": "doctor"}  # the modules of commands that have none of their own
EXPECTED = (ImportError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)  # of safetensors: a full disk


class CommandGroup(TyperGroup):
    """Lists ``COMMANDS`` without importing them; resolves to the real command when it is about to run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except EXPECTED as error:
            if ctx.params["debug"]:
                raise
            fail(str(error) or type(error).__name__)
            raise typer.Exit(2) from None


def load_command(name: str) -> Any:
    """The command called ``name``: the function of that name in its module, or that module's ``application``."""
    module = importlib.import_module(f"reslora_kernels.cli.{HOMES.get(name, name)}")
    if hasattr(module, "application"):
        return typer.main.get_command(module.application)
    single = typer.Typer(add_completion=False)
    single.command(name)(getattr(module, name))
    return typer.main.get_command(single)


def fail(message: str) -> None:
    """One line on stderr, whatever line breaks the message has."""
    typer.echo(f"reslora: error: {' '.join(message.split())}", err=True)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reslora_kernels {__version__}")
        raise typer.Exit()


application = typer.Typer(cls=CommandGroup, add_completion=False, pretty_exceptions_enable=False)


@application.callback(context_settings={"help_option_names": ["-h", "--help"]})
def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """ResLoRA: fine-tune with residual shortcuts between LoRA adapters, merge, and serve as plain LoRA."""


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status. Without arguments it shows the help."""
    command = typer.main.get_command(application)
    try:
        status = command.main(args=arguments or ["--help"], prog_name="reslora", standalone_mode=False)
    except typer.TyperException as error:  # a command line that cannot be parsed
        fail(error.format_message())
        return 2
    except typer.Abort:
        fail("aborted")
        return 2
    return status if isinstance(status, int) else 0
