"""How noisy gradients are: the noise scale and the critical batch size, with their standard errors."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._messages import checked_function, checked_number, shown
from hessjax._core._types import Block, Matvec
from hessjax._fisher._rows import num_grads
from hessjax.analysis.dynamics._moments import NoiseScale, critical_ratio, from_norms, noise_scales

LEAST = 3
"""Gradients of which one can be left out, and the others still have a covariance."""


def noise_scale(grads: Block, batch_size: Any = 1, *, weights: Any = None) -> NoiseScale:
    """The gradient noise scale tr Σ / ‖G‖²: the batch size at which noise and gradient are of one size.

    In batches far below it a step goes mostly with the noise, and twice the batch does about the work of two
    steps; far above it, more examples add little. Of m gradients with mean ḡ, without bias,

        tr Σ ≈ Σᵢ ‖gᵢ − ḡ‖² / (m − 1),   ‖G‖² ≈ ‖ḡ‖² − tr Σ / m.

    Standard errors are by the jackknife over gradients. Two of the ratio's reach as far as Fieller's interval
    on its longer side: further than the delta method's where ‖G‖² is known badly, and without end where it
    may be 0. Where few examples make up most of the noise, a batch without them claims too small an error.

    Args:
        grads: a block of gradients at one point, as `per_example_grads` returns; at least 3. Those of the
            devices or the microbatches of one step will do: see `batch_size`.
        batch_size: b, if every gradient is the mean over b examples: their noise is smaller by b.
        weights: (m,) how much each counts in the mean, as in `inverse_fisher`; the gradients themselves
            without weights. Those of weight 0 are not there. None: all alike.

    Returns:
        A `NoiseScale`, in examples; `.leaves` has each leaf's own. All of it works inside `jit`.

    Raises:
        TypeError: `grads` are not floating point; `batch_size` is no number.
        ValueError: leaves that disagree in their number of gradients, or fewer than 3; `batch_size` not
            positive; weights of another shape, negative, not finite, or all zero.

    Cost:
        6·m·d operations; memory m·d besides the gradients, less where the compiler fuses.

    References:
        McCandlish, Kaplan & Amodei (2018), An empirical model of large-batch training, arXiv 1812.06162,
        §2.2 and appendix A.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> found = hj.dynamics.noise_scale({"w": jnp.array([[3.0], [5.0], [4.0], [4.0]])})
        >>> round(float(found.noise.mean), 3), round(float(found.gradient.mean), 3)
        (0.667, 15.833)
        >>> f"{found.scale.mean:.3f} ± {found.scale.stderr:.3f}"
        '0.042 ± 0.048'
    """
    weights = _checked(grads, batch_size, weights)
    named = zip(_tree.unique_paths(grads, "grads"), jax.tree.leaves(grads), strict=True)
    whole, *each = noise_scales(grads, batch_size, weights)
    leaves = {path: found for (path, x), found in zip(named, each, strict=True) if x.size}
    return whole._replace(leaves=leaves)


def critical_batch_size(
    grads: Block, matvec: Matvec, batch_size: Any = 1, *, weights: Any = None
) -> NoiseScale:
    """The critical batch size tr HΣ / GᵀHG: where half of a step's progress is lost to noise.

    With a batch of B examples and the best step along the gradient, the loss falls by what it would with the
    whole data, over 1 + B_crit/B. `noise_scale` is the same with H = I, and far cheaper; the two differ where
    the noise lies along the sharp directions, as it mostly does. Estimated as there, with H between.

    Args:
        grads: as in `noise_scale`.
        matvec: products with H; a Gauss–Newton matrix keeps the denominator positive.
        batch_size: as in `noise_scale`.
        weights: as in `noise_scale`.

    Returns:
        A `NoiseScale`, in examples, without leaves.

    Raises:
        TypeError, ValueError: as `noise_scale`; `matvec` is no function, or one of other vectors.

    Cost:
        One product for each gradient; memory 2·m·d. A sample of 50 gradients is enough for an error of some
        20 %.

    References:
        McCandlish, Kaplan & Amodei (2018), arXiv 1812.06162, §2.2, equation 2.8.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([1.0, 10.0]))
        >>> grads = jnp.array([[3.0, 1.0], [5.0, -1.0], [4.0, 1.0], [4.0, -1.0]])  # noisy where it is sharp
        >>> scales = hj.dynamics.noise_scale(grads), hj.dynamics.critical_batch_size(grads, A)
        >>> [round(float(found.scale.mean), 2) for found in scales]
        [0.13, 1.12]
    """
    checked_function("matvec", matvec, "(vector) -> vector")
    weights = _checked(grads, batch_size, weights)
    products = _multiplied(matvec, grads)
    return critical_ratio(grads, products, batch_size, weights)


def noise_scale_from_norms(small: Any, large: Any, small_size: Any, large_size: Any) -> NoiseScale:
    """The gradient noise scale from squared norms of gradients of two batch sizes, b < B, over steps.

    What a training loop has at hand: the norms on each device, and of their mean; or before and after the
    accumulation of gradients. Without bias, at every step,

        ‖G‖² ≈ (B‖g_B‖² − b‖g_b‖²) / (B − b),   tr Σ ≈ (‖g_b‖² − ‖g_B‖²) / (1/b − 1/B);

    their means over steps are divided, not the mean of their ratios. Standard errors count the steps as
    independent.

    Args:
        small: (steps,) ‖g_b‖², of one batch of b examples at each step, or the mean of several; or a tree
            of such arrays, one for each leaf.
        large: likewise ‖g_B‖².
        small_size: b.
        large_size: B.

    Returns:
        A `NoiseScale`, in examples; infinite errors for fewer than 2 steps. Of a tree with leaves.

    Raises:
        TypeError: norms that are not floating point; sizes that are no numbers.
        ValueError: norms that disagree in shape, or are not (steps,); sizes not positive, or b ≥ B.

    Cost:
        None to speak of.

    References:
        McCandlish, Kaplan & Amodei (2018), arXiv 1812.06162, appendix A.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> small, large = jnp.array([5.0, 6.0, 5.5, 5.5]), jnp.array([2.0, 2.2, 2.1, 2.1])
        >>> found = hj.dynamics.noise_scale_from_norms(small, large, 8, 64)
        >>> f"{found.scale.mean:.1f} ± {found.scale.stderr:.1f}"
        '19.3 ± 0.7'
    """
    _tree.check_floating(small, "small")
    _tree.check_floating(large, "large")
    _tree.check_like(large, small, "large", "small")
    shapes = {jnp.shape(x) for x in jax.tree.leaves(small)}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"`small` must hold arrays of one shape, (steps,), got {shown(shapes)}.")
    sizes = {"small_size": small_size, "large_size": large_size}
    for name, size in sizes.items():
        check_positive(name, size)
    if not any(isinstance(x, jax.core.Tracer) for x in sizes.values()) and not small_size < large_size:
        raise ValueError(f"`small_size` must be below `large_size`, {large_size}, got {small_size}.")
    whole, *each = from_norms(small, large, small_size, large_size)
    names = [] if jax.tree_util.all_leaves([small]) else _tree.unique_paths(small, "small")
    return whole._replace(leaves=dict(zip(names, each, strict=False)))


# -- what is asked for -----------------------------------------------------------------------------


def _checked(grads: Any, batch_size: Any, weights: Any) -> Any:
    """The weights as an array, all arguments being what they must be."""
    count = num_grads(grads)
    if count < LEAST:
        raise ValueError(
            f"`grads` must hold at least {LEAST} gradients, as the jackknife leaves one out, got {count}."
        )
    check_positive("batch_size", batch_size)
    return jnp.ones(count) if weights is None else _checked_weights(weights, count)


def check_positive(argument: str, value: Any) -> None:
    """Raise a TypeError for what is no number, a ValueError for one that is not positive and finite."""
    if not isinstance(checked_number(argument, value), jax.core.Tracer) and not 0 < value < math.inf:
        raise ValueError(f"`{argument}` must be positive and finite, got {value}.")


def _checked_weights(weights: Any, count: int) -> Any:
    if not isinstance(weights, (jax.Array, np.ndarray, list, tuple)) or np.shape(weights) != (count,):
        got = _tree.describe(weights) if hasattr(weights, "shape") else shown(weights)
        raise (ValueError if hasattr(weights, "shape") else TypeError)(
            f"`weights` must be an array of {count} numbers, one for each gradient, got {got}."
        )
    if isinstance(weights, jax.core.Tracer):
        return weights
    found = np.asarray(weights)
    if not (jnp.issubdtype(found.dtype, jnp.number) or found.dtype == bool) or found.dtype.kind == "c":
        raise TypeError(f"`weights` must be real numbers, got {found.dtype}.")
    found = found.astype(float)
    if not (np.all(np.isfinite(found)) and np.all(found >= 0)):
        raise ValueError("`weights` must be finite and at least 0, got others among them.")
    if np.sum(found > 0) < LEAST:
        raise ValueError(
            f"`weights` must be above 0 for at least {LEAST} gradients, got {np.sum(found > 0)} such."
        )
    return found / np.max(found)  # of which none leaves float32


def _multiplied(matvec: Matvec, grads: Block) -> Block:
    """Products with every gradient: by a loop of the program where that is traced, of the host elsewhere."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(grads)):
        return jax.lax.map(matvec, grads)
    products = [matvec(row) for row in _tree.rows(grads)]
    _tree.check_vector(products[0], _tree.row(grads, 0), "matvec(vector)", "a row of `grads`")
    return _tree.block_of(*products)
