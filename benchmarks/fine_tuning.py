"""What is trained? A pretrained encoder and a linear classifier, on the sentences of movie reviews."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import encoder
import jax
import jax.numpy as jnp
import movie_reviews
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

import hessjax as hj

EVALUATIONS = 6


class Task(NamedTuple):
    """What does not change over the runs.

    Attributes:
        module: what is applied.
        embeddings: frozen.
        params: from which a training begins.
        train: sentences.
        test: others.
        teacher: logits on the training sentences to learn from, or None.
    """

    module: encoder.Classifier
    embeddings: encoder.Embeddings
    params: Any
    train: movie_reviews.Sentences
    test: movie_reviews.Sentences
    teacher: np.ndarray | None = None


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
        params: masked, if it pruned.
        wrong: rows of the test sentences that it gets wrong in the end.
        curve: updates and the errors after them, in percent of the test sentences.
        seconds: of the training alone, the first step's compilation included.
        state: of the optimizer, at the end.
    """

    params: Any
    wrong: list[int]
    curve: list[tuple[int, float]]
    seconds: float
    state: Any = None


def problem(layers: int, length: int, number: int | None, seed: int = 0) -> Task:
    """The pretrained encoder's first layers before so many sentences, all for None, cut at a length.

    Other sentences are held out for another seed.
    """
    pretrained = encoder.load(layers)
    sentences, labels = movie_reviews.load()
    encoded = movie_reviews.encode(sentences, labels, pretrained.vocabulary, length)
    width = pretrained.embeddings.words.shape[1]
    classifier = {"kernel": jnp.zeros((width, 2)), "bias": jnp.zeros(2)}
    params = {"encoder": pretrained.params, "classifier": classifier}
    module = encoder.Classifier(encoder.Encoder(layers))
    parts = (part[:number] for part in movie_reviews.split(encoded, seed=seed))
    return Task(module, pretrained.embeddings, params, *parts)


def train(
    task: Task,
    tx: optax.GradientTransformation,
    steps: int,
    size: int,
    seed: int = 0,
    evaluations: int = EVALUATIONS,
) -> Trained:
    """The encoder and the classifier, the embeddings frozen; sentences in another order for another seed."""
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), task.params)
    state, curve, begin = tx.init(params), [], time.perf_counter()
    chosen = movie_reviews.batches(len(task.train.labels), size, steps, seed)
    for i, rows in enumerate(chosen, 1):
        batch = (*task.train[rows], None if task.teacher is None else task.teacher[rows])
        params, state = step(tx, task.module, params, state, task.embeddings, batch)
        if i == steps or i % -(-steps // evaluations) == 0:
            wrong = mistakes(task, params)
            curve.append((i, 100 * len(wrong) / len(task.test.labels)))
            print(f"step {i}: {curve[-1][1]:.1f} % errors, {time.perf_counter() - begin:.0f} s", flush=True)
    return Trained(params, wrong, curve, time.perf_counter() - begin, state)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(
    tx: optax.GradientTransformation, module: Any, params: Any, state: Any, embeddings: Any, batch: Any
) -> Any:
    grads = jax.grad(loss_fn)(params, module, embeddings, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def loss_fn(params: Any, module: Any, embeddings: Any, batch: Any) -> jax.Array:
    """Cross-entropy; with a teacher, half of it, and half the softened divergence at a temperature of 2."""
    tokens, labels, teacher = batch
    loss = hj.distillation(
        functools.partial(logits, module),
        lambda *_: teacher,
        lambda z, *_: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean(),
        alpha=0.0 if teacher is None else 0.5,
    )
    return loss(params, embeddings, tokens)


@functools.partial(jax.jit, static_argnums=0)
def logits(module: Any, params: Any, embeddings: encoder.Embeddings, tokens: jax.Array) -> jax.Array:
    return module.apply({"params": params}, embeddings(tokens), tokens > 0)


def all_logits(task: Task, params: Any, sentences: movie_reviews.Sentences) -> np.ndarray:
    return in_parts(functools.partial(logits, task.module, params, task.embeddings), sentences)


def in_parts(function: Callable[..., Any], sentences: movie_reviews.Sentences, size: int = 100) -> np.ndarray:
    """The function of all tokens, of so many sentences at a time."""
    parts = np.split(sentences.tokens, range(size, len(sentences.tokens), size))
    return np.concatenate([function(part) for part in parts])


def mistakes(task: Task, params: Any) -> list[int]:
    """The rows of the test sentences that it gets wrong."""
    found = np.argmax(all_logits(task, params, task.test), axis=-1)
    return np.flatnonzero(found != task.test.labels).tolist()


def errors_without_encoder(task: Task) -> float:
    """Of a linear classifier of mean word vectors: who errs as often has nothing left of the encoder."""

    @jax.jit
    def means(tokens: jax.Array) -> jax.Array:
        there = (tokens > 0)[..., None]
        return jnp.sum(jnp.where(there, task.embeddings(tokens), 0), axis=1) / jnp.sum(there, axis=1)

    found = LogisticRegression(max_iter=1000).fit(in_parts(means, task.train), task.train.labels)
    return 100 * (1 - found.score(in_parts(means, task.test), task.test.labels))


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
