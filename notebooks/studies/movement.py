"""Movement against magnitude while a pretrained encoder learns on: `python notebooks/studies/movement.py`."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rows  # first, as it finds the benchmarks

# isort: split
import downloads
import encoder
import fine_tuning
import movie_reviews

import hessjax as hj

KERNELS = "encoder/*/kernel"
SAMPLE = "encoder/layer_1/widen/kernel"
DENSE = "dense"
SEEDS = range(3)
"""Each with other sentences held out, and others in a batch."""


class Settings(NamedTuple):
    """Of all runs.

    Attributes:
        left: the shares of the matrices' weights that are left, the most important first.
        layers: the encoder's first ones, all trained and pruned.
        length: tokens of a sentence, longer ones are cut.
        batch: in a step.
        steps: of a run that prunes; in the last four tenths the number of zeros rests.
        dense_steps: of the dense network before, from which the others begin, and which teaches them.
        dense_rate: its highest learning rate.
        every: updates between two masks.
        rate: the highest learning rate of the encoder's matrices while they are pruned.
        small_rate: the same of biases, LayerNorms and the classifier.
        score_rate: the first layer-wise learning rate of scores, a share of their size.
        adam_rate: the first learning rate of scores in Adam's steps.
        penalty: λ of soft movement in the end.
        evaluations: on the held-out sentences, in equal parts of a run.
    """

    left: tuple[float, ...] = (0.05, 0.15)
    layers: int = 3
    length: int = 32
    batch: int = 16
    steps: int = 250
    dense_steps: int = 400
    dense_rate: float = 2e-4
    every: int = 2
    rate: float = 2e-4
    small_rate: float = 1e-3
    score_rate: float = 1e-2
    adam_rate: float = 1e-2
    penalty: float = 400.0
    evaluations: int = 2


QUICK = Settings((0.2,), 1, 12, 8, 12, 6)


class Method(NamedTuple):
    """A rule, and how its zeros are spread."""

    saliency: hj.saliencies.Saliency
    allocation: Any = hj.allocations.uniform()


MAIN = ("magnitude", "from magnitudes, layer-wise steps", "from zero, Adam (as published)", "soft movement")
CONSTANT = "from magnitudes, layer-wise, constant rate"


def methods(settings: Settings) -> dict[str, Method]:
    """Where scores begin, by which steps they move, and whether matrices are ranked together."""
    movement, soft = hj.saliencies.movement, hj.saliencies.soft_movement
    falling = functools.partial(optax.linear_schedule, end_value=0.0, transition_steps=settings.steps)
    adam = optax.adam(falling(settings.adam_rate))
    rising = optax.polynomial_schedule(0.0, settings.penalty, 3, round(0.58 * settings.steps))
    start = hj.saliencies.from_magnitudes
    rules = (
        Method(hj.saliencies.magnitude()),
        Method(movement(by_leaf(falling(settings.score_rate)), start)),
        Method(movement(adam, jnp.zeros_like)),
        Method(soft(rising, adam), hj.allocations.global_threshold()),
    )
    return {
        **dict(zip(MAIN, rules, strict=True)),
        CONSTANT: Method(movement(by_leaf(settings.score_rate / 2), start)),
        "magnitude, one ranking": Method(hj.saliencies.magnitude(), hj.allocations.global_threshold()),
    }


def by_leaf(rate: Any) -> optax.GradientTransformation:
    """Steps in proportion to the slopes, a share of the scores' own size in every leaf."""
    return optax.lars(rate, trust_coefficient=1.0, momentum=0.0)


def names(settings: Settings) -> Iterator[tuple[str, float, bool, int]]:
    """Method, share left, whether a teacher helps, and seed of every run, the most important first."""
    first, *others = settings.left
    further = [method for method in methods(settings) if method not in MAIN]
    for seed, method in [*itertools.product(SEEDS, MAIN), *itertools.product(SEEDS, further)]:
        yield method, first, True, seed
    for left, seed, method in itertools.product(others, SEEDS, MAIN[:3]):
        yield method, left, True, seed
    for seed, method in itertools.product(SEEDS, MAIN[:2]):
        yield method, first, False, seed
    for left, seed in itertools.product(others, SEEDS):
        yield MAIN[3], left, True, seed


def label(method: str, left: float, taught: bool, seed: int) -> str:
    """The name of a row."""
    return f"{method} | {left:.0%} left | {'taught' if taught else 'alone'} | seed {seed}"


def main(settings: Settings = Settings()) -> None:  # noqa: B008 (a value, never changed)
    kept = rows.Rows("movement", settings._asdict())
    for seed in SEEDS:
        for name in kept.missing([f"{DENSE} | seed {seed}"]):
            kept.keep(name, dense(settings, seed))
    runs = {label(*run): run for run in names(settings)}
    for name in kept.missing(iter(runs)):
        kept.keep(name, row(settings, *runs[name]))


# -- one run -------------------------------------------------------------------------------------


def dense(settings: Settings, seed: int) -> dict[str, Any]:
    """The network that has learned the task, whose params are kept in a file; and mean word vectors alone.

    Who errs as often as a linear classifier of those has nothing left of the layers that are pruned.
    """
    task = fine_tuning.problem(settings.layers, settings.length, None, seed)
    tx = fine_tuning.adamw(settings.dense_rate, 10 * settings.dense_rate, settings.dense_steps)
    found = fine_tuning.train(task, tx, settings.dense_steps, settings.batch, seed, settings.evaluations)
    hj.save_npz(_path(settings, seed), found.params)
    numbers = {"errors": found.curve[-1][1], "curve": found.curve, "seconds": found.seconds}
    return {**numbers, "no encoder": fine_tuning.errors_without_encoder(task)}


def row(settings: Settings, method: str, left: float, taught: bool, seed: int) -> dict[str, Any]:
    """What is kept of one run."""
    task = learned(settings, seed)
    return run(task if taught else task._replace(teacher=None), settings, method, left, seed)


def run(task: fine_tuning.Task, settings: Settings, method: str, left: float, seed: int) -> dict[str, Any]:
    """Errors, what is left of every matrix, and for the first seed a sample of one matrix's weights."""
    tx = pruning(settings, method, left)
    found = fine_tuning.train(task, tx, settings.steps, settings.batch, seed, settings.evaluations)
    numbers = {"errors": found.curve[-1][1], "curve": found.curve, "seconds": found.seconds}
    sample = {"sample": sampled(task.params, found)} if not seed and left == settings.left[0] else {}
    return {**numbers, **masks(task.params, found), **sample}


@functools.lru_cache(maxsize=len(SEEDS))
def learned(settings: Settings, seed: int) -> fine_tuning.Task:
    """The task, from the dense network on, with its logits to learn from."""
    task = fine_tuning.problem(settings.layers, settings.length, None, seed)
    params = hj.load_npz(_path(settings, seed), like=task.params)
    teacher = fine_tuning.all_logits(task, params, task.train)
    return task._replace(params=params, teacher=teacher)


def _path(settings: Settings, seed: int) -> Path:
    return downloads.CACHE / f"movement_study_{settings.layers}_layers_seed_{seed}.npz"


@functools.cache  # one object for all seeds, so that its step is compiled once
def pruning(settings: Settings, method: str, left: float) -> optax.GradientTransformation:
    """The same training for every rule: AdamW, and a cubic schedule between two rests."""
    rule = methods(settings)[method]
    begin, end = round(0.02 * settings.steps), round(0.6 * settings.steps)
    return hj.prune(
        fine_tuning.adamw(settings.rate, settings.small_rate, settings.steps),
        rule.saliency,
        optax.polynomial_schedule(0.0, 1 - left, 3, end - begin, begin),
        allocation=rule.allocation,
        where=KERNELS,
        every=settings.every,
    )


# -- what a mask is like -------------------------------------------------------------------------


def kernels(params: Any) -> dict[str, np.ndarray]:
    """The matrices that are pruned, by path, each in one row."""
    layers = params["encoder"]
    found = [(f"encoder/{a}/{b}/kernel", part) for a, layer in layers.items() for b, part in layer.items()]
    return {path: np.ravel(part["kernel"]) for path, part in found if "kernel" in part}


def masks(before: Any, found: fine_tuning.Trained) -> dict[str, dict[str, float]]:
    """By matrix: the share that is kept, and how much of it were the largest before, as many."""
    kept = kernels(hj.mask_of(found.state))
    largest = {path: _share_of_the_largest(np.abs(w), kept[path]) for path, w in kernels(before).items()}
    return {"by_layer": {path: float(mask.mean()) for path, mask in kept.items()}, "largest": largest}


def _share_of_the_largest(sizes: np.ndarray, mask: np.ndarray) -> float:
    number = int(mask.sum())
    largest = np.argpartition(sizes, len(sizes) - number)[len(sizes) - number :] if number else []
    return float(np.mean(mask[largest])) if number else 1.0


def sampled(before: Any, found: fine_tuning.Trained, number: int = 700) -> dict[str, Any]:
    """Weights of one matrix before and after, and their scores: as many of those kept as of the others.

    After: as the optimizer knows it, for a pruned weight too.
    """
    path = SAMPLE if SAMPLE in kernels(before) else list(kernels(before))[-1]
    first, last, hidden = (kernels(p)[path] for p in (before, found.params, found.state.dense))
    mask, state = kernels(hj.mask_of(found.state))[path], found.state.saliency
    after = np.where(mask, last, hidden)
    score = kernels(state.scores)[path] if hasattr(state, "scores") else np.abs(after)
    parts = [np.flatnonzero(flags) for flags in (mask, ~mask)]
    chosen = [np.random.default_rng(0).choice(part, min(number, len(part)), replace=False) for part in parts]
    columns = {"before": first, "after": after, "score": score}
    taken = {name: column[np.concatenate(chosen)].tolist() for name, column in columns.items()}
    return {"matrix": path, **taken, "kept": len(chosen[0])}


# -- a stand-in without downloads ----------------------------------------------------------------


def stand_in(settings: Settings = QUICK, width: int = 24, words: int = 60) -> fine_tuning.Task:
    """A small random encoder, and made-up sentences: does one half of the words outnumber the other?"""
    rng, keys = np.random.default_rng(0), jax.random.split(jax.random.key(0), 3)
    tokens = rng.integers(1, words, (120, settings.length)).astype(np.int32)
    labels = (np.mean(tokens > words // 2, axis=1) > 0.5).astype(np.int32)
    sentences = movie_reviews.Sentences(tokens, labels)
    tables = (jax.random.normal(key, (n, width)) for key, n in zip(keys, (words, 512), strict=False))
    embeddings = encoder.Embeddings(*tables, jnp.ones(width), jnp.zeros(width))
    module = encoder.Classifier(encoder.Encoder(settings.layers, heads=2, hidden=2 * width))
    params = module.init(keys[2], embeddings(tokens[:1]), tokens[:1] > 0)["params"]
    return fine_tuning.Task(module, embeddings, params, sentences[:80], sentences[80:])


if __name__ == "__main__":
    main()
