"""The tour's network as a problem: `hessjax analyze tour`, before one has a problem of one's own."""

import functools
from typing import Any

import jax
import numpy as np
import optax

from hessjax import likelihoods
from hessjax._core._types import Params
from hessjax._report._problem import Problem
from hessjax.cli import _digits
from hessjax.cli._digits import NETWORK, loss_fn, quality
from hessjax.flax import linen_model

BATCH, STEPS = 128, 500


def problem() -> Problem:
    """The network for handwritten digits, trained for a few seconds."""
    data = _digits.load()
    images, labels = data.train
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(labels), BATCH)]
    return Problem(
        loss_fn,
        _trained(images, labels),
        batches,
        metric=functools.partial(_accuracy, data.test),
        model_fn=linen_model(NETWORK),
        likelihood=likelihoods.categorical,
        optimizer=optax.adamw(1e-3, weight_decay=1e-2),
        name="handwritten digits",
    )


def _accuracy(test: Any, params: Params) -> dict[str, float]:
    return {"test accuracy": float(quality(params, test).accuracy)}


def _trained(images: Any, labels: Any) -> Params:
    params = jax.jit(NETWORK.init)(jax.random.key(0), images[:1])["params"]
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-2)

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(0), tx.init(params)
    for _ in range(STEPS):
        chosen = rng.choice(len(labels), BATCH, replace=False)
        params, state = step(params, state, (images[chosen], labels[chosen]))
    return params
