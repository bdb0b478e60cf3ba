"""The two sides of a leaf's matrices: second moments of what goes in and of what comes back."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax.layers._capture import Layout
from hessjax.layers._taps import Tapped

Positions: TypeAlias = Literal["expand", "reduce"]
"""How positions that share a matrix count: each by itself, or by their mean input and summed gradient."""


class Moments(NamedTuple):
    """Second moments of one use of a leaf, its matrices W being a stack of (left, right).

    Attributes:
        left: (stack, left, left), or only the diagonals, (stack, left).
        right: (stack, right, right), or only the diagonals, (stack, right).
    """

    left: Array
    right: Array


def diagonal_sides(layouts: Sequence[Layout], max_width: int) -> tuple[bool, bool]:
    """Which sides of a leaf have diagonal moments: those of numbers of rows, and those too wide."""
    _, left, right = layouts[0].shape
    rows = {layout.swapped for layout in layouts if layout.is_lookup}
    return left > max_width or False in rows, right > max_width or True in rows


def use_moments(
    layout: Layout,
    diagonal: tuple[bool, bool],
    positions: Positions,
    use: Tapped,
    shares: Float[Array, "n ..."],
) -> Moments:
    """The moments of one use over a batch of examples.

    With weights w of examples n and positions t that sum to 1, and rows g that hold the roots of theirs:
    "expand" has Σ w a aᵀ and Σ g gᵀ over all n and t; "reduce" takes the mean of a and the sum of g over t
    first (Eschenhagen et al., 2023, §3).

    Args:
        layout: of the use.
        diagonal: of the leaf's sides.
        positions: how they count.
        use: inputs and output gradients, examples first.
        shares: the weights of examples, or of examples and positions.
    """
    is_diagonal = diagonal[::-1] if layout.swapped else diagonal
    weights = by_position(layout.positions, shares).astype(use.gradients.dtype)
    gradients = use.gradients
    if positions == "reduce":
        gradients = gradients.sum(axis=2, keepdims=True)
    if layout.is_lookup:
        inputs = _counts(layout.shape[1], positions, use.inputs, weights)
    else:
        inputs = _input_moment(is_diagonal[0], positions, use.inputs, weights)
    outputs = _moment(is_diagonal[1], _rows(gradients, 3))
    return Moments(outputs, inputs) if layout.swapped else Moments(inputs, outputs)


def by_position(positions: tuple[int, ...], shares: Float[Array, "n ..."]) -> Float[Array, "n p"]:
    """The weight of every example at every position of a use.

    Where the positions are those that the weights tell apart, as the tokens of a padding mask, they count by
    them; anywhere else all positions of an example count alike.
    """
    count, size = shares.shape[0], 1
    for n in positions:
        size *= n
    if shares.ndim > 1 and [n for n in positions if n > 1] == [n for n in shares.shape[1:] if n > 1]:
        return shares.reshape(count, size)
    own = shares.reshape(count, -1).sum(axis=1, keepdims=True)
    return jnp.broadcast_to(own / max(size, 1), (count, size))


def _input_moment(
    is_diagonal: bool, positions: Positions, inputs: Float[Array, "n p s i"], weights: Float[Array, "n p"]
) -> Array:
    if positions == "reduce":
        own, means = _within(weights)
        inputs, weights = jnp.einsum("npsi,np->nsi", inputs, means)[:, None], own[:, None]
    rows = jnp.sqrt(weights)[..., None, None] * inputs
    return _moment(is_diagonal, _rows(rows, 2))


def _within(weights: Float[Array, "n p"]) -> tuple[Float[Array, " n"], Float[Array, "n p"]]:
    """The weight of every example, and of its positions among themselves."""
    own = weights.sum(axis=1)
    return own, weights / jnp.where(own > 0, own, 1)[:, None]


def _rows(x: Array, count: int) -> Float[Array, "m s k"]:
    """The first axes, so many, as one: by their lengths, as sides may be empty."""
    return x.reshape(math.prod(x.shape[:count]), *x.shape[count:])


def _moment(is_diagonal: bool, rows: Float[Array, "m s k"]) -> Array:
    """Σ over the rows."""
    return jnp.einsum("msk,msk->sk" if is_diagonal else "msk,msl->skl", rows, rows)


def _counts(
    length: int, positions: Positions, rows: Array, weights: Float[Array, "n p"]
) -> Float[Array, "s v"]:
    """The diagonal of the moments of one-hot vectors, given by the numbers of their rows, (n, p, s)."""
    if positions == "reduce":
        own, means = _within(weights)
        # The squared mean of one-hot vectors: at every position the weight of all positions of equal row.
        equal = (rows[:, :, None] == rows[:, None]).astype(means.dtype)
        weights = own[:, None, None] * means[..., None] * jnp.einsum("npqs,nq->nps", equal, means)
    else:
        weights = jnp.broadcast_to(weights[..., None], rows.shape)
    stack = jnp.broadcast_to(jnp.arange(rows.shape[-1]), rows.shape)
    return jnp.zeros((rows.shape[-1], length), weights.dtype).at[stack, rows].add(weights)


# -- several uses of one leaf ----------------------------------------------------------------------


def combined(uses: Sequence[Moments]) -> Moments:
    """The Kronecker product nearest to the sum of those of several uses, in the Frobenius norm.

    Σ Lᵤ ⊗ Rᵤ, its entries in the order vec L · vec Rᵀ, is a matrix of rank at most the number of uses, of
    which the nearest one of rank 1 is wanted. All Lᵤ and Rᵤ being positive semidefinite, so are the factors:
    inner products of such matrices are not negative, hence nor is the leading vector of their products.

    References:
        Van Loan & Pitsianis (1993), Approximation with Kronecker products.
    """
    if len(uses) == 1:
        return uses[0]
    lefts, rights = (jnp.stack(sides) for sides in zip(*uses, strict=True))
    with jax.default_matmul_precision("highest"):
        return jax.vmap(_nearest, in_axes=1)(lefts, rights)


def _nearest(lefts: Float[Array, "u ..."], rights: Float[Array, "u ..."]) -> Moments:
    """Of one matrix of the stack."""
    lefts, rights, unit = _balanced(lefts, rights)
    gram_left, gram_right = _gram(lefts), _gram(rights)
    # With P and Q the columns vec L and vec R, PQᵀ has the singular vectors Px and Qy of σ, where
    # y = (PᵀP)x and σ²x = (QᵀQ)y: by the symmetric form, with c its leading vector, y = (PᵀP)^½ c.
    values, vectors = jnp.linalg.eigh(gram_left)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0))[None]) @ vectors.T
    squares, leading = jnp.linalg.eigh(root @ gram_right @ root)
    y = jnp.abs(root @ leading[:, -1])  # of one sign (Perron), up to rounding
    x = gram_right @ y / jnp.where(squares[-1] > 0, squares[-1], 1)
    return Moments(jnp.tensordot(x, lefts, 1), unit * jnp.tensordot(y, rights, 1))


def _balanced(lefts: Array, rights: Array) -> tuple[Array, Array, Array]:
    """The same products over their largest norm, both sides of each equally large."""
    # Gradients' moments are so small that their squares leave float32.
    norms = [jnp.sqrt(jnp.diagonal(_gram(x / _largest(x)))) * _largest(x).ravel() for x in (lefts, rights)]
    both = norms[0] * norms[1]
    unit = jnp.max(both)
    share = jnp.sqrt(both / jnp.where(unit > 0, unit, 1))
    factors = [share / jnp.where(n > 0, n, 1) for n in norms]
    scaled = [f.reshape(-1, *[1] * (x.ndim - 1)) * x for f, x in zip(factors, (lefts, rights), strict=True)]
    return scaled[0], scaled[1], unit


def _largest(x: Array) -> Array:
    """The largest entry of each, or 1 if there is none but zeros."""
    top = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True)
    return jnp.where(top > 0, top, 1)


def _gram(x: Float[Array, "u ..."]) -> Float[Array, "u u"]:
    return jnp.tensordot(x, x, axes=([*range(1, x.ndim)],) * 2)
