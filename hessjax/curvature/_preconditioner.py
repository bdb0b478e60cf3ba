"""Matvecs in the units that an optimizer works in: scaled by a diagonal, such as Adam's."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int

from hessjax._core import _numbers, _tree
from hessjax._core._messages import checked_finite, checked_function
from hessjax._core._types import Matvec, Params, Vector
from hessjax.curvature._product import as_pytree


def preconditioned(matvec: Matvec, diagonal: Params) -> Matvec:
    """The matvec v ↦ D^-½ A D^-½ v, with D a positive diagonal: A as an optimizer that divides by D sees it.

    It has the eigenvalues of D⁻¹A, and is symmetric.

    Args:
        matvec: the symmetric linear map A; may be one that streams from the host.
        diagonal: D, a pytree like the params, all entries positive. `adam_preconditioner` gives Adam's.

    Returns:
        The matvec, a pytree as `matvec` is. Its eigenvalues are in the units of A over those of D.

    Raises:
        TypeError: `diagonal` has leaves that are not floating point.
        ValueError: an entry of `diagonal` is not positive and finite (the leaf is named; not checked inside
            `jit`); at a product, `vector` is not like `diagonal`.

    Cost:
        One product of `matvec`, and two passes over the vector.

    References:
        Cohen et al. (2022), Adaptive gradient methods at the edge of stability, arXiv 2207.14484.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = hj.hessian(lambda w: jnp.sum(w**2), jnp.zeros(2))
        >>> hj.preconditioned(A, jnp.array([1.0, 4.0]))(jnp.ones(2)).tolist()
        [2.0, 0.5]
    """
    checked_function("matvec", matvec, "(vector) -> vector")
    _tree.check_floating(diagonal, "diagonal")
    # Values can only be looked at outside `jit`; inside it a bad entry shows as NaN in the products.
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(diagonal)):
        _check_positive(diagonal)
    return Partial(_scaled_product, as_pytree(matvec), diagonal)


def _scaled_product(matvec: Matvec, diagonal: Params, vector: Vector) -> Vector:
    # Half of D on either side, not D⁻¹A: similar to it, and symmetric, which Lanczos and CG rely on.
    _tree.check_arrays(vector, "vector")
    product = matvec(_over_root(diagonal, vector))
    _tree.check_vector(product, diagonal, "matvec(vector)", "diagonal")
    return _over_root(diagonal, product, vector)


@jax.jit
def _over_root(diagonal: Params, vector: Vector, like: Vector | None = None) -> Vector:
    """D^-½ v, in the dtypes of `like`, or of `vector`."""
    _tree.check_vector(vector, diagonal, "vector", "diagonal")
    scaled = jax.tree.map(
        lambda d, x: jnp.divide(*_numbers.promoted(x, jnp.sqrt(d))), *map(_tree.wide, (diagonal, vector))
    )
    return _tree.cast_like(scaled, vector if like is None else like)


def _check_positive(diagonal: Params) -> None:
    smallest = jax.device_get(_smallest(diagonal))  # one transfer for all leaves
    for path, low in zip(_tree.leaf_paths(diagonal), smallest, strict=True):
        if not low > 0:  # written so that NaN fails too
            raise ValueError(
                f"`diagonal` must be positive and finite, but leaf `{path}` is not: add a damping to it."
            )


@jax.jit
def _smallest(diagonal: Params) -> list[Float[Array, ""]]:
    """The smallest entry of every leaf; NaN if one is not finite."""
    leaves = jax.tree.leaves(_tree.wide(diagonal))
    return [jnp.min(jnp.where(jnp.isfinite(x), x, jnp.nan), initial=math.inf) for x in leaves]


def adam_preconditioner(
    opt_state: Any,
    *,
    b2: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    eps_root: ArrayLike | None = None,
) -> Params:
    """What Adam divides its momentum by: D = √(ν̂ + eps_root) + eps, read out of an optimizer's state.

    ν̂ = ν / (1 − b2ᵗ) is the bias-corrected mean of squared gradients. The next curvature question is then
    `preconditioned(hessian(...), D)`: its top eigenvalue is the sharpness that matters to Adam. With D fixed,
    momentum b1 and step size η, steps diverge above (2 + 2 b1) / ((1 − b1) η), which is 38 / η for b1 = 0.9;
    full-batch training hovers there.

    Args:
        opt_state: what holds the state of one Adam (`adam`, `adamw`, `nadam`, ...), nested in any way: an
            optax state (chain, masked, MultiSteps, inject_hyperparams, `hessjax.prune`), a `TrainState`, an
            `nnx.Optimizer`, its `opt_state` or its `nnx.state`. Not `adamax`: its state is of the same type,
            and holds maxima.
        b2: decay of ν, as given to the optimizer. By default what `inject_hyperparams` has recorded, else
            0.999.
        eps: likewise; 1e-8.
        eps_root: likewise; 0.

    Returns:
        D, a pytree like the params, in float32 at least; from nnx in arrays, like the params of `nnx_loss`.
        Leaves that Adam does not train (`optax.masked`) are None, as in `select(params, where).part`.

    Raises:
        ValueError: no Adam in the state, or several, which are named; or one that has not made an update yet
            (not checked inside `jit`).

    References:
        Kingma and Ba (2015), Adam, arXiv 1412.6980.
        Cohen et al. (2022), Adaptive gradient methods at the edge of stability, arXiv 2207.14484, §2, §3.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import hessjax as hj
        >>> params, tx = jnp.array([1.0, 2.0]), optax.adam(0.1)
        >>> grads = jnp.array([0.5, -4.0])
        >>> _, opt_state = tx.update(grads, tx.init(params), params)
        >>> hj.adam_preconditioner(opt_state).tolist()  # after one step, |g|
        [0.5, 4.0]
    """
    given = {"b2": b2, "eps": eps, "eps_root": eps_root}
    for name, number in given.items():
        if number is not None:
            checked_finite(name, number)
            _check_range(name, number)
    adam = _the_adam(opt_state)
    if not isinstance(adam.count, jax.core.Tracer) and adam.count < 1:
        raise ValueError("`opt_state` must be one after the first update, got one after 0 updates.")
    known = {"b2": 0.999, "eps": 1e-8, "eps_root": 0.0} | adam.hyperparams
    chosen = {name: known[name] if value is None else value for name, value in given.items()}
    return _denominator(adam.nu, adam.count, **chosen)


def _check_range(name: str, number: Any) -> None:
    if isinstance(number, jax.core.Tracer):
        return
    if number < 0 or (name == "b2" and number >= 1):
        least = "in [0, 1)" if name == "b2" else "at least 0"
        raise ValueError(f"`{name}` must be {least}, as the optimizer was given it, got {number}.")


class _Adam(NamedTuple):
    """What is read of one Adam: its place, its state, and the hyperparameters recorded around it."""

    path: str
    count: Any
    nu: Params
    hyperparams: dict[str, Any]


def _the_adam(opt_state: Any) -> _Adam:
    found = list(_adams(_bare(opt_state), (), {}))
    if len(found) != 1:
        places = f": {', '.join(f'`{adam.path}`' for adam in found)}" if found else ""
        raise ValueError(
            f"`opt_state` must hold the state of exactly one Adam (`optax.ScaleByAdamState`), found "
            f"{len(found)} in {type(opt_state).__name__}{places}: pass the part that belongs to one."
        )
    (adam,) = found
    # An `nnx.State` is flattened into plain dicts: back to what the params of its model are.
    own = isinstance(opt_state, Mapping) and isinstance(adam.nu, dict)
    return adam._replace(nu=type(opt_state)(adam.nu)) if own else adam


def _adams(node: Any, path: tuple[Any, ...], hyperparams: dict[str, Any]) -> Iterator[_Adam]:
    """Every Adam in the tree. One that went through a checkpoint or `nnx.state` is a mapping."""
    if isinstance(node, optax.ScaleByAdamState):
        node = node._asdict()
    if isinstance(node, Mapping) and {"count", "mu", "nu"} <= set(node):
        yield _Adam(_tree.path_name(path), node["count"], node["nu"], hyperparams)
        return
    recorded = node.get("hyperparams") if isinstance(node, Mapping) else getattr(node, "hyperparams", None)
    hyperparams = {**hyperparams, **(recorded if isinstance(recorded, Mapping) else {})}
    for key, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node):
        if child is not node:
            yield from _adams(child, (*path, *key), hyperparams)


def _bare(tree: Any) -> Any:
    """Arrays in the place of nnx's Variables, which an `nnx.Optimizer` keeps its state in."""
    return jax.tree.map(lambda x: x.get_value() if _is_variable(x) else x, tree, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    # By what it can do: only `hessjax.flax` names Flax.
    return hasattr(node, "get_value") and hasattr(node, "set_value")


@jax.jit
def _denominator(
    nu: Params, count: Int[Array, ""], b2: ArrayLike, eps: ArrayLike, eps_root: ArrayLike
) -> Params:
    nu = _tree.wide(jax.tree.map(_without_hole, nu, is_leaf=_is_hole))

    def corrected(x: Array) -> Array:
        # In the leaf's dtype: hyperparameters are recorded in float32, and 1 − b2ᵗ is for float64 to keep.
        decay, root, least = (jnp.asarray(number, x.dtype) for number in (b2, eps_root, eps))
        # ν starts at zero, so early means are too small by 1 − b2ᵗ (Kingma and Ba, §3).
        return jnp.sqrt(x / (1 - decay ** count.astype(x.dtype)) + root) + least

    return jax.tree.map(corrected, nu)


def _without_hole(leaf: Any) -> Any:
    return None if _is_hole(leaf) else leaf


def _is_hole(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
