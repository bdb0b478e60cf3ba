"""Derivatives held against central differences, leaf by leaf, and how far the differences can be trusted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax import _tree
from hessjax._typing import Key, LossFn, Matvec, Params, Vector
from hessjax.curvature.product import at_precision, scalar
from hessjax.spectral.probes import gaussian, rademacher

STEPS = (1.0, 2**0.5, 2.0)
"""Multiples of the basic step: what a difference changes by between them is its doubt."""

MOST_GROUPS = 16
"""Leaves are tested on their own up to this number, and beyond it in groups, to spare evaluations."""


class Comparison(NamedTuple):
    """A derivative against differences, one entry for each leaf or group of leaves.

    Attributes:
        leaves: which leaves, by index.
        error: the disagreement, relative to what is compared plus a hundredth of the whole, so that a leaf
            of mere rounding is not held against its own size.
        doubt: how much the disagreement changes with the step (truncation, kinks, rounding), likewise.
    """

    leaves: list[list[int]]
    error: np.ndarray
    doubt: np.ndarray


def compare_gradient(
    loss_fn: LossFn, params: Params, args: tuple[Any, ...], key: Key, eps: float
) -> Comparison:
    """The gradient against (f(p + hv) − f(p − hv)) / 2h, with h near eps^⅓ of the weights.

    v is half along the gradient, for a strong signal, and half random, so that a gradient which is zero
    by mistake has a signal at all.
    """
    value, grads = loss_and_gradient(loss_fn, params, args)
    direction, sizes = _toward(grads, gaussian(key, params), params)
    steps = eps ** (1 / 3) * np.asarray(sizes, float)

    def slopes(leaves: list[int]) -> tuple[float, float, float]:
        here = steps * np.isin(np.arange(len(steps)), leaves)
        pairs = [_slopes(loss_fn, params, args, grads, direction, here * factor) for factor in STEPS]
        measured, expected = np.array(jax.device_get(pairs), float).T
        rounding = 4 * eps * abs(float(value)) / (np.linalg.norm(here) or np.inf)
        wrong = measured - expected
        return abs(wrong[0]), np.ptp(wrong) + rounding, max(abs(measured[0]), abs(expected[0]))

    groups = [g.tolist() for g in np.array_split(np.arange(len(steps)), min(len(steps), MOST_GROUPS))]
    return _relative(groups, np.array([slopes(group) for group in groups]))


def compare_product(
    matvec: Matvec, loss_fn: LossFn, params: Params, args: tuple[Any, ...], key: Key, eps: float
) -> Comparison:
    """The product Hv against (∇f(p + hv) − ∇f(p − hv)) / 2h, v being signs in the scale of each leaf."""
    direction = _in_scale(rademacher(key, params), params)
    disagreements, sizes = [], []
    for factor in STEPS:
        h = eps ** (1 / 3) * factor
        there, back = (_moved(params, direction, np.full(_count(params), t)) for t in (h, -h))
        product = matvec(_tree.cast_like(_difference(there, back, h), params))
        ends = [loss_and_gradient(loss_fn, point, args)[1] for point in (there, back)]
        disagreement, size = _residual(*ends, h, product)
        disagreements.append(disagreement)
        sizes.append(size)
    spread = [_norms(_tree.add_scaled(disagreements[0], -1.0, other)) for other in disagreements[1:]]
    columns = jax.device_get((_norms(disagreements[0]), jnp.maximum(*spread), sizes[0]))
    return _relative([[i] for i in range(len(sizes[0]))], np.array(columns, float).T)


def _relative(leaves: list[list[int]], columns: np.ndarray) -> Comparison:
    error, doubt, size = columns.T
    scale = size + 0.01 * size.max()
    scale = np.where(scale > 0, scale, 1)
    return Comparison(leaves, error / scale, doubt / scale)


def _count(params: Params) -> int:
    return len(jax.tree.leaves(params))


@jax.jit
def loss_and_gradient(loss_fn: LossFn, params: Params, args: tuple[Any, ...]) -> tuple[Array, Vector]:
    """The loss and its gradient, in full float32."""
    with at_precision("highest"):
        return jax.value_and_grad(scalar(loss_fn, args))(params)


@jax.jit
def _slopes(
    loss_fn: LossFn, params: Params, args: Any, grads: Vector, direction: Vector, t: Float[Array, " l"]
) -> tuple[Array, Array]:
    """What the loss changes by per unit of length, measured and according to its gradient."""
    there, back = _moved(params, direction, t), _moved(params, direction, -t)
    step = _difference(there, back, 0.5)  # the step as it came out in the dtypes of the params
    loss = scalar(loss_fn, args)
    with at_precision("highest"):
        change = loss(there) - loss(back)
    length = _tree.norm(step)
    length = jnp.where(length > 0, length, 1)
    return change / length, _tree.inner(step, _tree.wide(grads)) / length


@jax.jit
def _moved(params: Params, direction: Vector, t: Float[Array, " l"]) -> Params:
    """The point params + t·direction, with a distance of its own for every leaf."""
    leaves, structure = jax.tree.flatten(direction)
    step = jax.tree.unflatten(structure, [x * t[i].astype(x.dtype) for i, x in enumerate(leaves)])
    return _tree.cast_like(_tree.add_scaled(_tree.wide(params), 1.0, step), params)


@jax.jit
def _difference(there: Params, back: Params, h: Any) -> Vector:
    """(there − back) / 2h."""
    return jax.tree.map(lambda x, y: (x - y) / (2 * h), _tree.wide(there), _tree.wide(back))


@jax.jit
def _residual(there: Vector, back: Vector, h: Any, product: Vector) -> tuple[Vector, Array]:
    """Difference of gradients less the product, and the size of the two, leaf by leaf."""
    measured, product = _difference(there, back, h), _tree.wide(product)
    return _tree.add_scaled(measured, -1.0, product), jnp.maximum(_norms(measured), _norms(product))


@jax.jit
def _norms(vector: Vector) -> Float[Array, " l"]:
    """‖·‖ of every leaf."""
    return jnp.stack([_tree.norm(leaf) for leaf in jax.tree.leaves(_tree.wide(vector))])


@jax.jit
def _toward(grads: Vector, random: Vector, params: Params) -> tuple[Vector, Float[Array, " l"]]:
    """Directions of norm 1 in every leaf, and the length of the weights in it."""
    unit = functools.partial(jax.tree.map, lambda x: x / jnp.where(_tree.norm(x) > 0, _tree.norm(x), 1))
    direction = unit(_tree.add_scaled(unit(_tree.wide(grads)), 1.0, unit(random)))
    roots = jnp.sqrt(jnp.array([jnp.size(leaf) for leaf in jax.tree.leaves(params)], jnp.float32))
    return direction, _scales(params) * roots


@jax.jit
def _in_scale(signs: Vector, params: Params) -> Vector:
    leaves, structure = jax.tree.flatten(signs)
    scales = _scales(params)
    return jax.tree.unflatten(structure, [x * scales[i].astype(x.dtype) for i, x in enumerate(leaves)])


def _scales(params: Params) -> Float[Array, " l"]:
    """The root mean square of every leaf; that of all weights where a leaf's is smaller."""
    sizes = jnp.array([max(jnp.size(leaf), 1) for leaf in jax.tree.leaves(params)], jnp.float32)
    norms = _norms(params)
    everywhere = jnp.sqrt(jnp.sum(norms**2) / jnp.sum(sizes))
    return jnp.maximum(norms / jnp.sqrt(sizes), jnp.where(everywhere > 0, everywhere, 1.0))
