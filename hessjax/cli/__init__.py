"""The command `hessjax`."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from hessjax.cli._interrupt import interruptible, quiet
from hessjax.cli._tour import EarlierResultError
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
    force: Annotated[bool, typer.Option("--force", help="Remove an earlier result in the folder.")] = False,
) -> None:
    """Train a small network on handwritten digits, measure its curvature, prune it to 90 % zeros."""
    matplotlib.use("agg")  # figures are drawn in a thread, which can open no window
    out = out.expanduser()
    kept = f"the parts that were done are in `{out}`; the same command with `--force` begins anew"
    try:
        interruptible(lambda: run_tour(out, quick=quick, seed=seed, force=force), kept)
    except BrokenPipeError as error:  # the reader, `head` say, has enough; it is not the folder's fault
        quiet()
        raise typer.Exit(1) from error
    except EarlierResultError as error:
        told = f"`{out}` holds an earlier result: `--force` removes it first, `--out` takes another folder"
        print(f"hessjax: {told}", file=sys.stderr)
        raise typer.Exit(2) from error
    except OSError as error:
        print(f"hessjax: cannot write to `{out}`: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(2) from error
