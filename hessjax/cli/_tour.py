"""The tour: a network for handwritten digits, trained, measured, and pruned to 90 % zeros."""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich import get_console
from rich.progress import track

import hessjax as hj
from hessjax import _report as report
from hessjax import plot
from hessjax._core._results import Eigenpairs
from hessjax._core._tables import written
from hessjax._core._types import Key, Params
from hessjax.cli import _digits
from hessjax.cli._digits import NETWORK, Digits, Quality, loss_fn, quality
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._trace import TraceByLeaf

SPARSITY = 0.9
DIRECTIONS = ("the eigenvector of λ₁", "the eigenvector of λ₂")
BATCH = 128


class Settings(NamedTuple):
    """How much work each part of the tour does."""

    train_steps: int
    measured_examples: int
    num_eigenvalues: int
    num_probes: int
    num_lanczos: int
    num_points: int
    tune_steps: int


FULL = Settings(
    train_steps=500,
    measured_examples=1437,
    num_eigenvalues=5,
    num_probes=100,
    num_lanczos=120,
    num_points=21,
    tune_steps=800,
)
QUICK = Settings(
    train_steps=300,
    measured_examples=256,
    num_eigenvalues=2,
    num_probes=20,
    num_lanczos=80,
    num_points=11,
    tune_steps=400,
)


# -- training ------------------------------------------------------------------------------------


class History(NamedTuple):
    """The quality on the test set every ten steps of a loop."""

    steps: list[int]
    quality: list[Quality]
    seconds: float


def fit(
    tx: optax.GradientTransformation,
    params: Params,
    data: Digits,
    num_steps: int,
    seed: int,
    description: str,
) -> tuple[Params, History]:
    """A plain optax loop over shuffled batches of 128."""

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    start, state, seen = time.perf_counter(), tx.init(params), {}
    batches = minibatches(data.train, np.random.default_rng(seed))
    for count in track(range(num_steps + 1), description):
        if count % 10 == 0:
            seen[count] = jax.tree.map(float, quality(params, data.test))
        if count < num_steps:
            params, state = step(params, state, next(batches))
    return params, History(list(seen), list(seen.values()), time.perf_counter() - start)


def minibatches(data: tuple[Any, Any], rng: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    """Shuffled batches without end; the rest of every pass is dropped."""
    while True:
        order = rng.permutation(len(data[1]))
        # Batches of one shape, for which `step` is compiled once.
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield data[0][chosen], data[1][chosen]


def train(data: Digits, settings: Settings, seed: int) -> tuple[Params, History]:
    """The dense network, by AdamW with a cosine schedule."""
    params = jax.jit(NETWORK.init)(jax.random.key(seed), data.train[0][:1])["params"]
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, settings.train_steps), weight_decay=1e-2)
    return fit(tx, params, data, settings.train_steps, seed, "training")


# -- curvature -----------------------------------------------------------------------------------


class Curvature(NamedTuple):
    """The measurements, each with its uncertainty, and the seconds each took."""

    eigenpairs: Eigenpairs
    density: SpectralDensity
    traces: TraceByLeaf
    landscape: hj.Landscape
    seconds: dict[str, float]


def measure(params: Params, data: Digits, settings: Settings, key: Key) -> Curvature:
    """Spectrum and traces of the Hessian of the training loss, and the loss around the weights."""
    images, labels = (part[: settings.measured_examples] for part in data.train)
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(labels), BATCH)]
    matvec = hj.over_batches(lambda batch: hj.hessian(loss_fn, params, batch), batches)
    keys = jax.random.split(key)
    seconds: dict[str, float] = {}
    with timed("spectrum", seconds):
        sizes = settings.num_eigenvalues, settings.num_lanczos
        spectrum = hj.spectrum(matvec, keys[0], params, *sizes, callbacks=[hj.progress_bar("spectrum")])
        pairs, density, _ = jax.block_until_ready(spectrum)
    with timed("trace", seconds):
        callbacks = [hj.progress_bar("trace")]
        traces = hj.trace_by_leaf(matvec, keys[1], params, settings.num_probes, callbacks=callbacks)
        jax.block_until_ready(traces)
    with timed("landscape", seconds):
        plane = around(params, batches[0], pairs, settings)
    return Curvature(pairs, density, traces, plane, seconds)


def around(params: Params, batch: Any, pairs: Eigenpairs, settings: Settings) -> hj.Landscape:
    """The loss of one batch across the plane of the two steepest directions."""
    steepest = jax.tree.map(lambda rows: rows[:2], pairs.vectors)
    distances = np.linspace(-2, 2, settings.num_points)
    plane = hj.landscape(loss_fn, params, batch, directions=steepest, distances=distances, progress=True)
    return jax.block_until_ready(plane)


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note the seconds of a part under its name."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


# -- pruning -------------------------------------------------------------------------------------


def prune_and_tune(params: Params, data: Digits, settings: Settings, seed: int) -> tuple[Params, History]:
    """Fine-tuning while the sparsity rises along the cubic schedule to 90 %, then rests."""
    last = settings.tune_steps // 2
    schedule = optax.polynomial_schedule(0.0, SPARSITY, 3, last)
    inner = optax.adamw(optax.cosine_decay_schedule(4e-3, settings.tune_steps), weight_decay=1e-2)
    tx = hj.prune(inner, hj.saliencies.magnitude(), schedule, every=10, stop=last)
    return fit(tx, params, data, settings.tune_steps, seed, "pruning")


def prune_at_once(params: Params) -> Params:
    """The same number of zeros in one step, without any training: what fine-tuning has to beat."""
    tx = hj.prune(optax.sgd(0.0), hj.saliencies.magnitude(), SPARSITY)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return optax.apply_updates(params, updates)


# -- the whole -----------------------------------------------------------------------------------


def tour(out: Path, *, quick: bool = False, seed: int = 0, force: bool = False) -> dict[str, Any]:
    """Train, measure, prune; write `report.json` and the figures part by part, then print tables.

    Args:
        out: folder for the results; made if it does not exist.
        quick: a short form with fewer examples, products and steps, for CI.
        seed: of the weights, the batches and the probes.
        force: whether a result that is in `out` already, an earlier tour's too, is removed first.

    Returns:
        The record that `report.json` holds. While the tour goes on, `complete` is False in it.

    Raises:
        EarlierResultError: if `out` holds a result, without `force`; before any work.
        OSError: if `out` cannot be written to, before any work.

    Cost:
        About a minute on two cores; `quick` less.
    """
    make_room(out, force)
    start, settings = time.perf_counter(), QUICK if quick else FULL
    record = Record(out, seed=seed, quick=quick, settings=settings, environment=report.environment())
    data = _digits.load()
    params, training = train(data, settings, seed)
    record.add(training=training, seconds={"training": training.seconds})
    curvature = measure(params, data, settings, jax.random.key(seed))
    record.add(curvature_figures(curvature, params), **measured(curvature, params))
    sparse, tuning = prune_and_tune(params, data, settings, seed)
    outcome = {
        "dense": training.quality[-1],
        "pruned at once": jax.tree.map(float, quality(prune_at_once(params), data.test)),
        "pruned while fine-tuning": tuning.quality[-1],
    }
    figures = pruning_figures(tuning, sparse, training.quality[-1].accuracy)
    record.add(figures, pruning=tuning, outcome=outcome, summary=hj.summary(sparse))
    record.add(seconds={"pruning": tuning.seconds, "all": time.perf_counter() - start}, complete=True)
    show(params, curvature, outcome, sparse)
    told = f"Written to {out}: report.json, {', '.join(FIGURES)}"
    get_console().print(written(told, get_console().encoding), highlight=False, markup=False)
    return report.to_json(record.facts)


FIGURES = ("density.png", "cumulative.png", "landscape.png", "layers.png", "pruning.png", "kept.png")


class EarlierResultError(FileExistsError):
    """The folder holds a result, and nobody said that it may go."""


def make_room(out: Path, force: bool) -> None:
    """A folder to write to, without an earlier result."""
    earlier = [name for name in ("report.json", *FIGURES) if (out / name).exists()]
    if earlier and not force:
        raise EarlierResultError(
            f"`out` must be a folder without an earlier result, got `{out}` with {', '.join(earlier)}: "
            "`force` removes these first."
        )
    report.prepare(out)
    for name in earlier:  # before the work: else one that is interrupted would leave a mixture of two
        (out / name).unlink()


class Record:
    """`report.json`, written anew after every part: what was done stays when the rest is interrupted."""

    def __init__(self, out: Path, **facts: Any) -> None:
        self.out = out
        self.facts: dict[str, Any] = {**facts, "complete": False, "seconds": {}, "figures": []}

    def add(self, figures: Mapping[str, Any] | None = None, /, **facts: Any) -> None:
        """Add results, and draw their figures (axes by file name)."""
        for name, ax in (figures or {}).items():
            figure = ax.get_figure(root=True)
            picture = io.BytesIO()  # drawing takes a second, in which an interruption would leave half a file
            figure.savefig(picture, dpi=160)
            (self.out / name).write_bytes(picture.getvalue())
            plt.close(figure)
            self.facts["figures"].append(name)
        self.facts["seconds"].update(facts.pop("seconds", {}))
        self.facts.update(facts)
        report.write_json(self.out / "report.json", self.facts)


def measured(curvature: Curvature, params: Params) -> dict[str, Any]:
    """The curvature as data."""
    return {
        "eigenvalues": curvature.eigenpairs._replace(vectors=None),  # as large as ten networks
        "trace": curvature.traces.total,
        "layers": report.layer_rows(curvature.traces, params),
        "density": curvature.density,
        "landscape": curvature.landscape,
        "seconds": curvature.seconds,
    }


def curvature_figures(curvature: Curvature, params: Params) -> dict[str, Any]:
    """Axes by file name."""
    return {
        "density.png": plot.density(curvature.density, curvature.eigenpairs),
        "cumulative.png": plot.cumulative(curvature.density),
        "landscape.png": plot.landscape(curvature.landscape, labels=DIRECTIONS, log=True),
        "layers.png": plot.layers(curvature.traces, params)[0],
    }


def pruning_figures(tuning: History, sparse: Params, dense_accuracy: float) -> dict[str, Any]:
    """Axes by file name."""
    accuracy = [seen.accuracy for seen in tuning.quality]
    zeros = [seen.sparsity for seen in tuning.quality]
    return {
        "pruning.png": plot.pruning_run(tuning.steps, accuracy, zeros, dense_accuracy)[0],
        "kept.png": plot.kept(sparse),
    }


def show(params: Params, curvature: Curvature, outcome: dict[str, Quality], sparse: Params) -> None:
    """Print the tables."""
    total, pairs = curvature.traces.total, curvature.eigenpairs
    count, size = len(pairs.values) // 2, hj.summary(params).total.number
    share = float(pairs.values[:count].sum() / total.mean)
    get_console().print(
        "",
        report.eigenvalue_table(pairs),
        "",
        report.layer_table(curvature.traces, params),
        f"\nThe {count} largest of {size:,} eigenvalues carry {share:.0%} of the trace.\n",
        report.accuracy_table({name: (q.sparsity, q.accuracy) for name, q in outcome.items()}),
        "",
        hj.summary(sparse),
        "",
        sep="\n",
    )
