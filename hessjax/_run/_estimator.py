"""Drives an estimator: asks it what to multiply, multiplies, tells it, until it is good enough."""

from collections.abc import Sequence
from typing import Any

import jax

from hessjax._core import _tree
from hessjax._core._messages import checked_count
from hessjax._core._types import Estimator, Key, Matvec, Params, Relative, Tolerance
from hessjax._run._drivers import (
    Beginning,
    Callback,
    Carry,
    loop_on_device,
    loop_on_host,
    read_result,
    refuse_tracers,
    restore,
    resume,
    start,
)


class NonFiniteProductError(FloatingPointError):
    """A product held NaN or infinity. What was found before it is kept.

    Attributes:
        result: the estimator's result from the products before.
        state: its state, good to go on from with a mended matvec.
        num_matvecs: how many products are in it.
    """

    def __init__(self, message: str, result: Any, state: Any, num_matvecs: int) -> None:
        super().__init__(message)
        self.result = result
        self.state = state
        self.num_matvecs = num_matvecs


def run(
    estimator: Estimator,
    matvec: Matvec,
    key: Key,
    like: Params,
    *,
    max_matvecs: int,
    tol: Tolerance | None = None,
    state: Any = None,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> tuple[Any, Any]:
    """Feed products to an estimator until its error is below `tol` or `max_matvecs` are spent.

    The default driver is a loop on the host: the matvec may then be anything callable, compiled or
    streaming a data set, and on a CPU it is also the fast one (XLA's CPU backend runs a convolution's
    gradient 15 to 45 times slower inside a compiled loop). The state stays on the device and its memory
    is re-used from step to step; the error is read every few products only.

    Args:
        estimator: what to compute, e.g. `lanczos(5)`.
        matvec: the symmetric linear map.
        key: random key; the same key gives the same result.
        like: pytree that gives the vectors' structure, shapes and dtypes; usually the params.
        max_matvecs: the most products to spend.
        tol: stop when the estimator's error is at most this: a number in the result's units, or
            `relative(r)`. None spends all products.
        state: go on from here instead of starting anew (it is copied, not consumed).
        callbacks: each is called with a `Progress` every few products and at the end; one that is also a
            context manager is entered for the time of the run. `checkpoint` may restore an earlier run: its
            products count towards `max_matvecs`.
        on_device: run the whole loop in one compiled `lax.while_loop`: for accelerators, and for use inside
            `jit`. Blocks of vectors are then multiplied together. No callbacks.

    Returns:
        `(result, state)`.

    Raises:
        NonFiniteProductError: a product held NaN or infinity: says which, and keeps the result so far.
            (Traced code cannot raise: inside `jit` the run stops there, and fewer products are counted.)
        TypeError: `like` has leaves that are not floating point; traced values without `on_device`;
            `max_matvecs` is not an integer.
        ValueError: `max_matvecs` is below one step's need; a product is not like `like`.

    Cost:
        The products, plus the estimator's own work and memory (see each).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> estimate, state = hj.run(hj.estimators.hutchinson(), A, jax.random.key(0), jnp.zeros(10),
        ...     max_matvecs=3)
        >>> float(estimate.mean), int(estimate.num_samples)
        (55.0, 3)
    """
    _tree.check_floating(like, "like")
    if not on_device:
        refuse_tracers((matvec, key, like, state))
    tol = checked_tolerance(tol)
    if isinstance(tol, Relative) and estimator.scale is None:
        raise ValueError(
            "`tol` must be absolute: this estimator has no `scale` for a relative one to refer to."
        )
    carry = start(estimator, key, like) if state is None else resume(state)
    beginning = Beginning(estimator, matvec, key, like, carry.state)
    read = estimator.result
    estimator = estimator._replace(init=_begun, result=_begun)  # what is left is what loops are compiled for
    block = jax.eval_shape(estimator.query, carry.state)
    width = jax.tree.leaves(block)[0].shape[0]
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), block)
    _tree.check_like(row, like, "state" if state is not None else "estimator.query", "like")
    max_matvecs = checked_count("max_matvecs", max_matvecs, width, ", one step's need")
    if on_device:
        if callbacks:
            raise ValueError("`callbacks` must be empty with `on_device=True`: they run on the host.")
        matvec = matvec if isinstance(matvec, jax.tree_util.Partial) else jax.tree_util.Partial(matvec)
        carry = loop_on_device(estimator, matvec, like, max_matvecs // width, tol, carry)
    else:
        carry, steps = restore(callbacks, beginning, carry, width, max_matvecs)
        del beginning  # its state's memory is re-used
        carry = loop_on_host(
            estimator, matvec, like, max_matvecs // width, width, tol, callbacks, carry, steps
        )
    result = read_result(read, carry.state)
    if not isinstance(carry.failed_leaf, jax.core.Tracer) and int(carry.failed_leaf) >= 0:
        raise _non_finite(carry, width, like, result)
    return result, carry.state


def _begun(*_: Any) -> Any:
    raise AssertionError("`init` is called before the loop, `result` after it")


def checked_tolerance(tol: Any) -> Tolerance | None:
    """The tolerance as a number that hashes, or `Relative`, or None."""
    if tol is None or isinstance(tol, Relative):
        return tol
    if not (number := float(tol)) >= 0:
        raise ValueError(f"`tol` must be at least 0, or None, got {number}.")
    return number


def _non_finite(carry: Carry, width: int, like: Params, result: Any) -> NonFiniteProductError:
    count, leaf = int(carry.steps) * width, _tree.leaf_paths(like)[int(carry.failed_leaf)]
    where = f"product {count + 1}" if width == 1 else f"one of products {count + 1} to {count + width}"
    return NonFiniteProductError(
        f"{where} is not finite (first in leaf `{leaf}`): is the loss itself finite at these params? "
        f"The result of the {count} products before is in `.result`, the state in `.state`.",
        result,
        carry.state,
        count,
    )
