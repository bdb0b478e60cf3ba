"""`run`, and the two loops behind it, on the host and on the device, around steps that are compiled once."""

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from hessjax._core import _memory, _numbers, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import causes_of_nan, checked_count
from hessjax._core._sharding import UNKNOWN, Layouts
from hessjax._core._types import Amount, Block, Key, Matvec, Params, Relative, Tolerance
from hessjax._run import _estimator
from hessjax._run._arguments import check_products, check_run, is_traced, refuse_tracers, width_of
from hessjax._run._estimator import Beginning, Callback, Carry, Estimator, Progress, begun, entered

CHECK_EVERY = 5
"""Products between two looks at the error: reading it makes the host wait for the device."""

AHEAD = 2
"""Steps that the host may send off before the first of them is done: a product each waits in memory."""


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


class Loop(NamedTuple):
    """What stays the same from step to step.

    Attributes:
        estimator: without what `init` alone reads.
        matvec: the symmetric linear map.
        like: what vectors are like.
        width: vectors to a block.
        max_steps: the most steps, those of a restored run included.
        tol: the tolerance; None spends all products.
        callbacks: to be called on the way.
        layouts: where vectors lie.
    """

    estimator: Estimator
    matvec: Matvec
    like: Params
    width: int
    max_steps: int
    tol: Amount | None
    callbacks: Sequence[Callback]
    layouts: Layouts = UNKNOWN


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

    Warns:
        MemoryLimitWarning: the state alone needs more than is free on a device, as far as known.

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
    layouts = Layouts.of(like)
    check_run(estimator, matvec, key, callbacks, on_device)
    if not on_device:
        refuse_tracers((estimator, matvec, key, like, state))
    elif callbacks:
        raise ValueError("`callbacks` must be empty with `on_device=True`: they run on the host.")
    limit = None if tol is None else Amount.of(tol, instead=", or None")
    if state is not None:
        _tree.check_like(
            state,
            _estimator.state_of.eval_shape(estimator, layouts, key, like),
            "state",
            "estimator.init(key, like)",
        )
    else:
        shapes = functools.partial(_estimator.state_of.eval_shape, estimator, layouts, key, like)
        _memory.warn_unless_it_fits(estimator, shapes, like)
    carry = _begun(_estimator.init(estimator, layouts, key, like) if state is None else _copied(state))
    left = begun(estimator)
    if isinstance(limit, Relative):
        _estimator.scale_of.eval_shape(left, carry.state)  # raises an error where there is none
    width = width_of(left, carry.state, like, "estimator.query" if state is None else "state")
    max_matvecs = checked_count("max_matvecs", max_matvecs, width, ", one step's need")
    loop = Loop(left, matvec, like, width, max_matvecs // width, limit, callbacks, layouts)
    if on_device:
        both = layouts, Layouts.of(carry.state)
        looped = loop_within if is_traced((carry, matvec, like)) else loop_on_device
        carry = looped(left, both, as_partial(matvec), like, loop.max_steps, limit, carry)
    else:
        beginning = Beginning(estimator, matvec, key, like, carry.state)
        # Entered first: a checkpoint locks its folder before it reads there.
        with entered(callbacks):
            carry = loop_on_host(loop, _restored(loop, beginning, carry, max_matvecs))
    result = _estimator.read_result(estimator, carry.state)
    if not isinstance(carry.failed_leaf, jax.core.Tracer) and int(carry.failed_leaf) >= 0:
        raise _non_finite(carry, width, like, result, matvec)
    return result, carry.state


def as_partial(matvec: Matvec) -> Partial:
    """The matvec as a pytree, which goes through `jit` as an argument."""
    return matvec if isinstance(matvec, Partial) else Partial(matvec)


def _non_finite(carry: Carry, width: int, like: Params, result: Any, matvec: Matvec) -> NonFiniteProductError:
    count, leaf = int(carry.steps) * width, _tree.leaf_paths(like)[int(carry.failed_leaf)]
    where = f"product {count + 1}" if width == 1 else f"one of products {count + 1} to {count + width}"
    mode = getattr(getattr(matvec, "func", None), "mode", None)  # of a Hessian made by hessjax
    return NonFiniteProductError(
        f"{where} is not finite (first in leaf `{leaf}`): is the loss itself finite at these params? If it "
        f"is, its derivatives are not: {causes_of_nan(like, mode)}. `hj.check` names all leaves. "
        f"The result of the {count} products before is in `.result`, the state in `.state`.",
        result,
        carry.state,
        count,
    )


# -- where a run begins ----------------------------------------------------------------------------


def _begun(state: Any, steps: int = 0) -> Carry:
    # Where the state is: the first step is else compiled for itself.
    return Carry(state, *jax.device_put((jnp.int32(steps), jnp.int32(-1)), Layouts.of(state).whole))


def _copied(state: Any) -> Any:
    # The steps give the state's memory away, and this one is the caller's.
    with _numbers.meant():
        return jax.tree.map(jnp.copy, state)


def _restored(loop: Loop, beginning: Beginning, carry: Carry, max_matvecs: int) -> Carry:
    """Where to go on from: the state that a callback has kept of this very run, if one has."""
    for callback in loop.callbacks:
        ask = getattr(callback, "restore", None)
        if ask is None or (found := ask(beginning)) is None:
            continue
        state, num_matvecs = found
        if num_matvecs > max_matvecs:
            raise ValueError(
                f"`max_matvecs` must be at least {num_matvecs}, the products that the restored run has done, "
                f"got {max_matvecs}."
            )
        carry = _begun(state, num_matvecs // loop.width)
    return carry


# -- on the host -----------------------------------------------------------------------------------


def loop_on_host(loop: Loop, carry: Carry) -> Carry:
    """Multiply and absorb; look at the error every few products, and stop where it is small enough."""
    refuse_tracers(carry)  # as it is inside `jit`, whatever the run was given
    dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(loop.like))
    state_layouts = Layouts.of(carry.state)  # once: every step leaves it where it is
    step, look_every = int(carry.steps), max(1, CHECK_EVERY // loop.width)
    watched = loop.tol is not None or bool(loop.callbacks)
    sent: deque[Array] = deque()
    while True:
        if step >= loop.max_steps or (watched and step and step % look_every == 0):
            if _look(loop, carry, step):
                return carry
        # Of an earlier step, so that the device is never idle; nor does it get far behind.
        elif len(sent) > AHEAD and jax.device_get(sent.popleft()) >= 0:
            return carry
        block = _estimator.query(loop.estimator, dtypes, loop.layouts, carry.state)
        products = tuple(map(loop.matvec, block))
        refuse_tracers(products)
        check_products(products, loop.like)
        carry = _estimator.absorb(loop.estimator, state_layouts, *carry, products)
        sent.append(carry.failed_leaf)
        step += 1


def _look(loop: Loop, carry: Carry, step: int) -> bool:
    """Whether the run is over; the callbacks are told what was seen."""
    looks = (math.inf, -math.inf)
    if loop.tol is not None or loop.callbacks:
        looks = _estimator.error(loop.estimator, loop.tol, carry.state)
    # One transfer: every read makes the host wait for the device.
    (error, target), steps, failed_leaf = jax.device_get((looks, carry.steps, carry.failed_leaf))
    satisfied = loop.tol is not None and not error > target  # a NaN: it cannot go on
    done = bool(step >= loop.max_steps or satisfied or failed_leaf >= 0)
    spent, most = int(steps) * loop.width, loop.max_steps * loop.width
    for callback in loop.callbacks:
        callback(Progress(spent, most, float(error), float(target), carry.state, done))
    return done


# -- on the device ---------------------------------------------------------------------------------


def _loop(
    estimator: Estimator,
    layouts: tuple[Layouts, Layouts],
    matvec: Matvec,
    like: Params,
    max_steps: Any,
    tol: Amount | None,
    carry: Carry,
) -> Carry:
    """The same loop as one compiled program; the layouts are those of vectors, and of the state."""
    step = functools.partial(_step_on_device, estimator, layouts, matvec, like, tol)

    def go_on(loop: tuple[Carry, Bool[Array, ""]]) -> Bool[Array, ""]:
        carry, satisfied = loop
        return (carry.steps < max_steps) & (carry.failed_leaf < 0) & ~satisfied

    return jax.lax.while_loop(go_on, step, (carry, jnp.asarray(False)))[0]


loop_on_device = compiled(static_argnums=1, donate_argnums=6)(_loop)
# Inside `jit` memory is the outer program's, and under `vmap` a state may grow an axis: nothing is donated.
loop_within = compiled(static_argnums=1)(_loop)


def _step_on_device(
    estimator: Estimator,
    layouts: tuple[Layouts, Layouts],
    matvec: Matvec,
    like: Params,
    tol: Amount | None,
    loop: tuple[Carry, Bool[Array, ""]],
) -> tuple[Carry, Bool[Array, ""]]:
    block = _tree.cast_like(estimator.query(loop[0].state), like)
    products = _apply_block(matvec, jax.vmap(layouts[0].laid)(block))
    carry = _estimator.update(estimator, layouts[1], loop[0], jax.vmap(layouts[0].laid)(products))
    if tol is None:
        return carry, jnp.asarray(False)
    look_now = carry.steps % max(1, CHECK_EVERY // jax.tree.leaves(block)[0].shape[0]) == 0
    satisfied = functools.partial(_satisfied, estimator, tol)
    # The error may take an eigendecomposition: not at every step.
    return carry, jax.lax.cond(look_now, satisfied, lambda _: jnp.asarray(False), carry.state)


def _satisfied(estimator: Estimator, tol: Amount, state: Any) -> Bool[Array, ""]:
    error, target = _estimator.error(estimator, tol, state)
    return ~(error > target)  # a NaN: it cannot go on


def _apply_block(matvec: Matvec, block: Block) -> Block:
    if jax.tree.leaves(block)[0].shape[0] > 1:
        products = jax.vmap(matvec)(block)
        _tree.check_vector(products, block, "matvec(block)", "like")
        return products
    product = matvec(_tree.row(block, 0))
    check_products((product,), _tree.row(block, 0))
    return jax.tree.map(lambda leaf: leaf[None], product)
