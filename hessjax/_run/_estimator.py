"""The protocol: what an estimator is, its compiled methods, what watches a run, and options of a run."""

import abc
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hessjax._core import _numbers, _tree
from hessjax._core._compiled import compiled
from hessjax._core._sharding import Layouts
from hessjax._core._types import Amount, Block, Key, Matvec, Params, Relative, Scalar, Vector


class Estimator(abc.ABC):
    """An iterative method that asks for matrix-vector products and never calls the matvec itself.

    An optimizer is a pair of pure functions around a gradient; an estimator is the same around a
    product. `hessjax.run` drives it; so can any loop of your own:

        state = estimator.init(key, like)
        while not done:
            block = estimator.query(state)                    # leaves have a leading axis
            state = estimator.update(state, products_of(block))
        result = estimator.result(state)

    To make one, subclass this as a frozen dataclass: its fields are the settings, its methods pure functions.
    Equal settings share compiled code. One that holds arrays must be a pytree with them as leaves
    (`jax.tree_util.register_dataclass`); other arrays then compile nothing anew.

    Attributes:
        init_only: the names of fields that `init` alone reads (a right-hand side, vectors to start from):
            all else is compiled without them.
        less_memory: settings that need less, in words.

    Example:
        >>> import dataclasses
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> @dataclasses.dataclass(frozen=True)
        ... class Norm(hj.estimators.Estimator):  # of A·v for a random v
        ...     probe: object = hj.probes.rademacher
        ...     def init(self, key, like):
        ...         return self.probe(key, like)
        ...     def query(self, state):
        ...         return state[None]
        ...     def update(self, state, products):
        ...         return products[0]
        ...     def result(self, state):
        ...         return jnp.linalg.norm(state)
        ...     def error(self, state):
        ...         return jnp.inf
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.array([3.0, 4.0]))
        >>> float(hj.run(Norm(), A, jax.random.key(0), jnp.zeros(2), max_matvecs=1)[0])
        5.0
    """

    init_only: ClassVar[tuple[str, ...]] = ()
    less_memory: ClassVar[str] = ""

    @abc.abstractmethod
    def init(self, key: Key, like: Params) -> Any:
        """The state before the first product; `like` gives structure, shapes and dtypes."""

    @abc.abstractmethod
    def query(self, state: Any) -> Block:
        """The vectors to be multiplied next (leading axis, often of length 1)."""

    @abc.abstractmethod
    def update(self, state: Any, products: Block) -> Any:
        """The next state, from the products in the query's order and shape."""

    @abc.abstractmethod
    def result(self, state: Any) -> Any:
        """The result, readable after any number of products, none included."""

    @abc.abstractmethod
    def error(self, state: Any) -> Scalar:
        """Its own estimate of its error, in the result's units.

        NaN says that it cannot go on (more products would change nothing): a run with a `tol` then ends.
        """

    def scale(self, state: Any) -> Scalar:
        """The magnitude that a `relative` tolerance refers to, in the result's units.

        Raises:
            ValueError: always, unless a subclass defines it: it then takes absolute tolerances only.
        """
        raise ValueError(
            "`tol` must be absolute: this estimator has no `scale` for a relative one to refer to."
        )


Method = TypeVar("Method", bound=Estimator)


def begun(estimator: Method) -> Method:
    """What is left of the settings once `init` was called: what loops are compiled for."""
    # Not by the constructor, whose checks refuse None.
    left = copy.copy(estimator)
    for name in estimator.init_only:
        object.__setattr__(left, name, None)
    return left


# Functions of this module, since jax remembers traces by function, and a bound method is new at every access.
@compiled()
def block_of(estimator: Estimator, state: Any) -> Block:
    """`estimator.query(state)`."""
    return estimator.query(state)


@compiled()
def scale_of(estimator: Estimator, state: Any) -> Scalar:
    """`estimator.scale(state)`."""
    return estimator.scale(state)


def limit_of(estimator: Estimator, tol: Amount, state: Any) -> Any:
    """The error that a tolerance allows, in the result's units."""
    return tol.limit(estimator.scale(state) if isinstance(tol, Relative) else None)


# -- the methods, compiled once for equal settings -----------------------------------------------------


class Carry(NamedTuple):
    """What changes from step to step.

    Attributes:
        state: the estimator's.
        steps: how many were absorbed.
        failed_leaf: the first leaf of a product that was not finite; -1: none was.
    """

    state: Any
    steps: Int[Array, ""]
    failed_leaf: Int[Array, ""]


def _meant(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose NaN and infinity are meant, such as the error of a run that has no sample."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with _numbers.meant():
            return function(*args)

    return call


@compiled(static_argnums=1)
def state_of(estimator: Estimator, layouts: Layouts, key: Key, like: Params) -> Any:
    """`estimator.init(key, like)`, where `like` is told to lie."""
    with layouts.told(like):
        state = estimator.init(key, like)
    # `like` tells jit which mesh it is on, so is not dropped. Not by jit's `keep_unused`: with it jax 0.12
    # never lets go of what functions close over.
    return jax.lax.optimization_barrier((state, like))[0]


init = _meant(state_of)


@_meant
@compiled()
def read_result(estimator: Estimator, state: Any) -> Any:
    return estimator.result(state)


@compiled(static_argnums=(1, 2))
def query(estimator: Estimator, dtypes: tuple[Any, ...], layouts: Layouts, state: Any) -> tuple[Vector, ...]:
    """The queried vectors, one by one, in the dtypes of the params, and lying as they do."""
    # Taken apart in here: outside `jit` every vector of every leaf would be a dispatch of its own.
    leaves, structure = jax.tree.flatten(estimator.query(state))
    rows = [
        [x.astype(dtype) for x, dtype in zip(xs, dtypes, strict=True)] for xs in zip(*leaves, strict=True)
    ]
    return tuple(layouts.laid(jax.tree.unflatten(structure, row)) for row in rows)


# Of what it changes only the state is donated: the host waits for an old count of steps.
@compiled(static_argnums=1, donate_argnums=2)
def absorb(
    estimator: Estimator,
    layouts: Layouts,
    state: Any,
    steps: Int[Array, ""],
    failed_leaf: Int[Array, ""],
    products: tuple[Vector, ...],
) -> Carry:
    """One update of a carry, whose state lies like this, in its memory."""
    block = jax.tree.map(lambda *xs: jnp.stack(xs), *products)
    return update(estimator, layouts, Carry(state, steps, failed_leaf), block)


def update(estimator: Estimator, layouts: Layouts, carry: Carry, products: Block) -> Carry:
    """One update, unless this product or an earlier one is not finite: then the state stays as it was."""
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(products)])
    failed = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    # The first failure stays: the host looks every few products only, and by then has sent more.
    failed = jnp.where(carry.failed_leaf >= 0, carry.failed_leaf, failed)
    updated = functools.partial(_updated, estimator, layouts)
    state = jax.lax.cond(failed < 0, updated, lambda state, _: state, carry.state, _tree.wide(products))
    return Carry(layouts.laid(state), carry.steps + jnp.int32(failed < 0), failed)


def _updated(estimator: Estimator, layouts: Layouts, state: Any, products: Block) -> Any:
    with layouts.told(state):  # in here, since a branch has arrays of its own
        return layouts.laid(estimator.update(state, products))


@_meant
@compiled()
def error(estimator: Estimator, tol: Amount | None, state: Any) -> tuple[Scalar, Scalar]:
    """The error, and the target it has to reach."""
    found = jnp.asarray(estimator.error(state), jnp.result_type(float))
    target = -jnp.inf if tol is None else limit_of(estimator, tol, state)
    return found, jnp.asarray(target, found.dtype)


# -- what watches a run ----------------------------------------------------------------------------


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


@contextlib.contextmanager
def entered(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Inside all callbacks that are context managers."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, contextlib.AbstractContextManager):
                stack.enter_context(callback)
        yield


class Beginning(NamedTuple):
    """What a run begins with: `run`'s arguments, and the state before the first product."""

    estimator: Estimator
    matvec: Matvec
    key: Key
    like: Params
    state: Any
