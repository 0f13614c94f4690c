"""The command `torch-passes`: `optimize | explain | passes | draw | verify`. Starting it needs no torch."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from passes.cli import commands
from passes.errors import PassesError, SlowerWarning
from passes.version import installed_version

FAILED = 2
"""Exit code of every error that torch-passes raises on purpose."""


class _Commands(TyperGroup):
    """Commands whose expected errors are one message on stderr and exit code 2; any other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PassesError as error:
            Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error)))
            raise typer.Exit(FAILED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Optimise PyTorch models for inference: rewrite the graph, check the numbers, write TorchScript.",
)

for _name, _command in commands.COMMANDS.items():
    app.command(_name)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"torch-passes {installed_version()}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def _options(version: Version = False) -> None:
    """Options of the command itself; `--version` is done when it is read."""


def main() -> None:
    """Entry point of the command `torch-passes`."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", category=SlowerWarning)  # the printed report says it
    app(prog_name="torch-passes")
