"""Between the masked params that the loop holds and the dense weights that the optimizer sees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hessjax import _tree
from hessjax._typing import Params, Where
from hessjax.pruning.saliency import is_hole


def copy_selected(params: Params, where: Where, dtype: Any = None) -> Params:
    """Copies of the selected leaves: the loop may donate params and state to one jitted step."""
    hits = _tree.match(params, where)
    selected = jax.tree.map(lambda x, hit: x if hit else optax.MaskedNode(), params, hits)
    _tree.check_floating(selected, "params[where]")
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), selected)


def on_selected(f: Callable[..., Array], tree: Params, mask: Params, *rest: Params) -> Params:
    """`f(leaf, mask, ...)` on the pruned leaves; the others as they are."""
    return jax.tree.map(lambda x, m, *r: x if is_hole(m) else f(x, m, *r), tree, mask, *rest)


def unmask(param: Any, mask: Any, dense: Any) -> Array:
    """The dense weights: the params where they are kept."""
    return jnp.where(mask, param, dense)


def second(_: Any, other: Any) -> Array:
    """The other tree's leaf."""
    return other


def masked(x: Any, mask: Any) -> Array:
    """Zero where the mask is False."""
    return jnp.where(mask, x, jnp.zeros_like(x))


def land(step: Any, mask: Any, dense: Any, param: Any) -> Array:
    """`M⊙W − param`, in a dtype that holds the params: rounded to a narrower one it would not cancel.

    Added to `param` it gives `M⊙W` again: 0.0 always; a kept weight because W = fl(param + u) for some float
    u, and of all floats fl(W − param) is the nearest to W − param, so that it rounds where u did. (One
    exception: a weight that jumps over zero exactly onto a power of two can land one unit in the last place
    beside it.) Returning u itself would keep one more array alive between this step and the ranking.
    """
    dtype = jnp.promote_types(step.dtype, param.dtype)
    return masked(dense, mask).astype(param.dtype).astype(dtype) - param.astype(dtype)
