"""`hessjax prune`: a problem's network with fewer weights."""

import json as json_text
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from hessjax._core import _files
from hessjax._report._html import brief
from hessjax._report._problem import Problem
from hessjax._report._pruned_files import make_room, write_all
from hessjax._report._pruning import Outcome, at_once, by_recipe, curvature_of, numbers, to_loss
from hessjax._report._record import to_json
from hessjax.cli._analyze import print_line
from hessjax.cli._live import console_for
from hessjax.cli._load import load_problem
from hessjax.pruning._ranking import check_sparsity


class Wish(NamedTuple):
    """How a network is to be pruned: one of the first three.

    Attributes:
        recipe: a YAML file to train under.
        sparsity: zeros at once.
        rise: as many as this rise of the loss allows.
        steps: updates under the recipe.
        seed: of the probes of the curvature.
    """

    recipe: Path | None
    sparsity: float | None
    rise: float | None
    steps: int | None
    seed: int


def run_pruning(target: str, out: Path, wish: Wish, *, force: bool, json: bool, quiet: bool) -> None:
    """Load, prune, write, show."""
    _check(wish)
    console, out = console_for(json, quiet or json), _files.local_path("out", out)
    problem = load_problem(target)
    make_room(out, force)
    dense = numbers(problem, problem.params)
    record = write_all(problem, _pruned(problem, wish, console), dense, out, target)
    if json:
        print(json_text.dumps(to_json(record), ensure_ascii=False))
        return
    before, after = record["before"], record["after"]
    print_line(console, f"{record['how']}: loss {brief(before['loss'], 4)} to {brief(after['loss'], 4)}")
    for name, value in before["metrics"].items():
        print_line(console, f"{name} {brief(value, 4)} to {brief(after['metrics'].get(name), 4)}")
    print_line(console, f"Written to {out}: {', '.join(record['files'])}, report.html, report.json")


def _check(wish: Wish) -> None:
    given = [
        name
        for name, x in zip(("--recipe", "--sparsity", "--to-loss"), wish[:3], strict=True)
        if x is not None
    ]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise ValueError(f"one of `--recipe`, `--sparsity` and `--to-loss` must be given, got {told}.")
    if wish.sparsity is not None:
        check_sparsity(wish.sparsity, argument="--sparsity")


def _pruned(problem: Problem, wish: Wish, console: Console) -> Outcome:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pruning" if wish.recipe else "curvature", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if wish.recipe is not None:
            return by_recipe(problem, wish.recipe.expanduser(), wish.steps, tell)
        curvature = curvature_of(problem, wish.seed, tell)
        if wish.sparsity is not None:
            return at_once(problem, wish.sparsity, curvature)
        assert wish.rise is not None
        return to_loss(problem, wish.rise, curvature)
