"""What a run will need of every device's memory, said before anything is allocated."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from hessjax._core import _tree
from hessjax._core._compiled import Compiled, compiled
from hessjax._core._memory import MemoryLimitWarning, limit_of, on_each, on_host, shown_bytes
from hessjax._core._messages import checked_flag, checked_function, shown
from hessjax._core._sharding import Layouts
from hessjax._core._tables import Column, Row, Table, printable
from hessjax._core._types import BatchMatvec, Params
from hessjax._run import _drivers, _estimator
from hessjax._run._arguments import check_run
from hessjax._run._estimator import Carry, Estimator, begun

PROGRAM = "a smaller batch, `microbatch`, or `jax.checkpoint` around the layers of the model"
"""What makes a product, or a gradient, take less."""


class MemoryRow(NamedTuple):
    """What is held throughout, or needed at one stage with all that is held at it.

    Attributes:
        name: of the part or stage.
        bytes: on each device.
        is_peak: whether it is a stage: the largest of these is the `total`.
    """

    name: str
    bytes: int
    is_peak: bool


@printable
class MemoryEstimate(NamedTuple):
    """What a call needs of every device's memory.

    Attributes:
        rows: what is held, then the stages.
        limit: the bytes that a device has for jax; None where the backend does not say, as a CPU's.
        on_host: bytes that lie in the memory of the host instead (`basis_memory="pinned_host"`).
        advice: what would need less.
    """

    rows: tuple[MemoryRow, ...]
    limit: int | None
    on_host: int = 0
    advice: str = ""

    @property
    def total(self) -> int:
        """The most bytes needed at once, on each device."""
        return max(row.bytes for row in self.rows if row.is_peak)

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the limit is not known."""
        return None if self.limit is None else self.total <= self.limit

    def _table(self) -> Table:
        cells = [(row.name, shown_bytes(row.bytes)) for row in self.rows]
        cells.append(("at most, on each device", shown_bytes(self.total)))
        if self.on_host:
            cells.append(("in the host's memory", shown_bytes(self.on_host)))
        if self.limit is not None:
            cells.append(("there is", shown_bytes(self.limit)))
        notes = (f"Less: {self.advice}.",) if self.fits is False and self.advice else ()
        return Table((Column("memory", "name"), Column("bytes")), tuple(map(Row, cells)), notes=notes)


def memory_estimate(what: Any, *args: Any, on_device: bool = False, **keywords: Any) -> MemoryEstimate:
    """What a call will need of every device's memory, before anything is allocated.

    Its programs are compiled, not run, and asked for what they take; so arrays may be shapes alone
    (`jax.ShapeDtypeStruct`, with `sharding=` where they are to be divided over devices).

    Args:
        what: an estimator, such as `hessjax.estimators.lanczos(5)`, with `matvec` and `like` behind it; an
            optax transformation, such as `hessjax.prune(...)`, with the params; or any function that jax can
            compile, with its arguments: a matvec with a vector, `hessjax.inverse_fisher` with gradients.
        *args: see `what`: arrays, or their shapes. A matvec made of shapes will do.
        on_device: of an estimator: as `run` takes it.
        **keywords: of a transformation what its `update` takes besides; of a function its other arguments.

    Returns:
        A `MemoryEstimate`: `.total` bytes on each device, `.rows` by part and stage, `.limit` of the device
        and `.fits`; `print` shows a table. Of an estimator: a run by `run`, its result included. Of a
        transformation: a step in which the state's memory is used again (`donate_argnums`).

    Warns:
        MemoryLimitWarning: it does not fit. Only where the backend says what a device has.

    Raises:
        TypeError: `what` is none of these, or cannot be compiled, such as a matvec over batches.

    Cost:
        Compiles the programs of the run, and does nothing else.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> like = jax.ShapeDtypeStruct((10**6,), jnp.float32)  # nothing is allocated
        >>> A = jax.tree_util.Partial(jnp.multiply, like)
        >>> basis = hj.memory_estimate(hj.estimators.slq(1, 80), A, like)
        >>> lean = hj.memory_estimate(hj.estimators.slq(1, 80, reorthogonalise=False), A, like)
        >>> basis.total > 10 * lean.total
        True
    """
    checked_flag("on_device", on_device)
    if isinstance(what, Estimator):
        found = _of_run(what, *_matvec_and_like(args), on_device)
    elif hasattr(what, "init") and hasattr(what, "update"):
        found = _of_transformation(what, args, keywords)
    elif callable(what):
        found = _of_call(what, args, keywords)
    else:
        raise TypeError(
            "`what` must be an estimator, an optax transformation or a function to compile, got "
            f"{shown(what)}: `hessjax.estimators.lanczos(5)`, say."
        )
    if found.limit is not None and not found.fits:
        warnings.warn(MemoryLimitWarning("this", found.total, found.limit, found.advice), stacklevel=2)
    return found


# -- what is asked for -----------------------------------------------------------------------------


def _matvec_and_like(args: tuple[Any, ...]) -> tuple[Any, Params]:
    if len(args) != 2:
        raise TypeError(
            f"`memory_estimate` must be given `matvec` and `like` behind an estimator, got {len(args)} "
            "arguments."
        )
    matvec, like = args
    if isinstance(matvec, BatchMatvec):
        raise TypeError(
            "`matvec` must be that of one batch, since a matvec over batches is no program: pass "
            "`make_matvec(batch)` of the largest, and add one vector for the sum."
        )
    _tree.check_floating(like, "like")
    return matvec, like


def _of_run(estimator: Estimator, matvec: Any, like: Params, on_device: bool) -> MemoryEstimate:
    key = jax.random.key(0)
    check_run(estimator, matvec, key, (), on_device)
    matvec = _drivers.as_partial(matvec)
    held, left = on_each((matvec, like)), begun(estimator)
    start = Program.of(_estimator.state_of, estimator, Layouts.of(like), key, like)
    state, host = start.result, on_host(start.result)
    size = on_each(state)
    rows = [MemoryRow("params and data", held, False), MemoryRow("state", size, False)]
    rows.append(MemoryRow("beginning", held + start.beyond, True))
    stages = _on_device if on_device else _on_the_host
    rows += [MemoryRow(name, held + size + more, True) for name, more in stages(left, matvec, like, state)]
    reading = Program.of(_read_result, estimator, state)
    rows.append(MemoryRow("reading the result", held + size + reading.beyond, True))
    return MemoryEstimate(tuple(rows), limit_of((matvec, like)), host, _advice(estimator, rows))


def _advice(estimator: Estimator, rows: list[MemoryRow]) -> str:
    """What would need less, by what needs most."""
    worst = max(rows, key=lambda row: row.bytes if row.is_peak else 0).name
    ways = [estimator.less_memory, PROGRAM if worst in ("multiplying", "the whole run") else ""]
    return "; ".join(filter(None, ways))


def _on_the_host(estimator: Estimator, matvec: Any, like: Params, state: Any) -> Iterator[tuple[str, int]]:
    """What steps take beyond what is held."""
    dtypes = tuple(jnp.result_type(leaf) for leaf in jax.tree.leaves(like))
    query = Program.of(_estimator.query, estimator, dtypes, Layouts.of(like), state)
    product = Program.of(_applied, Layouts.of((matvec, query.result[0])), matvec, (query.result[0],), {})
    # All vectors of a block are there from the first product on, all products at the last.
    waiting = on_each(query.result) + on_each(product.result) * (len(query.result) - 1)
    yield "multiplying", max(query.beyond, waiting + product.beyond)
    products = (product.result,) * len(query.result)
    absorb = Program.of(_estimator.absorb, estimator, Layouts.of(state), *_carry(state), products)
    yield "absorbing", on_each(product.result) * len(products) + absorb.beyond


def _on_device(estimator: Estimator, matvec: Any, like: Params, state: Any) -> Iterator[tuple[str, int]]:
    carry = _carry(state)
    layouts = Layouts.of(like), Layouts.of(state)
    loop = Program.of(_drivers.loop_on_device, estimator, layouts, matvec, like, carry.steps, None, carry)
    yield "the whole run", loop.beyond


def _carry(state: Any) -> Carry:
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return Carry(state, count, count)


def _of_transformation(transformation: Any, args: Any, keywords: Any) -> MemoryEstimate:
    if len(args) != 1:
        raise TypeError(
            f"`memory_estimate` must be given the params behind a transformation, got {len(args)} arguments."
        )
    params = args[0]
    start = Program.of(_begun, Partial(transformation.init), params)
    held, state = on_each(params), start.result
    step = Program.of(_updated, Partial(transformation.update), params, state, params, keywords)
    both = 2 * held + on_each(keywords)
    rows = (
        MemoryRow("params and gradients", both, False),
        MemoryRow("state", on_each(state), False),
        MemoryRow("beginning", held + start.beyond, True),
        MemoryRow("an update", both + on_each(state) + step.beyond, True),
    )
    return MemoryEstimate(rows, limit_of(params), on_host(state))


def _of_call(function: Callable[..., Any], args: tuple[Any, ...], keywords: Any) -> MemoryEstimate:
    checked_function("what", function, "(*args)")
    _tree.check_arrays((args, keywords) if args else keywords, "args")
    # Numbers and words are settings, which functions may look at.
    arrays = {name: x for name, x in keywords.items() if any(map(_is_array, jax.tree.leaves(x)))}
    settings = {name: x for name, x in keywords.items() if name not in arrays}
    function = functools.partial(function, **settings) if settings else function
    function, keywords = _drivers.as_partial(function), arrays
    program = Program.of(_parts_of, Layouts.of((function, args, keywords)), function, args, keywords)
    held = on_each((function, args, keywords))
    rows = (
        MemoryRow("arguments", held, False),
        MemoryRow("results", on_each(program.result), False),
        MemoryRow("the call", held + program.beyond, True),
    )
    limit = limit_of((function, args, keywords))
    return MemoryEstimate(rows, limit, on_host((function, args, program.result)), PROGRAM)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray))


# Told where its arguments lie, as a product is that is called with arrays instead of traced.
@compiled(static_argnums=0)
def _applied(layouts: Layouts, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    with layouts.told((function, args, keywords)):
        return function(*args, **keywords)


@compiled(static_argnums=0)
def _parts_of(layouts: Layouts, function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    # Without their structure: what a type says of its arrays need not hold for shapes.
    with layouts.told((function, args, keywords)):
        return jax.tree.leaves(function(*args, **keywords))


@compiled()
def _begun(init: Any, params: Params) -> Any:
    return init(params)


@compiled(donate_argnums=2)
def _updated(update: Any, grads: Params, state: Any, params: Params, keywords: dict[str, Any]) -> Any:
    return update(grads, state, params, **keywords)


@compiled()
def _read_result(estimator: Estimator, state: Any) -> Any:
    return estimator.result(state)


# -- programs --------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        result: what it returns, as shapes that know where they lie.
        beyond: bytes on each device that it takes beyond its arguments.
    """

    result: Any
    beyond: int

    @classmethod
    def of(cls, function: Compiled, *args: Any) -> "Program":
        """The function, compiled for these."""
        made = function.lower(*args).compile()
        sizes, result = made.memory_analysis(), jax.tree.map(_placed, made.out_info)
        outputs, reused = sizes.output_size_in_bytes, sizes.alias_size_in_bytes
        if not sizes.host_output_size_in_bytes:  # compilers for a CPU count its "host" among the device's
            outputs, reused = outputs - on_host(result), max(reused - on_host(result), 0)
        return cls(result, max(int(sizes.temp_size_in_bytes + outputs - reused), 0))


def _placed(info: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=info.sharding)
