"""How much accuracy is left after pruning without retraining?"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import hessjax as hj

SPARSITIES = (0.8, 0.9, 0.95)
SEEDS = 3
NUM_GRADS = 1200
BEST = "GGN at temperature 4, best of three dampings by training loss, 64 steps"
BARS = {"joint, 10 recomputes": (4.0, 10.0, 42.0), BEST: (3.0, 8.0, 29.0)}
"""The most errors in percent of the test images, at each sparsity."""

NO_BARS = (None, None, None)

Params = tuple[jax.Array, ...]
r = hj.relative


@dataclasses.dataclass(frozen=True)
class KFAC(hj.saliencies.Saliency):
    """K-FAC for the Fisher: scores ½ w² / [K⁻¹]_qq, and the single moves added up, as in WoodFisher's paper.

    Attributes:
        damping: λ.
        moves: whether the kept weights do.
        corrected: whether the eigenvalues are those of EKFAC.
    """

    damping: Any
    moves: bool = True
    corrected: bool = False
    compensates: ClassVar[bool] = True

    def scores(self, state: Any, seen: Any) -> Params:
        """½ w² / [K⁻¹]_qq."""
        return jax.tree.map(lambda w, d: w**2 / (2 * d), seen.weights, self._inverse(seen).diagonal())

    def compensate(self, state: Any, seen: Any, mask: Params) -> tuple[Params, jax.Array]:
        """The weights less K⁻¹(w_q / [K⁻¹]_qq), over all q that go."""
        inverse, gone = self._inverse(seen), jax.tree.map(jnp.not_equal, seen.mask, mask)
        diagonal = inverse.diagonal()
        parts = jax.tree.map(lambda w, d, g: jnp.where(g, w / d, 0), seen.weights, diagonal, gone)
        costs = jax.tree.map(lambda w, x: jnp.sum(w * x) / 2, seen.weights, parts)
        moved = jax.tree.map(jnp.subtract, seen.weights, inverse(parts)) if self.moves else seen.weights
        return moved, sum(jax.tree.leaves(costs))

    def _inverse(self, seen: Any) -> Any:
        x, _ = sample(seen.weights, NUM_GRADS)
        moments = hj.layers.moments(logits, seen.weights, [x], likelihood=hj.likelihoods.categorical)
        matrix = hj.layers.ekfac(moments, [x]) if self.corrected else hj.layers.kfac(moments)
        return matrix.inverse(self.damping)


class Method(NamedTuple):
    """A rule with the gradients it sees.

    Attributes:
        rule: or several, of which the training loss chooses one at every step.
        recomputes: the steps to each sparsity.
        onward: whether these steps begin where those to the sparsity before ended, not at the dense network.
    """

    rule: Any
    grads: Callable[[Params], Any] | None = None
    recomputes: Sequence[int] = (1, 1, 1)
    onward: bool = False


def measure(quick: bool) -> table.Measured:
    sparsities = SPARSITIES[:1] if quick else SPARSITIES
    nets = [trained(seed, 5 if quick else 80) for seed in range(1 if quick else SEEDS)]
    dense = [errors(params) for params in nets]
    figures = [table.Figure("dense", statistics.mean(dense), "% errors")]
    raw: dict[str, Any] = {"dense": dense}
    rows = {"dense": [dense] * len(sparsities)}
    for name, method in methods(64 if quick else NUM_GRADS).items():
        if quick and name.startswith("OBS"):
            continue
        if quick:
            method = method._replace(recomputes=[min(method.recomputes[0], 2)])
        found = [errors_after(method, params, sparsities) for params in nets]
        raw[name] = found
        rows[name] = [list(column) for column in zip(*found, strict=True)]
        for sparsity, bar, column in zip(sparsities, BARS.get(name, NO_BARS), rows[name], strict=False):
            label = f"{name}, {sparsity:.0%} zeros"
            figures.append(table.Figure(label, statistics.mean(column), "% errors", bar))
    return figures, raw, accuracy(rows, sparsities)


def accuracy(rows: dict[str, list[list[float]]], sparsities: Sequence[float]) -> table.Grid:
    """From the errors."""
    right = {name: [[100 - x for x in cell] for cell in cells] for name, cells in rows.items()}
    return table.Grid("% right, no retraining", [f"{s:.0%} zeros" for s in sparsities], right)


def methods(number: int) -> dict[str, Method]:
    """From the simplest to the best that was found, with a Fisher of so many gradients."""
    plain = functools.partial(example_grads, number=number)
    soft = functools.partial(softened_roots, number=number, temperature=4.0)
    return {
        "magnitude": Method(hj.saliencies.magnitude()),
        "K-FAC, scores, λ = 0.1 mean": Method(KFAC(r(0.1), moves=False)),
        "K-FAC, summed, λ = 0.1 mean": Method(KFAC(r(0.1))),
        "K-FAC, summed, λ = 0.1 mean, 10 recomputes": Method(KFAC(r(0.1)), recomputes=(10, 10, 10)),
        "OBS, summed, λ = 1e-5": Method(hj.saliencies.obs("summed", 1e-5), plain),
        "OBS, joint, λ = 1e-5": Method(hj.saliencies.obs("joint", 1e-5), plain),
        "joint, 10 recomputes": Method(hj.saliencies.obs("joint", r(0.01)), plain, (10, 10, 10)),
        "OBS greedy in blocks of 128, 10 recomputes": Method(
            hj.saliencies.obs("greedy", r(0.1), 128), soft, (10, 5, 5), onward=True
        ),
        "GGN at temperature 4, 64 steps": Method(
            hj.saliencies.obs("joint", r(0.1)), soft, (32, 16, 16), onward=True
        ),
        BEST: Method(
            [hj.saliencies.obs("joint", r(x)) for x in (0.03, 0.1, 0.3)], soft, (32, 16, 16), onward=True
        ),
    }


def errors_after(method: Method, params: Params, sparsities: Sequence[float]) -> list[float]:
    """At each sparsity."""
    found, start = [], params
    for sparsity, recomputes in zip(sparsities, method.recomputes, strict=True):
        pruned = hj.prune_once(
            start,
            method.rule,
            sparsity,
            grads_fn=method.grads,
            recomputes=recomputes,
            loss_fn=training_loss if isinstance(method.rule, list) else None,
        )
        found.append(errors(pruned.params))
        start = pruned.params if method.onward else params
    return found


# -- the problem ---------------------------------------------------------------------------------


def logits(params: Params, x: jax.Array) -> jax.Array:
    """An MLP 64-40-20-10 without biases."""
    for kernel in params[:-1]:
        x = jax.nn.relu(jnp.matmul(x, kernel, precision="highest"))
    return jnp.matmul(x, params[-1], precision="highest")


def loss_fn(params: Params, batch: Any) -> jax.Array:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@jax.jit
def training_loss(params: Params) -> jax.Array:
    return loss_fn(params, data()[0])


@functools.cache
def data() -> tuple[Any, Any]:
    """Training and test images as vectors, with their digits."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels / 16).astype(np.float32), labels.astype(np.int32)
    parts = train_test_split(x, y, test_size=360, stratify=labels, random_state=0)
    with jax.ensure_compile_time_eval():
        train_x, test_x, train_y, test_y = map(jnp.asarray, parts)
    return (train_x, train_y), (test_x, test_y)


def sample(params: Params, number: int) -> Any:
    """The training images that the Fisher is made from."""
    return sample_of(data()[0], params, number)


@functools.partial(jax.jit, static_argnames="number")
def sample_of(images: Any, params: Params, number: int) -> Any:
    """So many of these images: others at every step, known by its zeros."""
    x, y = images
    step = sum(jnp.sum(kernel == 0) for kernel in params)
    chosen = jax.random.permutation(jax.random.key(step), len(x))[:number]
    return x[chosen], y[chosen]


def errors(params: Params) -> float:
    """In percent of the test images."""
    x, y = data()[1]
    return 100 * float(jnp.mean(jnp.argmax(logits(params, x), axis=-1) != y))


def trained(seed: int, epochs: int, sizes: tuple[int, ...] = (64, 40, 20, 10)) -> Params:
    """On the training images."""
    return fitted(data()[0], seed, epochs, sizes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def fitted(images: Any, seed: int, epochs: int, sizes: tuple[int, ...]) -> Params:
    """Adam with a cosine schedule; noise on the images, so that it generalises."""
    x, y = images
    key = jax.random.key(seed)
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    params = tuple(jax.random.normal(k, s) * jnp.sqrt(2 / s[0]) for k, s in zip(keys, shapes, strict=True))
    steps = epochs * (len(x) // 64)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3)

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(key, i), (64,), 0, len(x))
        noise = 0.1 * jax.random.normal(jax.random.fold_in(key, i + steps), (64, sizes[0]))
        grads = jax.grad(loss_fn)(params, (x[chosen] + noise, y[chosen]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]


# -- what the Fisher is made from ----------------------------------------------------------------


def example_grads(params: Params, number: int) -> Any:
    """At the labels of the data: the empirical Fisher."""
    return hj.per_example_grads(loss_fn, params, sample(params, number))


def softened_roots(params: Params, number: int, temperature: float) -> Any:
    """Of so many training images."""
    return roots_of(sample(params, number)[0], params, temperature)


@jax.jit
def roots_of(x: jax.Array, params: Params, temperature: float) -> Any:
    """One row Jᵀ s an image, E s sᵀ = diag(p) − p pᵀ, p the softmax at a temperature: a sample of the GGN."""
    signs = jax.random.rademacher(jax.random.key(3), (len(x), 10), dtype=x.dtype)

    def root(x: jax.Array, signs: jax.Array) -> Params:
        z, pull_back = jax.vjp(lambda p: logits(p, x[None])[0], params)
        p = jax.nn.softmax(z / temperature)
        s = signs * jnp.sqrt(p)
        return pull_back(s - p * jnp.sum(s))[0]

    return jax.vmap(root)(x, signs)


if __name__ == "__main__":
    table.main(__doc__, measure)
