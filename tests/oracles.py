"""Dense references: what the package computes, computed naively in full."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial


@flax.struct.dataclass
class Leaves:
    a_bias: Any
    b_empty: Any
    c_scale: Any
    d_kernel: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PlainLeaves:
    """With a field more than `Leaves`: jax takes different dataclasses with as many fields for the same."""

    a_bias: Any
    b_empty: Any
    c_scale: Any
    d_kernel: Any
    e_nothing: Any = None


CONTAINERS: dict[str, Callable[[dict], Any]] = {
    "dict": lambda leaves: leaves,
    "FrozenDict": flax.core.freeze,
    "tuple": lambda leaves: tuple(leaves.values()),
    "flax dataclass": lambda leaves: Leaves(**leaves),
    "dataclass": lambda leaves: PlainLeaves(**leaves),
    "nnx State": lambda leaves: nnx.State({k: nnx.Param(v) for k, v in leaves.items()}),
}


def leaves(seed: int = 0, dtype: Any = None) -> dict:
    """A small network's params: a vector, an empty leaf, a scalar and a matrix, 10 numbers in all."""
    rng = np.random.default_rng(seed)
    numbers = {
        "a_bias": rng.normal(size=3),
        "b_empty": np.zeros((0, 2)),
        "c_scale": rng.normal(size=()),
        "d_kernel": rng.normal(size=(2, 3)),
    }
    return {k: jnp.asarray(v, dtype) for k, v in numbers.items()}


def batch(num: int = 7, seed: int = 0) -> tuple:
    rng = np.random.default_rng(100 + seed)
    return jnp.asarray(rng.normal(size=(num, 2))), jnp.asarray(rng.normal(size=(num, 3)))


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean squared error of a one-layer network, in any container."""
    x, y = batch
    bias, empty, scale, kernel = (leaf.astype(x.dtype) for leaf in jax.tree.leaves(params))
    out = scale * jnp.tanh(x @ kernel + bias[None])
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1)) + jnp.sum(empty)


def dense_hessian(loss: Callable, params: Any, *args: Any) -> np.ndarray:
    unravel = unraveller(params)
    hessian = jax.jit(jax.hessian(lambda v, *args: loss(unravel(v), *args)))
    return np.asarray(hessian(flat(params), *args))


def flat(tree: Any) -> np.ndarray:
    """All leaves end to end; in numpy, like all here that needs no derivative: it compiles nothing."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def unraveller(like: Any) -> Callable:
    """`ravel_pytree`'s way back, found without running anything."""
    found: list[Callable] = []

    def record(tree: Any) -> jax.Array:
        vector, unravel = ravel_pytree(tree)
        found.append(unravel)
        return vector

    jax.eval_shape(record, like)
    return found[0]


def tree_of(vector: Any, like: Any) -> Any:
    """A vector as a tree like `like`, dtypes included."""
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(np.asarray(vector), np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(part.reshape(np.shape(leaf)), leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ],
    )


def matrix_of(matvec: Callable, like: Any) -> np.ndarray:
    """A matvec's matrix, column by column."""
    columns = [flat(matvec(tree_of(e, like))) for e in np.eye(flat(like).size)]
    return np.stack(columns, axis=1)


def matvec_of(matrix: Any, like: Any) -> Partial:
    """The matvec of a dense symmetric matrix on vectors like `like`."""
    return Partial(_dense_product, jnp.asarray(matrix), Partial(unraveller(like)))


def _dense_product(matrix: jax.Array, unravel: Callable, vector: Any) -> Any:
    return unravel(matrix @ ravel_pytree(vector)[0])


def symmetric(eigenvalues: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A random symmetric matrix with these eigenvalues, and its eigenvectors (columns)."""
    d = len(eigenvalues)
    vectors, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return (vectors * np.asarray(eigenvalues)) @ vectors.T, vectors


def student(n: int) -> float:
    """The factor of few samples, n of them; `test_moments` holds it against SciPy."""
    return sum(c / (n - 1) ** k for k, c in enumerate((1, 1.25, 1.522, 1.567, 0.337, 1.308)))


def skewness_share(samples: Any, positive: Any = None) -> np.ndarray:
    """γ²/n by the rule for skewed samples, along the first axis; `positive` is what they vary above 0 by."""
    n, mean, s = len(samples), np.mean(samples, 0), np.std(samples, 0, ddof=1)
    positive = mean if positive is None else np.mean(positive, 0)
    own = np.abs(np.mean((samples - mean) ** 3, 0) / np.std(samples, 0) ** 3) + 1.5 * np.sqrt(6 / n)
    return np.minimum(np.minimum(own, 3 * s / np.abs(positive)), np.sqrt(8)) ** 2 / n


def standard_error(samples: Any, positive: Any = None) -> np.ndarray:
    """Of a mean of few samples, which may be skewed, along the first axis."""
    n, s = len(samples), np.std(samples, 0, ddof=1)
    return student(n) * (1 + 2 * skewness_share(samples, positive)) * s / np.sqrt(n)


def rows(block: Any) -> np.ndarray:
    """A block as a matrix, one vector a row."""
    parts = [np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(block)]
    return np.concatenate(parts, axis=1)


def tree_like(d: int, dtype: Any = None) -> dict:
    """A pytree of d ≥ 6 zeros in a scalar, an empty, a matrix and a vector leaf."""
    shapes = {"empty": (0, 3), "matrix": (2, 2), "scalar": (), "vector": (d - 5,)}
    return {k: jnp.asarray(np.zeros(shape), dtype) for k, shape in shapes.items()}


def close(a: Any, b: Any, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Assert that two pytrees agree, leaf by leaf."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def check_recurrence(space: Any, matrix: Any) -> None:
    """Q is orthonormal, T = QᵀAQ, and AQ − QT is what couples to the pending rows."""
    n, width = int(space.size), space.width
    together = np.concatenate([rows(chunk) for chunk in space.basis])[: n + width]
    Q, following = together[:n], together[n:]
    np.testing.assert_allclose(together @ together.T, np.eye(n + width), atol=1e-13)
    T = np.tril(space.projected[:n, :n]) + np.tril(space.projected[:n, :n], -1).T
    np.testing.assert_allclose(Q @ matrix @ Q.T, T, atol=1e-13)
    coupling = np.asarray(space.coupling())[:, :n]
    np.testing.assert_allclose(matrix @ Q.T - Q.T @ T, following.T @ coupling, atol=1e-13)
