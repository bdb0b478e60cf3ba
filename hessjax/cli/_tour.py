"""`hessjax tour`: a network for handwritten digits as a problem, analyzed and pruned, in one page."""

import functools
import json as json_text
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import optax

from hessjax import likelihoods
from hessjax._core import _files
from hessjax._core._types import Params
from hessjax._report._engine import Order, add_pruned, analyze
from hessjax._report._folder import PAGE, check_room
from hessjax._report._plan import Asked
from hessjax._report._problem import Problem
from hessjax._report._prune_engine import Wish, prune
from hessjax._report._record import prepare, to_json
from hessjax.cli import _digits
from hessjax.cli._analyze import print_line, show_answers
from hessjax.cli._digits import BATCH, NETWORK, loss_fn, quality
from hessjax.cli._live import Live, console_for
from hessjax.cli._load import TOUR, alone
from hessjax.flax import linen_model

RECIPE, PRUNED = "recipe.yaml", "pruned"


class Settings(NamedTuple):
    """How much work each part of the tour does.

    Attributes:
        train_steps: of the dense network.
        tune_steps: of fine-tuning; in the first half of them the zeros rise.
        asked: of the report.
    """

    train_steps: int
    tune_steps: int
    asked: Asked


_ASKED = Asked(top=3, density=True, per_layer=True, landscape=True, layers=True, budget=560)
FULL = Settings(500, 800, _ASKED)
QUICK = Settings(300, 400, _ASKED._replace(top=1, budget=340))


def problem(
    settings: Settings = FULL, seed: int = 0, tell: Callable[[int, int], None] | None = None
) -> Problem:
    """The network for handwritten digits, trained for a few seconds: what `hessjax analyze tour` looks at."""
    data = _digits.load()
    images, labels = data.train
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(labels), BATCH)]
    return Problem(
        loss_fn,
        _digits.trained(data, settings.train_steps, seed, tell),
        batches,
        metric=functools.partial(_accuracy, data.test),
        model_fn=linen_model(NETWORK),
        likelihood=likelihoods.categorical,
        optimizer=optax.adamw(optax.cosine_decay_schedule(4e-3, settings.tune_steps), weight_decay=1e-2),
        name="handwritten digits",
    )


def _accuracy(test: Any, params: Params) -> dict[str, float]:
    return {"test accuracy": float(quality(params, test).accuracy)}


def run_tour(out: Path, order: Order, *, short: bool, seed: int, json: bool, quiet: bool) -> None:
    """Train, `analyze`, `prune` by a recipe; one page of it all.

    Args:
        out: the folder: the report, the recipe, and what the pruning leaves in a folder of its own.
        order: what to do about an earlier tour in it.
        short: a short form, for CI.
        seed: of the weights, the batches and the probes.
        json: print the record, and nothing else.
        quiet: print nothing.

    Raises:
        FolderError: if `out` holds something, and `order` does not say what is to be done; before any work.
        OSError: if it cannot be written to, before any work.
    """
    console, settings, out = console_for(json, quiet or json), _SETTINGS[short], _files.local_path("out", out)
    prepare(out)
    check_room(out, order.resume, order.force)
    with alone(json), Live(console).shown() as live:
        network = _network(settings, seed, live)
        report = analyze(network, out, settings.asked._replace(seed=seed), order, live, TOUR)
        wish = Wish(_recipe(out, settings), steps=settings.tune_steps, seed=seed)
        pruned = prune(network, out / PRUNED, wish, live, TOUR, resume=order.resume, force=order.force)
        record = add_pruned(out, report, pruned, PRUNED)
    if json:
        print(json_text.dumps(to_json(record), ensure_ascii=False))
    else:
        show_answers(console, record["reading"])
        print_line(console, f"The page: {out / PAGE}")
        print_line(console, "Your own network: hessjax init")


_SETTINGS = {False: FULL, True: QUICK}


def _network(settings: Settings, seed: int, live: Live) -> Problem:
    """The problem made, which one can watch."""
    start = time.perf_counter()
    live.planned({"training": settings.train_steps})
    live.begun("training")
    found = problem(settings, seed, functools.partial(live.made, "training"))
    accuracy = found.metric(found.params)["test accuracy"] if found.metric else 0.0
    told = f"{settings.train_steps} steps, test accuracy {accuracy:.4f}"
    live.say("The network", told, time.perf_counter() - start)
    return found


def _recipe(out: Path, settings: Settings) -> Path:
    """The recipe, where it can be read and changed."""
    text = resources.files("hessjax.cli").joinpath("templates", "tour.yaml").read_text("utf-8")
    text = text.replace("LAST", str(settings.tune_steps // 2))
    _files.write_whole(out / RECIPE, lambda file: file.write(text.encode()))
    return out / RECIPE
