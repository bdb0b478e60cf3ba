"""How accurate is a pretrained encoder that is pruned while it learns a task?"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import downloads
import encoder
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import movie_reviews
import numpy as np
import optax
import table

import hessjax as hj
from hessjax import plot

plt.switch_backend("agg")

KERNELS = "encoder/*/kernel"
TEMPERATURE, ALPHA = 2.0, 0.5
EVALUATIONS = 6


class Settings(NamedTuple):
    """Of all runs.

    Attributes:
        steps: of a run that prunes: the first tenth dense, the last four tenths at the final sparsity.
        dense_steps: of the dense network, which then teaches the others.
        left: the shares of the encoder's weights that are left, the first run first.
        batch: sentences in a step.
        every: updates between two masks.
        rate: the highest learning rate of the encoder's matrices while they are pruned.
        small_rate: the same of all else: biases, LayerNorms, the classifier.
        dense_rate: the same of the dense network.
        score_rate: the first learning rate of movement's scores; it falls to 0 along a line.
        sentences: how many of them are used for training, and for testing; None: all.
        length: tokens of a sentence, longer ones are cut.
        layers: of the encoder.
    """

    steps: int = 1600
    dense_steps: int = 500
    left: tuple[float, ...] = (0.03, 0.15)
    batch: int = 16
    every: int = 10
    rate: float = 1e-4
    small_rate: float = 1e-3
    dense_rate: float = 5e-5
    score_rate: float = 1e-2
    sentences: int | None = None
    length: int = 32
    layers: int = 6


QUICK = Settings(8, 4, left=(0.03,), batch=8, every=2, sentences=200, length=16, layers=1)


class Task(NamedTuple):
    """What does not change over the runs."""

    module: encoder.Classifier
    embeddings: encoder.Embeddings
    params: Any
    train: movie_reviews.Sentences
    test: movie_reviews.Sentences


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        params: masked, if it pruned.
        curve: updates and the errors after them, in percent of the test sentences.
        seconds: of the training alone, the first step's compilation included.
    """

    params: Any
    curve: list[tuple[int, float]]
    seconds: float


def measure(quick: bool) -> table.Measured:
    settings = QUICK if quick else Settings()
    task = problem(settings)
    raw = unfinished(settings, quick)
    teacher = dense(task, settings, raw)
    for name, run in runs(task, settings, teacher):
        if name not in raw["runs"]:
            print(f"{name} ...", flush=True)
            raw["runs"][name] = run()
            table.keep(__doc__, measure, quick, figures(raw), raw, grid(raw))
            draw(raw, table.folder(quick) / "transfer_learning.png")
    return figures(raw), {**raw, "finished": True}, grid(raw)


def runs(task: Task, settings: Settings, teacher: np.ndarray) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and run of every method at every share of weights left."""
    late = round(0.45 * settings.steps)
    fall = optax.linear_schedule(settings.score_rate, 0.0, settings.steps - late)
    second_thoughts = optax.adam(optax.join_schedules([optax.constant_schedule(0.0), fall], [late]))
    methods = {
        "magnitude": hj.magnitude(),
        "movement": hj.movement(optax.adam(optax.linear_schedule(settings.score_rate, 0.0, settings.steps))),
        "movement from magnitudes": hj.movement(second_thoughts, start=lambda w: jnp.abs(w) / jnp.std(w)),
    }
    for left, (name, saliency) in itertools.product(settings.left, methods.items()):
        tx = pruning(settings, saliency, left)
        yield f"{name}, {left:.0%} left", functools.partial(row, task, settings, tx, teacher)


def row(task: Task, settings: Settings, tx: optax.GradientTransformation, teacher: np.ndarray) -> Any:
    """What is kept of one run."""
    found = train(task, settings, tx, settings.steps, teacher)
    kernels = [
        layer["kernel"]
        for part in found.params["encoder"].values()
        for layer in part.values()
        if "kernel" in layer
    ]
    left = sum(int(jnp.count_nonzero(x)) for x in kernels) / sum(x.size for x in kernels)
    return {"errors": found.curve[-1][1], "left": left, "curve": found.curve, "seconds": found.seconds}


def pruning(settings: Settings, saliency: Any, left: float) -> optax.GradientTransformation:
    """The same training for every saliency: AdamW, and a cubic schedule between two rests.

    In the second the number of zeros rests, not where they are.
    """
    begin, end = round(0.1 * settings.steps), round(0.6 * settings.steps)
    return hj.prune(
        adamw(settings.rate, settings.small_rate, settings.steps),
        saliency,
        optax.polynomial_schedule(0.0, 1 - left, 3, end - begin, begin),
        allocation=hj.uniform(),
        where=KERNELS,
        every=settings.every,
    )


def adamw(rate: float, small_rate: float, steps: int) -> optax.GradientTransformation:
    """Up to the rates over a tenth of the steps, and down to 0 over the others."""

    def of(rate: float) -> optax.GradientTransformation:
        up, down = max(1, steps // 10), steps - steps // 10
        lines = [optax.linear_schedule(0.0, rate, up), optax.linear_schedule(rate, 0.0, down)]
        return optax.adamw(optax.join_schedules(lines, [up]), weight_decay=0.0)

    return optax.partition({"large": of(rate), "small": of(small_rate)}, groups)


def groups(params: Any) -> Any:
    """The matrices of the encoder, and what is never pruned: biases, LayerNorms, the classifier."""
    large = jax.tree.map(lambda x: "large" if x.ndim == 2 else "small", params["encoder"])
    return {"encoder": large, "classifier": {"kernel": "small", "bias": "small"}}


# -- the task ------------------------------------------------------------------------------------


def problem(settings: Settings) -> Task:
    pretrained = encoder.load(settings.layers)
    sentences, labels = movie_reviews.load()
    encoded = movie_reviews.encode(sentences, labels, pretrained.vocabulary, settings.length)
    width = pretrained.embeddings.words.shape[1]
    classifier = {"kernel": jnp.zeros((width, 2)), "bias": jnp.zeros(2)}
    params = {"encoder": pretrained.params, "classifier": classifier}
    module = encoder.Classifier(encoder.Encoder(settings.layers))
    parts = (part[: settings.sentences] for part in movie_reviews.split(encoded))
    return Task(module, pretrained.embeddings, params, *parts)


def dense(task: Task, settings: Settings, raw: dict[str, Any]) -> np.ndarray:
    """The logits of the dense network on the training sentences: what the others learn from, and its row."""
    path = downloads.CACHE / f"teacher_of_{len(task.train.labels)}.npy"
    if "dense" not in raw or not path.exists():
        tx = adamw(settings.dense_rate, 10 * settings.dense_rate, settings.dense_steps)
        found = train(task, settings, tx, settings.dense_steps)
        np.save(path, all_logits(task, found.params, task.train))
        raw["dense"] = {"errors": found.curve[-1][1], "curve": found.curve, "seconds": found.seconds}
    return np.load(path)


def train(
    task: Task,
    settings: Settings,
    tx: optax.GradientTransformation,
    steps: int,
    teacher: np.ndarray | None = None,
) -> Trained:
    """From the pretrained encoder and a classifier of zeros, the embeddings frozen."""
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), task.params)
    state, curve, begin = tx.init(params), [], time.perf_counter()
    chosen = movie_reviews.batches(len(task.train.labels), settings.batch, steps, seed=0)
    for i, rows in enumerate(chosen, 1):
        batch = (*task.train[rows], None if teacher is None else teacher[rows])
        params, state = step(tx, task.module, params, state, task.embeddings, batch)
        if i == steps or i % -(-steps // EVALUATIONS) == 0:
            curve.append((i, errors(task, params)))
            print(f"step {i}: {curve[-1][1]:.1f} % errors, {time.perf_counter() - begin:.0f} s", flush=True)
    return Trained(params, curve, time.perf_counter() - begin)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(
    tx: optax.GradientTransformation, module: Any, params: Any, state: Any, embeddings: Any, batch: Any
) -> Any:
    grads = jax.grad(loss_fn)(params, module, embeddings, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def loss_fn(params: Any, module: Any, embeddings: Any, batch: Any) -> jax.Array:
    """Cross-entropy; with a teacher, half of it, and half the softened divergence (arXiv 1503.02531)."""
    tokens, labels, teacher = batch
    z = logits(module, params, embeddings, tokens)
    task_loss = optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
    if teacher is None:
        return task_loss
    student, soft = jax.nn.log_softmax(z / TEMPERATURE), jax.nn.softmax(teacher / TEMPERATURE)
    return ALPHA * TEMPERATURE**2 * optax.kl_divergence(student, soft).mean() + (1 - ALPHA) * task_loss


@functools.partial(jax.jit, static_argnums=0)
def logits(module: Any, params: Any, embeddings: encoder.Embeddings, tokens: jax.Array) -> jax.Array:
    return module.apply({"params": params}, embeddings(tokens), tokens > 0)


def all_logits(task: Task, params: Any, sentences: movie_reviews.Sentences, size: int = 100) -> np.ndarray:
    parts = np.split(sentences.tokens, range(size, len(sentences.tokens), size))
    return np.concatenate([logits(task.module, params, task.embeddings, part) for part in parts])


def errors(task: Task, params: Any) -> float:
    """In percent of the test sentences."""
    found = np.argmax(all_logits(task, params, task.test), axis=-1)
    return 100 * float(np.mean(found != task.test.labels))


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
    """Errors of every run, and by how much movement is ahead where the bar stands."""
    found = [table.Figure("dense", raw["dense"]["errors"], "% errors")]
    found += [table.Figure(name, run["errors"], "% errors") for name, run in raw["runs"].items()]
    methods = ("movement", "movement from magnitudes", "magnitude")
    ends = [raw["runs"].get(f"{method}, 3% left") for method in methods]
    if all(ends):
        ahead = min(ends[0]["errors"], ends[1]["errors"]) - ends[2]["errors"]
        bar = None if raw["settings"]["layers"] < 6 else -3.0
        found.append(
            table.Figure("the better movement less magnitude, 3% left", ahead, "points of errors", bar)
        )
    return found


def grid(raw: dict[str, Any]) -> table.Grid:
    """Accuracy by method and share of weights left."""
    shares = [f"{left:.0%} left" for left in sorted(raw["settings"]["left"], reverse=True)]
    rows: dict[str, list[list[float]]] = {"dense": [[100 - raw["dense"]["errors"]] for _ in shares]}
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
