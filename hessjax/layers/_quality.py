"""How far an approximation is from the matrix it stands for: by leaf, and in the leading eigenvectors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._messages import checked_any_key, checked_count, checked_function, checked_instance
from hessjax._core._numbers import power_of_two
from hessjax._core._results import Eigenpairs, by_shapes, is_known
from hessjax._core._tables import Column, Row, Table, number, percent, printable
from hessjax._core._types import Key, Matvec, Params, Scalar, Vector
from hessjax.estimators.probes import rademacher


@printable
class Quality(NamedTuple):
    """The error of an approximation K of a matrix F, in Frobenius norms.

    Attributes:
        errors: (leaves,) ‖K_ll − F_ll‖ / ‖F_ll‖ for the diagonal block of every leaf.
        stderr: (leaves,) their standard errors; infinite with one probe.
        norms: (leaves,) ‖F_ll‖.
        error: ‖K − F‖ / ‖F‖ of the whole matrices.
        outside: the part of ‖F‖² that lies outside the leaves' blocks, which no K in blocks has.
        captured: (k,) vᵀKv / θ for the eigenpairs given: the part of F's curvature along each that K has, 1
            being all. None without any.
        num_matvecs: how many products with F it took.
        paths: of the leaves.
    """

    errors: Float[Array, " leaves"]
    stderr: Float[Array, " leaves"]
    norms: Float[Array, " leaves"]
    error: Scalar
    outside: Scalar
    captured: Float[Array, " k"] | None
    num_matvecs: int
    paths: tuple[str, ...]

    def _table(self) -> Table | str:
        if not is_known(self._replace(paths=())):
            return by_shapes(self)
        columns = (Column("Leaf", "name"), Column("Norm", rank=1), Column("Error"), Column("±"))
        found = zip(self.paths, self.norms, self.errors, self.stderr, strict=True)
        rows = tuple(Row((path, number(n), number(e), number(s, 2))) for path, n, e, s in found)
        whole = (
            f"The whole matrix: error {number(self.error)}; {percent(float(self.outside))} % of its square "
        )
        notes = [f"{whole}lies outside the blocks. {self.num_matvecs:,} products."]
        if self.captured is not None:
            notes.append(f"Captured of the eigenpairs given: {', '.join(map(number, self.captured))}.")
        return Table(columns, rows, notes=tuple(notes))


def quality(
    approximation: Matvec,
    matvec: Matvec,
    key: Key,
    like: Params,
    *,
    num_probes: int = 4,
    pairs: Eigenpairs | None = None,
) -> Quality:
    """How far an approximation is from the matrix it stands for, by products with both, called from the host.

    Each probe is a vector of random signs z on one leaf and zero elsewhere: ‖(K − F)z‖² is on average the
    squared norm of the leaf's columns of K − F, and of its block what lies on the leaf again.

    Args:
        approximation: K, such as `kfac` gives.
        matvec: F, the matrix that K stands for, such as `fisher` or `ggn` of the same data.
        key: random key of the probes.
        like: pytree like the vectors; usually the params.
        num_probes: how many for each leaf.
        pairs: eigenpairs of F, to see how much of each K captures.

    Returns:
        A `Quality`, which prints as a table.

    Raises:
        TypeError: a matvec that is no function; `pairs` that are none.
        ValueError: `num_probes` below 1; products that are not like `like`.

    Cost:
        `num_probes` products with both for each leaf, and one with K for each eigenpair.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> F = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> K = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 0.0]))
        >>> float(hj.layers.quality(K, F, jax.random.key(0), jnp.zeros(2)).error.round(4))
        0.8
    """
    for name, function in {"approximation": approximation, "matvec": matvec}.items():
        checked_function(name, function, "(vector) -> vector")
    if pairs is not None:
        checked_instance("pairs", pairs, Eigenpairs, "hessjax.eigenpairs(matvec, key, params)")
    num_probes, key = checked_count("num_probes", num_probes), checked_any_key(key)
    _tree.check_floating(like, "like")
    count = len(jax.tree.leaves(like))
    norms = []
    for index in range(count):
        for probe in jax.random.split(jax.random.fold_in(key, index), num_probes):
            vector = _on_leaf(index, probe, like)
            product, approximate = matvec(vector), approximation(vector)
            _tree.check_vector(product, like, "matvec(vector)", "like")
            _tree.check_vector(approximate, like, "approximation(vector)", "like")
            norms.append(_norms(index, product, approximate))
    found: tuple[Array, Array, Array, Array, Array] = _errors(jnp.stack(norms).reshape(count, num_probes, 4))
    captured = None if pairs is None else _captured(approximation, pairs, like)
    paths = tuple(_tree.leaf_paths(like))
    return Quality(*found, captured, count * num_probes, paths)


@functools.partial(jax.jit, static_argnums=0)
def _on_leaf(index: int, key: Key, like: Params) -> Vector:
    """Signs on one leaf, zeros on the others."""
    leaves, structure = jax.tree.flatten(_tree.zeros_like(like))
    if leaves[index].size:
        leaves[index] = rademacher(key, leaves[index]).astype(leaves[index].dtype)
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnums=0)
def _norms(index: int, product: Vector, approximate: Vector) -> Float[Array, "4"]:
    """‖Fz‖ and ‖(K − F)z‖, on the leaf and everywhere."""
    product, approximate = _tree.wide(product), _tree.wide(approximate)
    both = product, _tree.add_scaled(approximate, -1, product)
    return jnp.stack([*(_tree.norm(jax.tree.leaves(x)[index]) for x in both), *map(_tree.norm, both)])


@jax.jit
def _errors(
    norms: Float[Array, "leaves probes 4"],
) -> tuple[Array, Array, Array, Array, Array]:
    # Every leaf in units of its own: squares of what is small, or large, leave float32.
    units = jax.vmap(power_of_two)(norms[..., :2])
    squares = (norms[..., :2] / units[:, None, None]) ** 2
    block, wrong = squares.mean(axis=1).T
    errors = jnp.sqrt(_over(wrong, block))
    # Of the root of a ratio of means, to first order: the spread of wrong − errors² · block.
    spread = jnp.std(squares[..., 1] - errors[:, None] ** 2 * squares[..., 0], axis=1, ddof=1)
    stderr = _over(spread / jnp.sqrt(squares.shape[1]), 2 * errors * block)
    stderr = jnp.where(squares.shape[1] > 1, stderr, jnp.inf)
    blocks, columns, missed = (_tree.norm(norms[..., i]) for i in (0, 2, 3))
    return (
        errors,
        stderr,
        units * jnp.sqrt(block),
        _over(missed, columns),
        1 - _over(blocks, columns) ** 2,
    )


def _over(a: Array, b: Array) -> Array:
    """a/b; where b is 0, 0 if a is too, and infinite if it is not."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), jnp.where(a > 0, jnp.inf, 0))


def _captured(approximation: Matvec, pairs: Eigenpairs, like: Params) -> Float[Array, " k"]:
    vectors = [_tree.cast_like(v, like) for v in _tree.rows(pairs.vectors)]
    parts = [_tree.inner(_tree.wide(v), _tree.wide(approximation(v))) for v in vectors]
    return jnp.stack(parts).astype(pairs.values.dtype) / pairs.values
