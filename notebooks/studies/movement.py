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
SAMPLE = "encoder/layer_0/widen/kernel"
DENSE = "dense"
SEEDS = range(3)
"""Each with other sentences held out, and others in a batch."""


class Settings(NamedTuple):
    """Of all runs.

    Attributes:
        left: the shares of the matrices' weights that are left, the most important first.
        layers: that are trained and pruned, the encoder's last ones.
        frozen: layers before them, which stay as they are: what they say of every sentence is computed once.
        length: tokens of a sentence, longer ones are cut.
        sentences: of which a fifth is held out.
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
    """

    left: tuple[float, ...] = (0.05, 0.15)
    layers: int = 2
    frozen: int = 4
    length: int = 24
    sentences: int = 5300
    batch: int = 16
    steps: int = 250
    dense_steps: int = 250
    dense_rate: float = 2e-4
    every: int = 2
    rate: float = 2e-4
    small_rate: float = 1e-3
    score_rate: float = 1e-2
    adam_rate: float = 1e-2
    penalty: float = 400.0


QUICK = Settings((0.2,), 1, 0, 12, 120, 8, 12, 6)


class Method(NamedTuple):
    """A rule, and how its zeros are spread."""

    saliency: hj.saliencies.Saliency
    allocation: Any = hj.allocations.uniform()


def methods(settings: Settings) -> dict[str, Method]:
    """Where scores begin, by which steps they move, and whether matrices are ranked together."""
    movement, soft = hj.saliencies.movement, hj.saliencies.soft_movement
    falling = functools.partial(optax.linear_schedule, end_value=0.0, transition_steps=settings.steps)
    adam = optax.adam(falling(settings.adam_rate))
    rising = optax.polynomial_schedule(0.0, settings.penalty, 3, round(0.58 * settings.steps))
    start = hj.saliencies.from_magnitudes
    return {
        "magnitude": Method(hj.saliencies.magnitude()),
        "from magnitudes, layer-wise steps": Method(movement(by_leaf(falling(settings.score_rate)), start)),
        "from zero, Adam (as published)": Method(movement(adam)),
        "soft movement": Method(soft(rising, adam), hj.allocations.global_threshold()),
        "from magnitudes, Adam": Method(movement(adam, start)),
        "from zero, plain steps": Method(movement(optax.sgd(1.0))),
        "from magnitudes, layer-wise, constant rate": Method(
            movement(by_leaf(settings.score_rate / 2), start)
        ),
        "magnitude, one ranking": Method(hj.saliencies.magnitude(), hj.allocations.global_threshold()),
    }


MAIN = ("magnitude", "from magnitudes, layer-wise steps", "from zero, Adam (as published)", "soft movement")


def by_leaf(rate: Any) -> optax.GradientTransformation:
    """Steps in proportion to the slopes, a share of the scores' own size in every leaf."""
    return optax.lars(rate, trust_coefficient=1.0, momentum=0.0)


def names(settings: Settings) -> Iterator[tuple[str, float, bool, int]]:
    """Method, share left, whether a teacher helps, and seed of every run, the most important first."""
    first, *others = settings.left
    further = [method for method in methods(settings) if method not in MAIN]
    for seed, method in [*itertools.product(SEEDS, MAIN), *itertools.product(SEEDS, further)]:
        yield method, first, True, seed
    for left, seed, method in itertools.product(others, SEEDS, MAIN):
        yield method, left, True, seed
    for seed, method in itertools.product(SEEDS, MAIN[:3]):
        yield method, first, False, seed


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
    """The network that has learned the task, whose params are kept in a file; and the frozen layers alone.

    Who errs as often as a linear classifier of what those say has nothing left of the layers that are pruned.
    """
    task = problem(settings, seed)
    tx = fine_tuning.adamw(settings.dense_rate, 10 * settings.dense_rate, settings.dense_steps)
    found = fine_tuning.train(task, tx, settings.dense_steps, settings.batch, seed)
    hj.save_npz(_path(settings, seed), found.params)
    return {"errors": found.curve[-1][1], "frozen alone": fine_tuning.errors_without_encoder(task)}


def row(settings: Settings, method: str, left: float, taught: bool, seed: int) -> dict[str, Any]:
    """What is kept of one run."""
    return run(learned(settings, seed, taught), settings, method, left, seed)


def run(task: fine_tuning.Task, settings: Settings, method: str, left: float, seed: int) -> dict[str, Any]:
    """Errors, what is left of every matrix, and for the first seed a sample of one matrix's weights."""
    found = fine_tuning.train(task, pruning(settings, method, left), settings.steps, settings.batch, seed)
    sample = {"sample": sampled(task.params, found)} if not seed and left == settings.left[0] else {}
    by_layer = {path: float(jnp.mean(x != 0)) for path, x in kernels(found.params).items()}
    numbers = {"errors": found.curve[-1][1], "curve": found.curve, "seconds": found.seconds}
    return {**numbers, "by_layer": by_layer, **sample}


class Features(NamedTuple):
    """What the frozen layers say, in place of embeddings.

    Attributes:
        table: (sentences, length, width), in half precision.
    """

    table: jax.Array

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length, width) of sentences that carry their row + 1 in place of the first token."""
        return self.table[tokens[:, 0] - 1].astype(jnp.float32)


def problem(settings: Settings, seed: int) -> fine_tuning.Task:
    """The encoder's last layers before a classifier, over what the frozen ones say of the sentences."""
    pretrained, sentences, features = frozen(settings)
    layers = [pretrained.params[f"layer_{settings.frozen + i}"] for i in range(settings.layers)]
    params = {
        "encoder": {f"layer_{i}": layer for i, layer in enumerate(layers)},
        "classifier": {"kernel": jnp.zeros((features.table.shape[-1], 2)), "bias": jnp.zeros(2)},
    }
    module = encoder.Classifier(encoder.Encoder(settings.layers))
    return fine_tuning.Task(module, features, params, *movie_reviews.split(sentences, 0.2, seed))


@functools.lru_cache(maxsize=1)
def frozen(settings: Settings) -> tuple[encoder.Pretrained, movie_reviews.Sentences, Features]:
    """The pretrained encoder, the sentences by their rows, and what its first layers say of each."""
    pretrained = encoder.load(settings.frozen + settings.layers)
    texts, labels = movie_reviews.load()
    chosen = np.random.default_rng(0).permutation(len(labels))[: settings.sentences]
    texts, labels = [texts[i] for i in chosen], labels[chosen]
    sentences = movie_reviews.encode(texts, labels, pretrained.vocabulary, settings.length)
    path = downloads.CACHE / f"movement_study_{settings.frozen}_frozen_{settings.length}_tokens.npy"
    if not path.exists():
        parts = np.split(sentences.tokens, range(200, len(sentences.tokens), 200))
        np.save(path, np.concatenate([_say(pretrained, settings.frozen, part) for part in parts]))
    rows_instead = np.where(
        np.arange(settings.length) == 0, np.arange(len(texts))[:, None] + 1, sentences.tokens
    )
    return pretrained, sentences._replace(tokens=rows_instead), Features(jnp.asarray(np.load(path)))


def _say(pretrained: encoder.Pretrained, layers: int, tokens: np.ndarray) -> np.ndarray:
    x, layer = pretrained.embeddings(tokens), encoder.Layer(12, 1536)
    for i in range(layers):
        x = _layer(layer, pretrained.params[f"layer_{i}"], x, tokens > 0)
    return np.asarray(x, np.float16)


@functools.partial(jax.jit, static_argnums=0)
def _layer(layer: encoder.Layer, params: Any, x: jax.Array, present: jax.Array) -> jax.Array:
    return layer.apply({"params": params}, x, present)


@functools.lru_cache(maxsize=1)
def learned(settings: Settings, seed: int, taught: bool) -> fine_tuning.Task:
    """The task, from the dense network on, with its logits to learn from."""
    task = problem(settings, seed)
    params = hj.load_npz(_path(settings, seed), like=task.params)
    teacher = fine_tuning.all_logits(task, params, task.train) if taught else None
    return task._replace(params=params, teacher=teacher)


def _path(settings: Settings, seed: int) -> Path:
    return downloads.CACHE / f"movement_study_{settings.layers}_layers_seed_{seed}.npz"


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


def kernels(params: Any) -> dict[str, Any]:
    """The matrices that are pruned, by path."""
    layers = params["encoder"]
    found = [(f"encoder/{a}/{b}/kernel", part) for a, layer in layers.items() for b, part in layer.items()]
    return {path: part["kernel"] for path, part in found if "kernel" in part}


def sampled(before: Any, found: fine_tuning.Trained, number: int = 700) -> dict[str, list[float]]:
    """Weights of one matrix before and after, and their scores: as many of those kept as of the others.

    After: as the optimizer knows it, for a pruned weight too.
    """
    path = SAMPLE if SAMPLE in kernels(before) else list(kernels(before))[-1]
    first, last = (np.ravel(kernels(params)[path]) for params in (before, found.params))
    hidden = np.ravel(kernels(found.state.dense)[path])
    mask = np.ravel(kernels(hj.mask_of(found.state))[path])
    after = np.where(mask, last, hidden)
    state = found.state.saliency
    score = np.ravel(kernels(state.scores)[path]) if hasattr(state, "scores") else np.abs(after)
    parts = [np.flatnonzero(flags) for flags in (mask, ~mask)]
    chosen = [np.random.default_rng(0).choice(part, min(number, len(part)), replace=False) for part in parts]
    columns = {"before": first, "after": after, "score": score}
    return {
        "matrix": path,
        **{name: [float(x) for x in column[np.concatenate(chosen)]] for name, column in columns.items()},
        "kept": [len(part) for part in chosen],
    }


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
