"""The map of a network: what every leaf of its params takes part in, and which leaves nothing is known of."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _tree
from hessjax._core._tables import Column, Row, Table, printable, shape_text
from hessjax._core._types import ModelFn, Params
from hessjax.curvature._product import check_call, explained
from hessjax.curvature._weights import num_examples
from hessjax.layers._taps import read_uses
from hessjax.layers._uses import LeafUses, Use


@printable
@dataclasses.dataclass(frozen=True, repr=False)
class Coverage:
    """What every leaf takes part in, in the order of the leaves.

    Attributes:
        leaves: one entry for each.
    """

    leaves: tuple["LeafCoverage", ...]

    @property
    def covered(self) -> tuple[str, ...]:
        """The paths of the leaves that are covered: `hj.select(params, coverage.covered)` takes them."""
        return tuple(leaf.path for leaf in self.leaves if not leaf.reason)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each other leaf is not, by path."""
        return {leaf.path: leaf.reason for leaf in self.leaves if leaf.reason}

    def _table(self) -> Table:
        columns = (
            Column("Leaf", "name"),
            Column("Shape", "word", 2),
            Column("Takes part in", "word"),
            Column("Times"),
            Column("Inside", "word", 1),
            Column("Not covered", "text"),
        )
        count, size = len(self.covered), sum(leaf.size for leaf in self.leaves if not leaf.reason)
        total = sum(leaf.size for leaf in self.leaves)
        note = f"{count} of {len(self.leaves)} leaves are covered, {size:,} of {total:,} weights."
        return Table(columns, tuple(map(_row, self.leaves)), notes=(note,))


class LeafCoverage(NamedTuple):
    """What one leaf takes part in.

    Attributes:
        path: its path.
        shape: its shape.
        uses: the operations that are understood, in words, each as often as the program has it.
        times: how often one example executes them, in all steps of loops.
        loops: the loops around them.
        reason: why the leaf is not covered; empty if it is.
    """

    path: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    times: int
    loops: tuple[str, ...]
    reason: str

    @property
    def size(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


def coverage(fn: ModelFn, params: Params, *args: Any) -> Coverage:
    """What every leaf of the params takes part in, read from the traced program of one example.

    Any function will do: nothing is registered, and no module is known by name. A leaf is covered if all
    that it takes part in is linear in it, and understood: matrix products with any axes contracted, free and
    batched, convolutions, lookups of rows, biases and scales, in `scan`s too. On the way there it may be
    reshaped, transposed and cast. Each leaf's gradient is then a sum of outer products of what went in and
    what came back, which is all that K-FAC and its relatives need.

    Args:
        fn: `fn(params, *args)`, a loss or a model.
        params: pytree of real floating-point arrays, or of their shapes.
        *args: first the batch, whose arrays share their leading axis, as for `per_example_grads`.

    Returns:
        A `Coverage`, which prints as a table: for every leaf its operations, how often one example executes
        them, the loops they are in; and for each that is not covered the reason. Leave such leaves out of
        the params by `hj.select(params, coverage.covered)`, or write the function otherwise.

    Raises:
        TypeError: `params` has leaves that are not floating point.
        ValueError: no batch, or one whose arrays disagree.

    Cost:
        One trace; nothing is compiled or run.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w"] + params["b"]) / params["temperature"]
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "temperature": jnp.ones(())}
        >>> found = hj.layers.coverage(model_fn, params, jnp.ones((4, 3)))
        >>> found.covered, found.reasons["temperature"]
        (('b', 'w'), 'divides, which is not linear')
    """
    leaves = checked_uses(fn, params, args)
    return Coverage(tuple(map(_leaf, _tree.leaf_paths(params), jax.tree.leaves(params), leaves)))


def checked_uses(fn: Any, params: Any, args: tuple[Any, ...], argument: str = "fn") -> tuple[LeafUses, ...]:
    """The uses of every leaf, all arguments being what they must be."""
    _tree.check_floating(params)
    if args:  # else `num_examples` says what is missing
        check_call(argument, fn, args)
    num_examples(args)
    example = jax.tree.map(first_of, args[0])
    with explained(argument):
        return read_uses(fn, params, (example, *args[1:]))[1]


def first_of(x: Any) -> jax.ShapeDtypeStruct:
    """One example, as a batch of one, of which no axis is divided between devices."""
    shape = np.shape(x)
    dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(x), allow_extended_dtype=True)  # random keys
    return jax.ShapeDtypeStruct((1, *shape[1:]) if shape else (), dtype)


def check_covered(params: Params, leaves: tuple[LeafUses, ...]) -> None:
    """Raise a ValueError that names every leaf which is not covered, and why."""
    pairs = zip(_tree.leaf_paths(params), leaves, strict=True)
    bad = [f"  {path} {leaf.reason}" for path, leaf in pairs if not leaf.is_covered]
    if bad:
        raise ValueError(
            "`params` must have leaves only that `hessjax.layers.coverage` covers, but\n"
            + "\n".join(bad)
            + "\nLeave them out: `part = hessjax.select(params, coverage.covered)`, then `part.restrict(fn)` "
            "with `part.part` for the params."
        )


def _leaf(path: str, leaf: Any, found: LeafUses) -> LeafCoverage:
    words = tuple(use.words() for use in found.uses)
    loops = dict.fromkeys(_loop(loop.trips) for use in found.uses for loop in use.loops)
    return LeafCoverage(path, np.shape(leaf), words, sum(map(_trips, found.uses)), tuple(loops), found.reason)


def _trips(use: Use) -> int:
    return math.prod(loop.trips or 0 for loop in use.loops)


def _loop(trips: int | None) -> str:
    return f"scan of {trips}"


def _row(leaf: LeafCoverage) -> Row:
    words = "; ".join(dict.fromkeys(leaf.uses))
    cells = (
        leaf.path,
        shape_text(leaf.shape),
        words,
        str(leaf.times or ""),
        ", ".join(leaf.loops),
        leaf.reason,
    )
    return Row(cells, "bold red" if leaf.reason else "")
