"""How much accuracy is left when a pretrained encoder is pruned while it learns a task?"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import downloads
import encoder
import jax
import jax.numpy as jnp
import movie_reviews
import numpy as np
import optax
import table

import hessjax as hj
from hessjax.pruning.saliency import Saliency

ENCODER_KERNELS = "encoder/*/kernel"
TEMPERATURE, ALPHA = 2.0, 0.5


class Settings(NamedTuple):
    """Of all runs together.

    Attributes:
        steps: of each run that prunes, and of the dense one.
        left: the fractions of the encoder's weights that are left.
        length: of a sentence in tokens.
        sentences: how many are used, from the first on; None: all.
        layers: of the encoder, from the first on.
        every: updates between two masks.
        batch: sentences in a step.
        rate: of the weights.
    """

    steps: int = 1490
    dense_steps: int = 596
    left: tuple[float, ...] = (0.15, 0.03)
    length: int = 32
    sentences: int | None = None
    layers: int = 6
    every: int = 10
    batch: int = 32
    rate: float = 1e-4
    score_rate: float = 1e-2


class Task(NamedTuple):
    pretrained: encoder.Pretrained
    module: encoder.Classifier
    train: movie_reviews.Sentences
    test: movie_reviews.Sentences


def problem(settings: Settings) -> Task:
    pretrained = encoder.load(settings.layers)
    sentences, labels = movie_reviews.load()
    n = settings.sentences
    encoded = movie_reviews.encode(sentences[:n], labels[:n], pretrained.vocabulary, settings.length)
    module = encoder.Classifier(encoder.Encoder(settings.layers))
    return Task(pretrained, module, *movie_reviews.split(encoded))


def start(task):
    width = task.pretrained.embeddings.words.shape[1]
    classifier = {"kernel": jnp.zeros((width, 2)), "bias": jnp.zeros(2)}
    return jax.tree.map(jnp.array, {"encoder": task.pretrained.params, "classifier": classifier})


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, embeddings, tokens):
    return module.apply({"params": params}, embeddings(tokens), tokens > 0)


def loss_fn(params, module, embeddings, tokens, labels, teacher):
    z = logits(module, params, embeddings, tokens)
    ce = optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
    if teacher is None:
        return ce
    t = TEMPERATURE
    kl = optax.kl_divergence(jax.nn.log_softmax(z / t), jax.nn.softmax(teacher / t)).mean() * t**2
    return ALPHA * kl + (1 - ALPHA) * ce


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(tx, module, params, state, *args):
    grads = jax.grad(loss_fn)(params, module, *args)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def all_logits(task, params, sentences, size=106):
    tokens = sentences.tokens
    parts = [logits(task.module, params, task.pretrained.embeddings, tokens[i:i+size]) for i in range(0, len(tokens), size)]
    return np.concatenate(parts)


def accuracy(task, params):
    return float(np.mean(np.argmax(all_logits(task, params, task.test), -1) == task.test.labels))


def train(task, settings, tx, steps, teacher=None, evals=5, seed=0):
    params = start(task)
    state = tx.init(params)
    curve = []
    rows = movie_reviews.batches(len(task.train.labels), settings.batch, steps, seed)
    for i, row in enumerate(rows, 1):
        batch = task.train[row]
        soft = None if teacher is None else teacher[row]
        params, state = step(tx, task.module, params, state, task.pretrained.embeddings, *batch, soft)
        if i % max(1, -(-steps // evals)) == 0 or i == steps:
            curve.append((i, accuracy(task, params)))
            print(i, curve[-1][1], float(hj.summary(params).total.sparsity) if False else '', time.strftime("%X"), flush=True)
    return params, state, curve


def movement(optimizer):
    def init(dense):
        z = jax.tree.map(jnp.zeros_like, dense)
        return z, optimizer.init(z)

    def update(state, grads, dense, mask, /, **extra):
        s, o = state
        u, o = optimizer.update(jax.tree.map(jnp.multiply, grads, dense), o, s)
        return optax.apply_updates(s, u), o

    return Saliency(init, update, lambda state, dense, /, **extra: state[0])


def pruner(saliency, left, st, rate=None):
    lr = optax.linear_schedule(rate or st.rate, 0.0, st.steps)
    warm, cool = round(0.1 * st.steps), round(0.3 * st.steps)
    sched = optax.polynomial_schedule(0.0, 1 - left, 3, st.steps - warm - cool, warm)
    return hj.prune(optax.adamw(lr, weight_decay=0.0), saliency, sched, allocation=hj.uniform(), where=ENCODER_KERNELS, every=st.every)
