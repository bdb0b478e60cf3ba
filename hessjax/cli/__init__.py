"""The command `hessjax`."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from hessjax._report._engine import Order
from hessjax._report._plan import Asked
from hessjax.cli._analyze import run_analysis
from hessjax.cli._errors import told
from hessjax.cli._interrupt import interruptible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[
    str, typer.Argument(metavar="MODULE:PROBLEM", help="Where `problem()` is, or `file.py:problem`.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result in the folder.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random vectors.")]


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


ANALYZE = """Examples:

  hessjax init                                   a problem.py to start from

  hessjax analyze problem.py --out report        self-test, trace, eigenvalues, what could be pruned

  hessjax analyze my_pkg.nets:resnet --out r --density --per-layer --minutes 20

  hessjax analyze problem.py --out report --density --resume

Exit codes: 0 done; 1 an unexpected error; 2 refused, with the reason; 3 the self-test failed;
130 interrupted, what was done is kept."""


@app.command(epilog=ANALYZE)
def analyze(
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Eigenvalues from each end of the spectrum.")] = 5,
    density: Annotated[bool, typer.Option("--density", help="The spectral density.")] = False,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="The spectrum of every layer.")] = False,
    landscape: Annotated[bool, typer.Option("--landscape", help="The loss around the weights.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="What each leaf takes part in; K-FAC.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All four of these.")] = False,
    budget: Annotated[int | None, typer.Option(min=1, help="The most products.")] = None,
    minutes: Annotated[float | None, typer.Option(help="The most time.")] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the report in the folder.")] = False,
    force: Force = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on although the self-test failed.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The curvature report of your own network: one page, written part by part."""
    matplotlib.use("agg")  # figures are drawn in a thread, which can open no window
    out = out.expanduser()
    extra = (density or everything, per_layer or everything, landscape or everything, layers or everything)
    asked, order = Asked(top, *extra, budget, minutes, seed), Order(resume, force, anyway)
    kept = f"what was done is in `{out}`; the same command with `--resume` instead of `--force` goes on"
    with told(debug, out):
        interruptible(lambda: run_analysis(target, out, asked, order, json=json, quiet=quiet), kept)


@app.command()
def tour(
    out: Annotated[Path, typer.Option(help="Folder for report.json and the figures.")] = Path("tour-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A short form, under a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the batches and the probes.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Remove an earlier result in the folder.")] = False,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits, measure its curvature, prune it to 90 % zeros."""
    from hessjax.cli._tour import tour as run_tour  # scikit-learn is needed here alone

    matplotlib.use("agg")  # figures are drawn in a thread, which can open no window
    out = out.expanduser()
    kept = f"the parts that were done are in `{out}`; the same command with `--force` begins anew"
    with told(debug, out):
        interruptible(lambda: run_tour(out, quick=quick, seed=seed, force=force), kept)
