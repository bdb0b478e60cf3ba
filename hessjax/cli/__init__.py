"""The command `hessjax`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from hessjax.cli._tour import tour as run_tour

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"hessjax {version('hessjax')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    show: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The curvature of a network's loss, and the weights it can do without."""


@app.command()
def tour(
    out: Annotated[Path, typer.Option(help="Folder for report.json and the figures.")] = Path("tour-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A short form, under a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the batches and the probes.")] = 0,
) -> None:
    """Train a small network on handwritten digits, measure its curvature, prune it to 90 % zeros."""
    try:
        run_tour(out, quick=quick, seed=seed)
    except OSError as error:
        print(f"hessjax: cannot write to `{out}`: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(2) from error
