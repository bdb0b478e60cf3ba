"""One step of an estimator, compiled once, and the two loops around it: on the host and on the device."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._types import Block, Estimator, Key, Matvec, Params, Relative, Tolerance, Vector

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
"""Told of a run's progress. One that is also a context manager is entered for the time of the run. One with a
method `restore(beginning) -> (state, num_matvecs) | None` is asked before the first product whether it holds
this very run, begun earlier; the run then goes on from there, and counts those products as its own."""


class Beginning(NamedTuple):
    """What a run begins with: `run`'s arguments, and the state before the first product."""

    estimator: Estimator
    matvec: Matvec
    key: Key
    like: Params
    state: Any


# -- one step ------------------------------------------------------------------------------------


class Carry(NamedTuple):
    state: Any
    steps: jax.Array  # absorbed
    failed_leaf: jax.Array  # the first leaf of a product that was not finite; -1: none was


def start(estimator: Estimator, key: Key, like: Params) -> Carry:
    carries_arrays = isinstance(estimator.init, Partial)
    state = _init_from(estimator.init, key, like) if carries_arrays else _init(estimator.init, key, like)
    return Carry(state, jnp.int32(0), jnp.int32(-1))


def resume(state: Any) -> Carry:
    return Carry(jax.tree.map(jnp.copy, state), jnp.int32(0), jnp.int32(-1))


def restore(
    callbacks: Sequence[Callback], beginning: Beginning, carry: Carry, width: int, max_matvecs: int
) -> tuple[Carry, int]:
    """Where to go on from, and how many steps were done before."""
    steps = 0
    for callback in callbacks:
        ask = getattr(callback, "restore", None)
        if ask is None or (found := ask(beginning)) is None:
            continue
        state, num_matvecs = found
        if num_matvecs > max_matvecs:
            raise ValueError(
                f"`max_matvecs` must be at least {num_matvecs}, the products that the restored run has done, "
                f"got {max_matvecs}."
            )
        steps = num_matvecs // width
        carry = Carry(state, jnp.int32(steps), jnp.int32(-1))
    return carry, steps


@functools.partial(jax.jit, static_argnums=0)
def _init(init: Callable[..., Any], key: Key, like: Params) -> Any:
    return init(key, like)


@jax.jit
def _init_from(init: Partial, key: Key, like: Params) -> Any:
    """As `_init`, for one that carries arrays: other arrays of the same shapes compile nothing anew."""
    return init(key, like)


@functools.partial(jax.jit, static_argnums=0)
def read_result(result: Callable[..., Any], state: Any) -> Any:
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
def _absorb(update: Callable[..., Any], carry: Carry, products: tuple[Vector, ...]) -> Carry:
    return _update(update, carry, jax.tree.map(lambda *xs: jnp.stack(xs), *products))


def _update(update: Callable[..., Any], carry: Carry, products: Block) -> Carry:
    """One update, unless this product or an earlier one is not finite: then the state stays as it was."""
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(products)])
    failed = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    failed = jnp.where(carry.failed_leaf >= 0, carry.failed_leaf, failed)
    state = jax.lax.cond(failed < 0, update, lambda state, _: state, carry.state, _tree.wide(products))
    return Carry(state, carry.steps + (failed < 0), failed)


@functools.partial(jax.jit, static_argnums=0)
def _error(estimator: Estimator, tol: Any, state: Any) -> tuple[jax.Array, jax.Array]:
    """The error, and the target it has to reach."""
    error = jnp.asarray(estimator.error(state), jnp.result_type(float))
    if tol is None:
        return error, jnp.full_like(error, -jnp.inf)
    target: Any = tol
    if isinstance(tol, Relative) and estimator.scale is not None:
        target = tol.factor * estimator.scale(state)
    return error, jnp.asarray(target, error.dtype)


# -- the two loops -------------------------------------------------------------------------------


def loop_on_host(
    estimator: Estimator,
    matvec: Matvec,
    like: Params,
    max_steps: int,
    width: int,
    tol: Tolerance | None,
    callbacks: Sequence[Callback],
    carry: Carry,
    step: int,
) -> Carry:
    dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(like))
    watched = estimator if tol is not None or callbacks else None
    look_every = max(1, CHECK_EVERY // width)
    with entered(callbacks):
        while True:
            if step and (step % look_every == 0 or step >= max_steps):
                error, target, steps, failed = _look(watched, tol, carry)
                done = step >= max_steps or (tol is not None and not error > target) or failed
                for callback in callbacks:
                    callback(Progress(steps * width, max_steps * width, error, target, carry.state, done))
                if done:
                    return carry
            products = tuple(map(matvec, _query(estimator.query, dtypes, carry.state)))
            refuse_tracers(products)
            _check_products(products, like)
            carry = _absorb(estimator.update, carry, products)
            step += 1


def _look(estimator: Estimator | None, tol: Tolerance | None, carry: Carry) -> tuple[float, float, int, bool]:
    """Wait for the device, and read error, target, steps done, and whether a product was not finite."""
    looks = _error(estimator, tol, carry.state) if estimator else (math.inf, -math.inf)
    (error, target), steps, failed_leaf = jax.device_get((looks, carry.steps, carry.failed_leaf))
    return float(error), float(target), int(steps), bool(failed_leaf >= 0)


def refuse_tracers(tree: Any) -> None:
    """The loop on the host reads numbers, which traced values do not have."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "`run` loops on the host by default and cannot be traced: inside `jit`, `vmap` or `scan` pass "
            "`on_device=True`."
        )


@contextlib.contextmanager
def entered(callbacks: Sequence[Callback]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, contextlib.AbstractContextManager):
                stack.enter_context(callback)
        yield


@functools.partial(jax.jit, static_argnums=(0, 3))
def loop_on_device(
    estimator: Estimator, matvec: Matvec, like: Params, max_steps: int, tol: Any, carry: Carry
) -> Carry:
    width = jax.tree.leaves(jax.eval_shape(estimator.query, carry.state))[0].shape[0]
    look_every = max(1, CHECK_EVERY // width)

    def go_on(loop: tuple[Carry, jax.Array]) -> jax.Array:
        carry, satisfied = loop
        return (carry.steps < max_steps) & (carry.failed_leaf < 0) & ~satisfied

    def step(loop: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        carry, _ = loop
        block = _tree.cast_like(estimator.query(carry.state), like)
        carry = _update(estimator.update, carry, _apply_block(matvec, block))
        if tol is None:
            return carry, jnp.asarray(False)
        look_now = carry.steps % look_every == 0
        return carry, look_now & jax.lax.cond(look_now, _satisfied, lambda _: jnp.asarray(False), carry.state)

    def _satisfied(state: Any) -> jax.Array:
        error, target = _error(estimator, tol, state)
        return ~(error > target)  # a NaN: it cannot go on

    return jax.lax.while_loop(go_on, step, (carry, jnp.asarray(False)))[0]


def _apply_block(matvec: Matvec, block: Block) -> Block:
    if jax.tree.leaves(block)[0].shape[0] > 1:
        products = jax.vmap(matvec)(block)
        _tree.check_like(products, block, "matvec(block)", "like")
        return products
    product = matvec(_tree.row(block, 0))
    _check_products((product,), _tree.row(block, 0))
    return jax.tree.map(lambda leaf: leaf[None], product)


def _check_products(products: Sequence[Vector], like: Params) -> None:
    for product in products:
        _tree.check_like(product, like, "matvec(vector)", "like")
