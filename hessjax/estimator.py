"""Drives an estimator: asks it what to multiply, multiplies, tells it, until it is good enough."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessjax import _tree
from hessjax._typing import Block, Estimator, Key, Matvec, Params, Relative, Tolerance, Vector

CHECK_EVERY = 5
"""Products between two looks at the error: reading it makes the host wait for the device."""


class Progress(NamedTuple):
    """What a callback is told, every few products and once at the end.

    Attributes:
        num_matvecs: products absorbed so far in this run.
        max_matvecs: the most this run may take.
        error: the estimator's own error, in the result's units.
        target: the error at which the run stops; `-inf` if it does not stop early.
        state: the estimator's state. The next step re-uses its memory: copy what you keep.
        done: True in the last call.
    """

    num_matvecs: int
    max_matvecs: int
    error: float
    target: float
    state: Any
    done: bool


Callback = Callable[[Progress], None]


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


def relative(factor: float) -> Relative:
    """A tolerance or damping as a fraction of the natural scale of what it is compared with.

    Args:
        factor: the fraction, positive. `relative(1e-3)` as a tolerance of `eigenpairs` means 1e-3 of the
            largest absolute eigenvalue; of `trace`, 1e-3 of the trace.

    Returns:
        The fraction, marked as one.

    Raises:
        ValueError: `factor` is not a positive finite number.

    Example:
        >>> import hessjax as hj
        >>> hj.relative(0.1)
        Relative(factor=0.1)
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"`factor` must be positive and finite, got {factor}.")
    return Relative(float(factor))


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
            context manager is entered for the time of the run.
        on_device: run the whole loop in one compiled `lax.while_loop`: for accelerators, and for use inside
            `jit`. Blocks of vectors are then multiplied together. No callbacks.

    Returns:
        `(result, state)`.

    Raises:
        NonFiniteProductError: a product held NaN or infinity: says which, and keeps the result so far.
            (Traced code cannot raise: inside `jit` the run stops there, and fewer products are counted.)
        TypeError: `like` has leaves that are not floating point; traced values without `on_device`.
        ValueError: `max_matvecs` is below one step's need; a product is not like `like`.

    Cost:
        The products, plus the estimator's own work and memory (see each).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 11.0))
        >>> estimate, state = hj.run(hj.hutchinson(), A, jax.random.key(0), jnp.zeros(10), max_matvecs=3)
        >>> float(estimate.mean), int(estimate.num_samples)
        (55.0, 3)
    """
    _tree.check_floating(like, "like")
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((matvec, key, like, state)))
    if traced and not on_device:
        raise TypeError(
            "`run` loops on the host by default and cannot be traced: inside `jit`, `vmap` or `scan` pass "
            "`on_device=True`."
        )
    carry = _start(estimator, key, like) if state is None else _resume(state)
    width = jax.tree.leaves(jax.eval_shape(estimator.query, carry.state))[0].shape[0]
    if max_matvecs < width:
        raise ValueError(f"`max_matvecs` must be at least {width}, one step's need, got {max_matvecs}.")
    if on_device:
        if callbacks:
            raise ValueError("`callbacks` must be empty with `on_device=True`: they run on the host.")
        matvec = matvec if isinstance(matvec, jax.tree_util.Partial) else jax.tree_util.Partial(matvec)
        carry = _loop_on_device(estimator, matvec, like, max_matvecs // width, tol, carry)
    else:
        carry = _loop_on_host(estimator, matvec, like, max_matvecs // width, width, tol, callbacks, carry)
    result = _result(estimator.result, carry.state)
    if not traced and int(carry.failed_leaf) >= 0:
        raise _non_finite(carry, width, like, result)
    return result, carry.state


# -- one step ------------------------------------------------------------------------------------


class _Carry(NamedTuple):
    state: Any
    steps: jax.Array  # absorbed
    failed_leaf: jax.Array  # the first leaf of a product that was not finite; -1: none was


def _start(estimator: Estimator, key: Key, like: Params) -> _Carry:
    return _Carry(_init(estimator.init, key, like), jnp.int32(0), jnp.int32(-1))


def _resume(state: Any) -> _Carry:
    return _Carry(jax.tree.map(jnp.copy, state), jnp.int32(0), jnp.int32(-1))


@functools.partial(jax.jit, static_argnums=0)
def _init(init: Callable[..., Any], key: Key, like: Params) -> Any:
    return init(key, like)


@functools.partial(jax.jit, static_argnums=0)
def _result(result: Callable[..., Any], state: Any) -> Any:
    return result(state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _query(query: Callable[..., Block], dtypes: tuple[Any, ...], state: Any) -> tuple[Vector, ...]:
    """The queried vectors, one by one, in the dtypes of the params."""
    leaves, structure = jax.tree.flatten(query(state))
    rows = [
        [x.astype(dtype) for x, dtype in zip(xs, dtypes, strict=True)] for xs in zip(*leaves, strict=True)
    ]
    return tuple(jax.tree.unflatten(structure, row) for row in rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _absorb(update: Callable[..., Any], carry: _Carry, products: tuple[Vector, ...]) -> _Carry:
    return _update(update, carry, jax.tree.map(lambda *xs: jnp.stack(xs), *products))


def _update(update: Callable[..., Any], carry: _Carry, products: Block) -> _Carry:
    """One update, unless this product or an earlier one is not finite: then the state stays as it was."""
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(products)])
    failed = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    failed = jnp.where(carry.failed_leaf >= 0, carry.failed_leaf, failed)
    state = jax.lax.cond(failed < 0, update, lambda state, _: state, carry.state, _tree.wide(products))
    return _Carry(state, carry.steps + (failed < 0), failed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _error(estimator: Estimator, tol: Tolerance | None, state: Any) -> tuple[jax.Array, jax.Array]:
    """The error, and the target it has to reach."""
    error = jnp.asarray(estimator.error(state), jnp.result_type(float))
    if tol is None:
        return error, jnp.full_like(error, -jnp.inf)
    target = tol.factor * estimator.scale(state) if isinstance(tol, Relative) else tol
    return error, jnp.asarray(target, error.dtype)


# -- the two loops -------------------------------------------------------------------------------


def _loop_on_host(
    estimator: Estimator,
    matvec: Matvec,
    like: Params,
    max_steps: int,
    width: int,
    tol: Tolerance | None,
    callbacks: Sequence[Callback],
    carry: _Carry,
) -> _Carry:
    dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(like))
    watched = estimator if tol is not None or callbacks else None
    look_every = max(1, CHECK_EVERY // width)
    with _entered(callbacks):
        for step in range(1, max_steps + 1):
            products = tuple(map(matvec, _query(estimator.query, dtypes, carry.state)))
            _check_products(products, like)
            carry = _absorb(estimator.update, carry, products)
            if step % look_every and step < max_steps:
                continue
            error, target, steps, failed = _look(watched, tol, carry)
            done = step == max_steps or error <= target or failed
            for callback in callbacks:
                callback(Progress(steps * width, max_steps * width, error, target, carry.state, done))
            if done:
                break
    return carry


def _look(
    estimator: Estimator | None, tol: Tolerance | None, carry: _Carry
) -> tuple[float, float, int, bool]:
    """Wait for the device, and read error, target, steps done, and whether a product was not finite."""
    looks = _error(estimator, tol, carry.state) if estimator else (math.inf, -math.inf)
    (error, target), steps, failed_leaf = jax.device_get((looks, carry.steps, carry.failed_leaf))
    return float(error), float(target), int(steps), bool(failed_leaf >= 0)


@contextlib.contextmanager
def _entered(callbacks: Sequence[Callback]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, contextlib.AbstractContextManager):
                stack.enter_context(callback)
        yield


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _loop_on_device(
    estimator: Estimator, matvec: Matvec, like: Params, max_steps: int, tol: Tolerance | None, carry: _Carry
) -> _Carry:
    def go_on(loop: tuple[_Carry, jax.Array]) -> jax.Array:
        carry, satisfied = loop
        return (carry.steps < max_steps) & (carry.failed_leaf < 0) & ~satisfied

    def step(loop: tuple[_Carry, jax.Array]) -> tuple[_Carry, jax.Array]:
        carry, _ = loop
        block = _tree.cast_like(estimator.query(carry.state), like)
        carry = _update(estimator.update, carry, _apply_block(matvec, block))
        if tol is None:
            return carry, jnp.asarray(False)
        look_now = carry.steps % CHECK_EVERY == 0
        return carry, look_now & jax.lax.cond(look_now, _satisfied, lambda _: jnp.asarray(False), carry.state)

    def _satisfied(state: Any) -> jax.Array:
        error, target = _error(estimator, tol, state)
        return error <= target

    return jax.lax.while_loop(go_on, step, (carry, jnp.asarray(False)))[0]


def _apply_block(matvec: Matvec, block: Block) -> Block:
    if jax.tree.leaves(block)[0].shape[0] > 1:
        return jax.vmap(matvec)(block)
    product = matvec(_tree.row(block, 0))
    _check_products((product,), _tree.row(block, 0))
    return jax.tree.map(lambda leaf: leaf[None], product)


def _check_products(products: Sequence[Vector], like: Params) -> None:
    for product in products:
        _tree.check_like(product, like, "matvec(vector)", "like")


def _non_finite(carry: _Carry, width: int, like: Params, result: Any) -> NonFiniteProductError:
    count, leaf = int(carry.steps) * width, _tree.leaf_paths(like)[int(carry.failed_leaf)]
    where = f"product {count + 1}" if width == 1 else f"one of products {count + 1} to {count + width}"
    return NonFiniteProductError(
        f"{where} is not finite (first in leaf `{leaf}`): is the loss itself finite at these params? "
        f"The result of the {count} products before is in `.result`, the state in `.state`.",
        result,
        carry.state,
        count,
    )
