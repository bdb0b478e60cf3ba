"""The command `hessjax`."""

import functools
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from hessjax._report._engine import Order
from hessjax._report._plan import Asked
from hessjax._report._prune_engine import Wish
from hessjax.cli._analyze import run_analysis
from hessjax.cli._compare import run_comparison
from hessjax.cli._errors import told
from hessjax.cli._init import Library, write_template
from hessjax.cli._interrupt import interruptible
from hessjax.cli._live import console_for
from hessjax.cli._prune import run_pruning

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[
    str, typer.Argument(metavar="MODULE:PROBLEM", help="Where `problem()` is, `file.py:problem`, or `tour`.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")]
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

  hessjax analyze tour --out report --density    a network for digits, to have a look

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
    resume: Resume = False,
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
    work = functools.partial(run_analysis, target, out, asked, order, json=json, quiet=quiet)
    with told(debug, out):
        interruptible(work, _kept(out))


def _kept(out: Path) -> str:
    return f"what was done is in `{out}`; the same command with `--resume` instead of `--force` goes on"


PRUNE = """Examples:

  hessjax prune problem.py --out small --to-loss 0.02

  hessjax prune problem.py --out small --sparsity 0.8

  hessjax prune problem.py --out small --recipe recipe.yaml

  hessjax prune problem.py --out small --recipe recipe.yaml --resume

Writes the Orbax checkpoint, masks, a sparse file, tables, the smaller network where whole channels went, and
a page of before and after. Exit codes as for `analyze`."""


@app.command(epilog=PRUNE)
def prune(
    target: Target,
    out: Annotated[Path, typer.Option(help="Folder for the pruned network and its report.")],
    recipe: Annotated[Path | None, typer.Option(help="Train while this YAML file prunes.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="So many zeros at once.")] = None,
    to_loss: Annotated[float | None, typer.Option(help="As many as this rise of the loss allows.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates under the recipe.")] = None,
    seed: Seed = 0,
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Your network with fewer weights: at once, by a rise of the loss, or by a recipe."""
    out = out.expanduser()
    wish, order = Wish(recipe, sparsity, to_loss, steps, seed), Order(resume, force)
    work = functools.partial(run_pruning, target, out, wish, order, json=json, quiet=quiet)
    with told(debug, out):
        interruptible(work, _kept(out))


COMPARE = """Examples:

  hessjax compare report-sgd report-adam --out compare.html

  hessjax compare step-100 step-1000 step-9000"""


@app.command(epilog=COMPARE)
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of `hessjax analyze`.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
    steps: Annotated[str, typer.Option(help="Training steps, `0,100,200`; else by the names.")] = "",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Reports side by side in one page: networks, or checkpoints over training."""
    out = out.expanduser()
    console = console_for(json, quiet or json)
    with told(debug, out):
        run_comparison([x.expanduser() for x in folders], out, steps, json=json, console=console)


@app.command(epilog="Example:\n\n  hessjax init problem.py --library nnx")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("problem.py"),
    library: Annotated[Library, typer.Option(help="What the network is written in.")] = "linen",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented problem to start from."""
    path = path.expanduser()
    with told(debug):
        write_template(path, library, force)
        typer.echo(f"Written to {path}. Next: hessjax analyze {path} --out report")


TOUR = """Examples:

  hessjax tour                         the page is tour-out/report.html

  hessjax tour --out digits --resume   after Ctrl-C or a kill

What it does by itself: `hessjax analyze tour`, then `hessjax prune tour --recipe recipe.yaml`."""


@app.command(epilog=TOUR)
def tour(
    out: Annotated[Path, typer.Option(help="Folder for the page and all else.")] = Path("tour-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A short form.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the batches and the probes.")] = 0,
    resume: Resume = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """A network for handwritten digits: trained, its curvature measured, pruned to 90 % zeros; one page."""
    from hessjax.cli._tour import run_tour  # scikit-learn is needed here alone

    matplotlib.use("agg")  # figures are drawn in a thread, which can open no window
    out = out.expanduser()
    work = functools.partial(
        run_tour, out, Order(resume, force), short=quick, seed=seed, json=json, quiet=quiet
    )
    with told(debug, out):
        interruptible(work, _kept(out))
