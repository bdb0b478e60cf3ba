"""How much an example counts: one notion for means over batches, and for what is cut into examples.

A loss is a mean over its batch, L = Σ wₙ ℓₙ / Σ wₙ. `weights(batch)` gives the w: an array (n,), one number
for each example; or (n, positions...), one for each output position, a padding mask, where wₙ is their sum
and ℓₙ the example's own mean over them; or one number, Σ wₙ, all that a mean over batches has to know.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hessjax._core import _processes, _tree
from hessjax._core._messages import checked_function
from hessjax._core._types import Block

Weights: TypeAlias = Callable[[Any], Any]
"""`weights(batch) -> array`: how much the batch, its examples or its output positions count."""

COUNTED_OTHERWISE = "If examples are counted otherwise, pass `weights=lambda batch: ...`."


def leading_axis(batch: Any, advice: str = COUNTED_OTHERWISE) -> int:
    """The number of examples in `batch`: the length of the first axis, on which all its arrays agree.

    Arrays without axes (a temperature, a key) do not count.

    Raises:
        ValueError: the lengths disagree (all are listed), or no array has an axis.
    """
    lengths = {
        path: jnp.shape(leaf)[0]
        for path, leaf in zip(_tree.leaf_paths(batch), jax.tree.leaves(batch), strict=True)
        if jnp.ndim(leaf)
    }
    if len(set(lengths.values())) != 1:
        shown = ", ".join(f"{path}: {length}" for path, length in lengths.items()) or "no array with an axis"
        raise ValueError(f"a batch must hold arrays with one common leading axis, got {shown}. {advice}")
    return next(iter(lengths.values()))


def num_examples(args: tuple[Any, ...]) -> int:
    """The number of examples in the batch, the first argument."""
    if not args:
        raise ValueError("`args` must begin with the batch that is cut into examples, got no arguments.")
    count = leading_axis(args[0], "What all examples share goes into the arguments after the batch.")
    if not count:
        raise ValueError("`args[0]` must hold at least one example, got 0.")
    if (
        len(args) > 1
        and count > 1
        and all(isinstance(x, jax.Array | np.ndarray) and x.shape[:1] == (count,) for x in args[:2])
    ):
        # It may be meant: class weights, say, of as many classes as there are examples.
        warnings.warn(
            f"`args[1]` is passed whole to each of the {count} examples that `args[0]` is cut into, but is "
            "as long as they are many: if these are labels, put both into one batch, `(x, y)`.",
            UserWarning,
            stacklevel=4,
        )
    return count


# -- a whole batch ---------------------------------------------------------------------------------


def check_weights(weights: Any) -> None:
    """Raise a TypeError for what is no function of the batch."""
    if weights is not None and not callable(weights):
        raise TypeError(
            f"`weights` must be a function of the batch, `weights(batch) -> array`, got a "
            f"{type(weights).__name__}: `lambda batch: batch['mask']`, say."
        )
    if weights is not None:
        checked_function("weights", weights, "(batch) -> array")


def batch_weight(weights: Weights | None, batch: Any, index: int, count: int | None = None) -> float:
    """How much batch `index` of several counts in their mean: Σ w, by default its number of examples.

    Zero for a batch that holds nothing but padding. Of one that is filled up `count` examples are there.
    """
    if weights is not None:
        # In float64 on the host: counts of tokens beyond 2²⁴ stay exact.
        found = _on_host(weights(batch), f"batch {index}")
        if count is not None and found.ndim and found[count:].any():
            raise ValueError(
                f"`weights` must be 0 for the examples that batch {index} is filled up with: let it read "
                "what `with_weights` has put there."
            )
        return float(found.sum())
    if (count := leading_axis(batch) if count is None else count) < 1:
        raise ValueError(f"every batch must hold at least one example, but batch {index} has {count}.")
    return float(count)


def check_total(total: float, index: int) -> None:
    """Raise a ValueError unless batches up to `index` hold something that counts."""
    if index < 0:
        raise ValueError("`batches` must hold at least one batch, got none: an iterator that is used up?")
    if not total > 0:
        raise ValueError(f"`weights` must not be zero everywhere, but of all {index + 1} batches they are.")


def _on_host(found: Any, place: str) -> np.ndarray:
    """The weights as numbers, checked."""
    if getattr(found, "dtype", None) is None and not isinstance(found, (int, float, list, tuple)):
        raise TypeError(f"`weights` must give an array, got a {type(found).__name__} for {place}.")
    array = _processes.on_host(found)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool) or array.dtype.kind == "c":
        raise TypeError(f"`weights` must give real numbers, got {array.dtype} for {place}.")
    array = array.astype(float)
    wrong = array[~((array >= 0) & np.isfinite(array))]
    if wrong.size:
        raise ValueError(f"`weights` must give finite numbers of at least 0, got {wrong[0]:g} for {place}.")
    return array


# -- one example, one position ---------------------------------------------------------------------


def shares_of(weights: Weights, args: tuple[Any, ...]) -> Array:
    """What part of the mean is whose, w / Σ w: (n,) or (n, positions...).

    The batch is the first argument. Called where the arguments are given, not inside `jit`: what `weights`
    does may then be NumPy's, and a new function compiles nothing anew.

    Raises:
        TypeError: `weights` is no function, or gives no real numbers.
        ValueError: one number for all examples; a weight that is negative or not finite; all are zero.
            Traced code cannot raise: inside `jit` the shares are then NaN.
    """
    check_weights(weights)
    if not args:
        raise ValueError(
            "`args` must begin with the batch that `weights` is a function of, got no arguments."
        )
    found = weights(args[0])
    if not isinstance(found, jax.core.Tracer):
        checked = _on_host(found, "`args[0]`")
        if not checked.sum() > 0:
            raise ValueError("`weights` must not be zero everywhere, but for `args[0]` they are.")
        found = found if isinstance(found, jax.Array) else checked
    if not jnp.ndim(found):
        raise ValueError(
            "`weights` must give one number for each example, (n,), or for each output position, "
            "(n, positions...), got one number for the whole batch, which says nothing of its examples."
        )
    return _normalized(jnp.asarray(found).astype(float))


@jax.jit
def _normalized(weights: Float[Array, "..."]) -> Float[Array, "..."]:
    weights = jnp.where(weights >= 0, weights, jnp.nan)
    weights = weights / jnp.max(weights)  # their sum may leave float32
    return weights / jnp.sum(weights)


def check_count(shares: Array, count: int) -> None:
    """Raise a ValueError unless there is a weight for each of `count` examples."""
    if shares.shape[0] != count:
        raise ValueError(
            f"`weights` must give one number for each of the {count} examples, ({count},), or for each "
            f"output position, ({count}, positions...), got shape {shares.shape}."
        )


def by_example(shares: Array) -> Float[Array, " n"]:
    """The share of every example: the sum over its positions."""
    return jnp.sum(shares.reshape(shares.shape[0], -1), axis=1)


def by_position(shares: Array, shape: tuple[int, ...]) -> Array:
    """The share of every output position; an example without weights for these counts for all alike."""
    if shares.shape != shape[: shares.ndim]:
        raise ValueError(
            f"`weights` must give one number for each output position, {shape}, or each example, "
            f"({shape[0]},), got shape {shares.shape}."
        )
    rest = shape[shares.ndim :]
    spread = shares.reshape(*shares.shape, *[1] * len(rest)) / max(1, math.prod(rest))
    return jnp.broadcast_to(spread, shape)


def weighed(shares: Array, values: Array) -> Array:
    """The values times their shares, in at least float32; 0 where the share is, whatever the value."""
    values = _tree.wide(values)
    shares = shares.reshape(*shares.shape, *[1] * (values.ndim - shares.ndim)).astype(values.dtype)
    # Not `shares > 0`: a share that is NaN has to show. And no product with 0: that of NaN would be NaN.
    return jnp.where(shares == 0, 0, shares * values)


@functools.partial(jax.jit, donate_argnums=0)
def scaled_rows(block: Block, factors: Float[Array, " m"]) -> Block:
    """Every row times its factor, in the dtypes of the block."""
    return _tree.cast_like(jax.tree.map(lambda x: weighed(factors, x), block), block)


def present(shares: Array, values: Array) -> Array:
    """The values, and 0 where the share is."""
    shares = shares.reshape(*shares.shape, *[1] * (values.ndim - shares.ndim))
    return jnp.where(shares == 0, 0, values)


def without_absent(args: tuple[Any, ...], there: Bool[Array, " n"]) -> tuple[Any, ...]:
    """The arguments, with a copy of an example that is there in the place of each that is not.

    A weight of zero alone does not do: of a sentence of padding, whose loss is 0/0, the derivative is NaN,
    and zero times NaN is NaN.
    """
    if not isinstance(there, jax.core.Tracer) and bool(jnp.all(there)):
        return args
    index = jnp.where(there, jnp.arange(there.size), jnp.argmax(there))

    def taken(x: Any) -> Any:
        return (x if isinstance(x, jax.Array) else jnp.asarray(x))[index] if jnp.ndim(x) else x

    return jax.tree.map(taken, args[0]), *args[1:]


def of_examples(weights: Weights | None, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array | None, int]:
    """The arguments to be cut, the shares of their examples, or None, and how many examples there are."""
    count = num_examples(args)
    if weights is None:
        return args, None, count
    shares = shares_of(weights, args)
    check_count(shares, count)
    return without_absent(args, by_example(shares) > 0), shares, count


def of_each(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """`function(args)` for every example, as a batch of one; results stacked."""
    leaves, structure = jax.tree.flatten(args[0])
    axes = tuple(0 if jnp.ndim(x) else None for x in leaves)

    def one(*example: Any) -> Any:
        # vmap takes the axis of examples away; as a batch of one the model gets it back.
        cut = [x if axis is None else x[None] for x, axis in zip(example, axes, strict=True)]
        return function((jax.tree.unflatten(structure, cut), *args[1:]))

    return jax.vmap(one, in_axes=axes)(*leaves)
