"""K-FAC and EKFAC: from the moments of every layer to matrices with inverses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from hessjax._core import _numbers
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_instance
from hessjax._core._sources import Source
from hessjax._core._types import Key, Params
from hessjax.curvature._batches import add, zero
from hessjax.curvature._product import at_precision, explained
from hessjax.layers._capture import Layout
from hessjax.layers._gradients import tapped_batch
from hessjax.layers._kronecker import Factors, Kronecker, Structure
from hessjax.layers._moments import LayerMoments, mean
from hessjax.layers._problem import Layouts, Rules, check_listed, parts_of
from hessjax.layers._sides import Moments, combined
from hessjax.layers._taps import Tapped


def kfac(moments: LayerMoments) -> Kronecker:
    """K-FAC: for every leaf L ⊗ R, the moments of both sides of its matrices.

    It is the diagonal block of the Gauss–Newton matrix (the Fisher) where its two sides are independent: with
    one example and one use of the leaf in it; in linear networks with square loss. Where a leaf has several
    uses, as a tied embedding, it is the nearest Kronecker product to the sum of theirs. Biases and scales
    have blocks of their own.

    Args:
        moments: what `hessjax.layers.moments` gives.

    Returns:
        A `Kronecker`: a matvec with `.inverse(damping)`, `.log_determinant(damping)`, `.trace()` and
        `.diagonal()`, in the units of the Fisher.

    Raises:
        TypeError: `moments` are none.

    Cost:
        9·left³ + 9·right³ operations for each matrix, and left² + right² + left·right numbers of memory. A
        product costs 4·(left + right) operations for each weight.

    References:
        Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
        arXiv 1503.05671.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> K = hj.layers.kfac(hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian))
        >>> K(jnp.array([[1.0], [0.0]])).round(4).tolist(), float(K.trace().round(4))
        ([[1.0], [1.0]], 3.0)
        >>> K.inverse(1.0)(jnp.array([[1.0], [0.0]])).round(4).tolist()  # of [[2, 1], [1, 3]]
        [[0.6], [-0.2]]
    """
    checked_instance("moments", moments, LayerMoments, "hessjax.layers.moments(model_fn, params, batches)")
    return Kronecker(_structure(moments), _decomposed(moments.leaves))


def ekfac(moments: LayerMoments, batches: Source) -> Kronecker:
    """EKFAC: K-FAC with the eigenvalues that its eigenvectors have in the Fisher itself.

    In the eigenvectors of `kfac` D = E[(U_Lᵀ G U_R)²], with G the gradient of an example with respect to a
    matrix, over all of its positions and uses. No other diagonal in this basis is nearer to the Fisher's
    block in the Frobenius norm, K-FAC's not either; and the trace is exact. Where the moments of a side are
    singular, as with fewer examples and positions than it is wide, its eigenvectors of zero are any, and so
    are the eigenvalues along them.

    Args:
        moments: what `hessjax.layers.moments` gives.
        batches: the batches that the moments are of, once more; one batch is put into a list.

    Returns:
        A `Kronecker`, as `kfac` gives it; its inverse is the exact one only.

    Raises:
        TypeError: `moments` are none; `batches` cannot be iterated.
        ValueError: as `moments`.

    Cost:
        As `moments`, where in the place of I² + O² the products cost 2·(I + O) operations for each position
        and side, and one gradient for each example and row (of an embedding that is used once, as many
        operations as the square of its positions times its width); and as `kfac`.

    References:
        George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored eigenbasis,
        arXiv 1806.03884.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(w, x):
        ...     return x @ w
        >>> w, x = jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> moments = hj.layers.moments(model_fn, w, [x], likelihood=hj.likelihoods.gaussian)
        >>> float(hj.layers.ekfac(moments, [x]).trace().round(4))
        3.0
    """
    checked_instance("moments", moments, LayerMoments, "hessjax.layers.moments(model_fn, params, batches)")
    check_listed(batches)
    problem, leaves = moments.problem, _decomposed(moments.leaves)
    bases = tuple((leaf.left, leaf.right) for leaf in leaves)
    total, count = None, 0.0
    for part in parts_of(problem, batches):
        data = problem.fn, problem.params, part.args, part.shares, part.keys
        with explained("fn"):
            found = _part_values(problem.rules, part.layouts, bases, *data)
        total = add(zero(found) if total is None else total, part.weight, found)
        count += part.weight
    values = mean(total, count)
    leaves = tuple(leaf._replace(values=x, sides=None) for leaf, x in zip(leaves, values, strict=True))
    return Kronecker(_structure(moments), leaves)


def _structure(moments: LayerMoments) -> Structure:
    tree = jax.tree.structure(moments.problem.params)
    return Structure(tree, tuple(layouts[0].moves for layouts in moments.layouts))


@jax.jit
def _decomposed(leaves: tuple[tuple[Moments, ...], ...]) -> tuple[Factors, ...]:
    return tuple(_factors(combined(uses)) for uses in leaves)


def _factors(sides: Moments) -> Factors:
    (left, left_values), (right, right_values) = map(_eigen, sides)
    values = left_values[:, :, None] * right_values[:, None, :]
    return Factors(left, right, values, (left_values, right_values))


def _eigen(side: Array) -> tuple[Array | None, Array]:
    """Eigenvectors, None for a diagonal, and eigenvalues."""
    if side.ndim == 2:
        return None, side
    if side.shape[-1] < 2:
        return None, jnp.diagonal(side, axis1=1, axis2=2)
    values, vectors = jax.vmap(_numbers.eigh)(side)
    # Semidefinite by construction: what is below zero are rounding errors.
    return vectors, jnp.maximum(values, 0)


# -- the eigenvalues of EKFAC ----------------------------------------------------------------------


@compiled(static_argnums=1)
def _part_values(
    rules: Rules,
    layouts: Layouts,
    bases: tuple[tuple[Array | None, Array | None], ...],
    fn: Partial,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, "n ..."],
    keys: Key | None,
) -> tuple[Array, ...]:
    with at_precision(rules.precision):
        found = tapped_batch(rules.gradients, fn, params, args, shares, keys)
        return tuple(_squares(*each) for each in zip(layouts, bases, found, strict=True))


def _squares(
    layouts: tuple[Layout, ...], basis: tuple[Array | None, Array | None], uses: tuple[Tapped, ...]
) -> Float[Array, "s l r"]:
    """Σ (U_Lᵀ G U_R)² over examples and rows."""
    rotated = tuple(_rotated(*each, basis) for each in zip(layouts, uses, strict=True))
    if len(layouts) == 1 and not layouts[0].is_lookup and rotated[0].inputs.shape[1] == 1:
        # At one position the square of the outer product is that of the squares.
        (use,) = rotated
        return jnp.einsum("nsl,nrso->slo", use.inputs[:, 0] ** 2, use.gradients[:, :, 0] ** 2)
    shape = layouts[0].shape
    if len(layouts) == 1 and layouts[0].is_lookup:
        return _lookup_squares(shape, rotated[0])
    start = jnp.zeros(shape, rotated[0].gradients.dtype)
    # One example after the other: its gradient is as large as the leaf.
    return jax.lax.scan(functools.partial(_with_example, layouts), start, rotated)[0]


def _lookup_squares(shape: tuple[int, int, int], use: Tapped) -> Float[Array, "s v r"]:
    """Those of an embedding, without a table for each example: (Σ g)² = Σ g · (Σ g) over positions."""
    rows, gradients = use
    equal = (rows[:, :, None] == rows[:, None]).astype(gradients.dtype)
    sums = jnp.einsum("npqs,nrqso->nrpso", equal, gradients)
    stack = jnp.broadcast_to(jnp.arange(shape[0]), rows.shape)
    return jnp.zeros(shape, gradients.dtype).at[stack, rows].add((gradients * sums).sum(axis=1))


def _with_example(
    layouts: tuple[Layout, ...], total: Float[Array, "s l r"], uses: tuple[Tapped, ...]
) -> tuple[Float[Array, "s l r"], None]:
    """The sum with the squares of one example, row by row."""

    def add_row(total: Array, rows: list[Array]) -> tuple[Array, None]:
        parts = [
            layout.oriented(layout.products(use.inputs, row))
            for layout, use, row in zip(layouts, uses, rows, strict=True)
        ]
        return total + sum(parts[1:], parts[0]) ** 2, None

    return jax.lax.scan(add_row, total, [use.gradients for use in uses])[0], None


def _rotated(layout: Layout, use: Tapped, basis: tuple[Array | None, Array | None]) -> Tapped:
    """Inputs and output gradients in the eigenvectors of their sides."""
    inside, outside = basis[::-1] if layout.swapped else basis
    inputs, gradients = use
    if inside is not None:
        inputs = jnp.einsum("npsi,sij->npsj", inputs, inside)
    if outside is not None:
        gradients = jnp.einsum("nrpso,soq->nrpsq", gradients, outside)
    return Tapped(inputs, gradients)
