"""The networks in JAX: read from a file, or trained and written to one; and the truth about them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from flax import linen as nn

import hessjax as hj
from hessjax.flax import linen_loss, linen_model
from peers.problems import Problem

Batch = tuple[jax.Array, jax.Array]


class ConvNet(nn.Module):
    """3×3 convolutions with BatchNorm, every one but the first at stride 2, and the mean over positions."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images (batch, height, width, 1)."""
        for i, channels in enumerate(self.channels):
            x = nn.Conv(channels, (3, 3), 2 if i else 1, padding=1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


MODULES: dict[str, Callable[..., nn.Module]] = {
    "MLP": models.MLP,
    "ResNet": models.ResNet,
    "encoder": models.Transformer,
    "conv net": ConvNet,
}
OPTIONS = {
    "MLP": ("widths",),
    "ResNet": ("blocks", "channels"),
    "encoder": ("layers", "width", "heads", "vocabulary"),
    "conv net": ("channels",),
}


class Network(NamedTuple):
    """A loss at its weights: `loss_fn(params, batch, *state)`."""

    module: nn.Module
    params: Any
    state: tuple[Any, ...]
    data: Batch
    batches: list[Batch]
    vector: Any

    @property
    def loss_fn(self) -> Callable[..., jax.Array]:
        """The mean cross-entropy of a batch."""
        return linen_loss(self.module, models.cross_entropy)

    @property
    def model_fn(self) -> Callable[..., jax.Array]:
        """The logits of a batch."""
        return linen_model(self.module)


def load(problem: Problem) -> Any:
    """The network of a file; a problem without one is its own numbers."""
    if problem.kind not in MODULES:
        return problem
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in problem.options.items()}
    params, state, vector = (
        jax.tree.map(jnp.asarray, problem.tree(x)) for x in ("params", "state", "vector")
    )
    batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in problem.batches()]
    data = jnp.asarray(problem.arrays["x"]), jnp.asarray(problem.arrays["y"])
    module = MODULES[problem.kind](**options)
    return Network(module, params, (state,) if state else (), data, batches, vector)


def loss(network: Network) -> float:
    """At all the data."""
    return float(jax.jit(network.loss_fn)(network.params, network.data, *network.state))


@jax.jit
def _norm_and_part(product: Any, vector: Any) -> tuple[jax.Array, jax.Array]:
    return optax.tree.norm(product), optax.tree.vdot(product, vector)


def summary(product: Any, vector: Any) -> dict[str, float]:
    """Norm, and part along the vector: enough to tell that two products are the same."""
    norm, along = map(float, _norm_and_part(product, vector))
    return {"norm": norm, "along": along}


def untrained(kind: str, quick: bool) -> Problem:
    """One of the networks of `models.py`, and a vector to multiply."""
    makers = {"MLP": models.mlp, "ResNet": models.resnet, "encoder": models.transformer}
    problem = makers[kind](quick)
    data, *state = problem.args
    return _problem(kind, problem.model_fn.module, problem.params, state, data)


def trained_mlp(widths: tuple[int, ...], steps: int) -> Problem:
    """On all the digits of scikit-learn."""
    problem = models.trained_on_digits(widths, steps)
    return _problem("MLP", models.MLP(widths), problem.params, [], problem.args[0])


def trained_conv_net(channels: tuple[int, ...], examples: int, steps: int) -> Problem:
    """On the first digits of scikit-learn, its BatchNorms on their own batch, the running statistics kept."""
    from sklearn.datasets import load_digits  # here: it takes longer to import than jax

    pixels, labels = load_digits(return_X_y=True)
    images = jnp.asarray(pixels[:examples].reshape(-1, 8, 8, 1) / 16, jnp.float32)
    batch, module, tx = (
        (images, jnp.asarray(labels[:examples], jnp.int32)),
        ConvNet(channels),
        optax.adam(3e-3),
    )
    variables = jax.jit(module.init)(jax.random.key(0), images)

    def loss_fn(params: Any, stats: Any) -> tuple[jax.Array, Any]:
        given = {"params": params, "batch_stats": stats}
        logits, new = module.apply(given, images, train=True, mutable=["batch_stats"])
        return models.cross_entropy(logits, batch), new["batch_stats"]

    @jax.jit
    def step(params: Any, stats: Any, state: Any) -> tuple[Any, Any, Any]:
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), stats, state

    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    for _ in range(steps):
        params, stats, state = step(params, stats, state)
    return _problem("conv net", module, params, [{"batch_stats": stats}], batch)


def all_eigenvalues(problem: Problem) -> np.ndarray:
    """Of the Hessian at all the data, in float64, smallest first."""
    with jax.enable_x64(True):
        network = _in_float64(problem)
        flat, unravel = jax.flatten_util.ravel_pytree(network.params)

        @jax.jit
        def column(flat: jax.Array, vector: jax.Array, data: Batch) -> jax.Array:
            grad = jax.grad(lambda w: network.loss_fn(unravel(w), data, *network.state))
            return jax.jvp(grad, (flat,), (vector,))[1]

        matrix = np.stack([column(flat, e, network.data) for e in np.eye(flat.size)])
    return np.linalg.eigvalsh((matrix + matrix.T) / 2)


def largest_eigenvalues(problem: Problem, k: int) -> np.ndarray:
    """Converged in float64, largest first."""
    with jax.enable_x64(True):
        network = _in_float64(problem)
        A = hj.hessian(network.loss_fn, network.params, network.data, *network.state, linearize=True)
        pairs = hj.eigenpairs(
            A, jax.random.key(0), network.params, k, "largest", max_matvecs=1000, tol=hj.relative(1e-8)
        )
        assert bool(jnp.all(pairs.converged)), pairs
        return np.asarray(pairs.values)


def exact_trace(problem: Problem) -> float:
    """Of the Hessian of a network of ReLUs."""
    return sum(exact_traces(problem).values())


def exact_traces(problem: Problem) -> dict[str, float]:
    """Of the Hessian of a network of ReLUs, leaf by leaf: they are the Gauss–Newton matrix's.

    The outputs are piecewise linear in any one weight, so the other part of the Hessian has a diagonal of
    zeros; and the trace of Σ rrᵀ is Σ ‖r‖².
    """
    network = load(problem)
    images, labels = network.data
    totals = np.zeros(len(jax.tree.leaves(network.params)))
    for start in range(0, len(images), 64):
        batch = images[start : start + 64], labels[start : start + 64]
        roots = hj.ggn_roots(
            network.model_fn, network.params, batch, *network.state, likelihood=hj.likelihoods.categorical
        )
        rows = jax.tree.leaves(roots)
        squares = [float(jnp.sum(jnp.square(leaf), dtype=jnp.float32)) for leaf in rows]
        totals += np.array(squares) / len(rows[0]) * len(batch[0])
    return dict(zip(paths(network.params), (totals / len(images)).tolist(), strict=True))


def paths(params: Any) -> list[str]:
    """Of every leaf, as in a problem's arrays."""
    found = jax.tree_util.tree_leaves_with_path(params)
    return ["/".join(entry.key for entry in path) for path, _ in found]


def _in_float64(problem: Problem) -> Network:
    arrays = {k: np.float64(a) if a.dtype == np.float32 else a for k, a in problem.arrays.items()}
    return load(problem._replace(arrays=arrays))


def _problem(kind: str, module: nn.Module, params: Any, state: list[Any], data: Batch) -> Problem:
    vector = jax.tree.map(lambda x: models.normal(2, x.shape), params)
    trees = {"params": params, "vector": vector, **({"state": state[0]} if state else {})}
    arrays = {
        f"{name}/{path}": np.asarray(leaf)
        for name, tree in trees.items()
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
    }
    x, y = (np.asarray(a) for a in data)
    options = {name: getattr(module, name) for name in OPTIONS[kind]}
    return Problem(kind, options, {**arrays, "x": x, "y": y}, [])
