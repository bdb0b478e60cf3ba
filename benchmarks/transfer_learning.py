"""How accurate is a pretrained encoder that has learned a task and is then pruned while it trains on?"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import downloads
import fine_tuning
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import table

import hessjax as hj
from hessjax import plot

plt.switch_backend("agg")

KERNELS = "encoder/*/kernel"


class Settings(NamedTuple):
    """Of all runs.

    Attributes:
        steps: of a run that prunes; the last four tenths at the final sparsity.
        dense_steps: of the dense network, from which the others begin, and which teaches them.
        left: the shares of the encoder's weights that are left, the first run first.
        batch: sentences in a step.
        every: updates between two masks. Where scores learn it has to be few: the gradient then answers to a
            mask that is out of date, and with 10 the scores may run away.
        rate: the highest learning rate of the encoder's matrices while they are pruned.
        small_rate: the same of all else: biases, LayerNorms, the classifier.
        dense_rate: the same of the dense network.
        score_rate: the first learning rate of movement's scores, a share of their size in a leaf; it falls to
            0 along a line.
        published_rate: the same of the scores that begin at zero, in Adam's steps (arXiv 2005.07683).
        sentences: how many of them are used for training, and for testing; None: all.
        length: tokens of a sentence, longer ones are cut.
        layers: of the encoder.
    """

    steps: int = 800
    dense_steps: int = 450
    left: tuple[float, ...] = (0.03, 0.15)
    batch: int = 16
    every: int = 2
    rate: float = 1e-4
    small_rate: float = 1e-3
    dense_rate: float = 5e-5
    score_rate: float = 5e-3
    published_rate: float = 1e-2
    sentences: int | None = None
    length: int = 32
    layers: int = 6


QUICK = Settings(8, 4, left=(0.03,), batch=8, sentences=200, length=16, layers=1)


def measure(quick: bool) -> table.Measured:
    settings = QUICK if quick else Settings()
    raw = unfinished(settings, quick)
    task = fine_tuning.problem(settings.layers, settings.length, settings.sentences)
    raw |= {"num_test": len(task.test.labels), "no encoder": fine_tuning.errors_without_encoder(task)}
    task = fine_tuned(task, settings, raw)
    for name, run in runs(task, settings):
        if name not in raw["runs"]:
            print(f"{name} ...", flush=True)
            raw["runs"][name] = run()
            table.keep(__doc__, measure, quick, figures(raw), raw, grid(raw))
            draw(raw, table.folder(quick) / "transfer_learning.png")
    return figures(raw), {**raw, "finished": True}, grid(raw)


def runs(task: fine_tuning.Task, settings: Settings) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and run of every method at every share of weights left."""
    rate, published = (
        optax.linear_schedule(x, 0.0, settings.steps) for x in (settings.score_rate, settings.published_rate)
    )
    by_leaf = optax.lars(rate, trust_coefficient=1.0, momentum=0.0)
    methods = {
        "magnitude": hj.saliencies.magnitude(),
        "movement from magnitudes": hj.saliencies.movement(by_leaf, start=hj.saliencies.from_magnitudes),
        "movement as published": hj.saliencies.movement(optax.adam(published), start=jnp.zeros_like),
    }
    for left, (name, saliency) in itertools.product(settings.left, methods.items()):
        yield f"{name}, {left:.0%} left", functools.partial(row, task, settings, saliency, left)


def row(task: fine_tuning.Task, settings: Settings, saliency: hj.saliencies.Saliency, left: float) -> Any:
    """What is kept of one run."""
    found = fine_tuning.train(task, pruning(settings, saliency, left), settings.steps, settings.batch)
    kernels = [
        layer["kernel"]
        for part in found.params["encoder"].values()
        for layer in part.values()
        if "kernel" in layer
    ]
    left = sum(int(jnp.count_nonzero(x)) for x in kernels) / sum(x.size for x in kernels)
    return {"left": left, **kept(found)}


def kept(found: fine_tuning.Trained) -> dict[str, Any]:
    """All but the params; the rows in one line, not one line each."""
    wrong = " ".join(map(str, found.wrong))
    return {"errors": found.curve[-1][1], "wrong": wrong, "curve": found.curve, "seconds": found.seconds}


def pruning(
    settings: Settings, saliency: hj.saliencies.Saliency, left: float
) -> optax.GradientTransformation:
    """The same training for every saliency: AdamW, and a cubic schedule between two rests.

    In the second the number of zeros rests, not where they are.
    """
    begin, end = round(0.02 * settings.steps), round(0.6 * settings.steps)
    return hj.prune(
        fine_tuning.adamw(settings.rate, settings.small_rate, settings.steps),
        saliency,
        optax.polynomial_schedule(0.0, 1 - left, 3, end - begin, begin),
        allocation=hj.allocations.uniform(),
        where=KERNELS,
        every=settings.every,
    )


def fine_tuned(task: fine_tuning.Task, settings: Settings, raw: dict[str, Any]) -> fine_tuning.Task:
    """From the dense network, which has learned the task, and taught by it; it also writes its row."""
    path = downloads.CACHE / f"fine_tuned_{settings.layers}_layers_{len(task.train.labels)}_sentences.npz"
    if "dense" not in raw or not path.exists():
        tx = fine_tuning.adamw(settings.dense_rate, 10 * settings.dense_rate, settings.dense_steps)
        found = fine_tuning.train(task, tx, settings.dense_steps, settings.batch)
        hj.save_npz(path, found.params)
        raw["dense"] = kept(found)
    params = hj.load_npz(path, like=task.params)
    return task._replace(params=params, teacher=fine_tuning.all_logits(task, params, task.train))


# -- what is kept and shown ----------------------------------------------------------------------


def unfinished(settings: Settings, quick: bool) -> dict[str, Any]:
    """The rows of a run of the same settings that was cut off; otherwise none."""
    fresh = {"settings": json.loads(json.dumps(settings._asdict())), "finished": False, "runs": {}}
    for result in [] if quick else table.load(quick, [Path(__file__).stem]):
        raw = result["raw"]
        same = raw["settings"] == fresh["settings"] and result["device"] == table.machine()["device"]
        if same and not raw["finished"]:
            return raw
    return fresh


def figures(raw: dict[str, Any]) -> list[table.Figure]:
    """Errors of every run, and by how much movement is ahead of magnitude."""
    found = [table.Figure("no encoder, mean word vectors", raw["no encoder"], "% errors")]
    found += [table.Figure("dense", raw["dense"]["errors"], "% errors")]
    found += [table.Figure(name, run["errors"], "% errors") for name, run in raw["runs"].items()]
    for left in raw["settings"]["left"]:
        names = [f"{method}, {left:.0%} left" for method in ("movement from magnitudes", "magnitude")]
        if all(name in raw["runs"] for name in names):
            found.append(ahead(raw, *names))
    return found


def ahead(raw: dict[str, Any], name: str, other: str) -> table.Figure:
    """The difference in errors, and its standard error over the test sentences, which both were asked."""
    wrong, others = (set(raw["runs"][x]["wrong"].split()) for x in (name, other))
    size, mean = raw["num_test"], (len(wrong) - len(others)) / raw["num_test"]
    stderr = 100 * np.sqrt((len(wrong ^ others) / size - mean**2) / size)
    bar = -3.0 if "3%" in name and raw["settings"]["layers"] == 6 else None
    note = f"standard error over the test sentences {stderr:.1f}"
    return table.Figure(f"{name}, less {other}", 100 * mean, "points of errors", bar, note=note)


def grid(raw: dict[str, Any]) -> table.Grid:
    """Accuracy by method and share of weights left."""
    shares = [f"{left:.0%} left" for left in sorted(raw["settings"]["left"], reverse=True)]
    whole = {"dense": raw["dense"]["errors"], "no encoder, mean word vectors": raw["no encoder"]}
    rows = {name: [[100 - errors] for _ in shares] for name, errors in whole.items()}
    for name, run in raw["runs"].items():
        method, share = name.rsplit(", ", 1)
        rows.setdefault(method, [[] for _ in shares])[shares.index(share)] = [100 - run["errors"]]
    return table.Grid("% right, one run each", shares, rows)


def draw(raw: dict[str, Any], path: Path) -> None:
    """Accuracy against weights left, a line for every method."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, run in raw["runs"].items():
        left, accuracy = curves.setdefault(name.rsplit(",", 1)[0], ([], []))
        left.append(round(run["left"], 3))
        accuracy.append(1 - run["errors"] / 100)
    ax = plot.accuracy_left(curves, 1 - raw["dense"]["errors"] / 100)
    path.parent.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(path, dpi=150)
    plt.close(ax.figure)


if __name__ == "__main__":
    table.main(__doc__, measure)
