"""How sparse a network is: one row per leaf, as data and as a table."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax._core import _tree
from hessjax._core._axes import Axes, layers_of
from hessjax._core._counting import Total, num_set_in_all
from hessjax._core._layout import tree_axes
from hessjax._core._messages import checked_flag
from hessjax._core._tables import Column, Row, Table, number, percent, printable, shape_text
from hessjax._core._types import ModelFn, Params
from hessjax._core._words import AxisWords
from hessjax.curvature._product import check_call
from hessjax.program._products import multiply_adds
from hessjax.program._tracing import read


class SummaryRow(NamedTuple):
    """One leaf, or all of them together.

    Of a matrix a row is one input, a column one output; of a convolution a channel is one input, a filter one
    output, a kernel the weights between one input and one output. Where a leaf has none, as biases have
    neither, the fraction is 0. Layers that a leaf stacks, as under `nn.scan`, have each their own. In the
    total they are fractions of all that the leaves have.

    Attributes:
        path: where the leaf is, `Conv_0/kernel`.
        shape: its shape; `()` for the total.
        number: how many weights it has.
        nonzeros: how many of them are not 0.0.
        multiply_adds: how many one call of the model spends on it; None without a model.
        multiply_adds_left: the same times the fraction of nonzeros: what hardware that skips every zero
            would spend.
        zero_columns: the fraction of columns that are zero throughout.
        zero_rows: of rows.
        zero_channels: of channels.
        zero_kernels: of kernels (Distiller's 2D).
        zero_filters: of filters (Distiller's 3D).
        sparsity: the fraction of zeros; 0 for an empty leaf.
        std: standard deviation of all weights, zeros included (population, `ddof=0`), in the units of the
            weights.
        mean: their mean.
        abs_mean: the mean of their absolute values. These three are NaN for an empty leaf.
    """

    path: str
    shape: tuple[int, ...]
    number: int
    nonzeros: int
    multiply_adds: int | None
    multiply_adds_left: float | None
    zero_columns: float
    zero_rows: float
    zero_channels: float
    zero_kernels: float
    zero_filters: float
    sparsity: float
    std: float
    mean: float
    abs_mean: float


@printable
class Summary(NamedTuple):
    """What `summary` returns: numbers to compute with, and a table when printed.

    The table leaves out what says nothing: multiply-adds without a model, and structures (columns, rows,
    channels, 2D kernels, 3D filters) of which no leaf has lost any. It is as wide as the terminal, or 80;
    what does not fit is left out too, and named below. `rows` and `total` hold all.

    Attributes:
        rows: one per leaf, in the order of the tree.
        total: all leaves together; its `std`, `mean`, `abs_mean` are those of all weights in one bag.
        notes: what the multiply-adds leave open: a `while` loop counts as one step, a `cond` as its most
            expensive branch, and what some operations do inside is not counted.
    """

    rows: tuple[SummaryRow, ...]
    total: SummaryRow
    notes: tuple[str, ...] = ()

    def to_text(self, width: int | None = None) -> str:
        """The table, at most `width` columns wide; by default as wide as the terminal, 80 without one."""
        return self._table().to_text(width)

    def _table(self) -> Table:
        columns = [column for column in _COLUMNS if column.always or column.value(self.total)]
        rows = [
            Row(tuple(column.form(column.value(row)) for column in columns))
            for row in (*self.rows, self.total)
        ]
        rows[-1] = rows[-1]._replace(style="bold")
        return Table(tuple(column.head for column in columns), tuple(rows), notes=self.notes)


class _Column(NamedTuple):
    head: Column
    value: Callable[[SummaryRow], Any]
    form: Callable[[Any], str]
    always: bool = True


_COLUMNS = (
    _Column(Column("Name", "name"), lambda row: row.path, str),
    _Column(Column("Shape", "word", 9), lambda row: row.shape, shape_text),
    _Column(Column("Weights", rank=1), lambda row: row.number, "{:,}".format),
    _Column(Column("Nonzero", rank=2), lambda row: row.nonzeros, "{:,}".format),
    _Column(Column("Mult-adds", rank=4), lambda row: row.multiply_adds, "{:,}".format, False),
    _Column(Column("Left", rank=3), lambda row: row.multiply_adds_left, "{:,.0f}".format, False),
    _Column(Column("Cols %", rank=5), lambda row: row.zero_columns, percent, False),
    _Column(Column("Rows %", rank=7), lambda row: row.zero_rows, percent, False),
    _Column(Column("Ch %", rank=6), lambda row: row.zero_channels, percent, False),
    _Column(Column("2D %", rank=10), lambda row: row.zero_kernels, percent, False),
    _Column(Column("3D %", rank=8), lambda row: row.zero_filters, percent, False),
    _Column(Column("Zeros %"), lambda row: row.sparsity, percent),
    _Column(Column("Std", rank=11), lambda row: row.std, number),
    _Column(Column("Mean", rank=13), lambda row: row.mean, number),
    _Column(Column("Abs-mean", rank=12), lambda row: row.abs_mean, number),
)


def summary(
    params: Params,
    model_fn: ModelFn | None = None,
    *args: Any,
    axes: AxisWords | None = None,
    by_layer: bool = False,
) -> Summary:
    """Count the zeros of every leaf, and describe what is left.

    Zeros are counted one by one, and by rows, columns, channels, kernels and filters (`SummaryRow` says which
    axes those are): whole ones can be cut out of the network. With a model, so are its multiply-adds:
    those of matrix products and convolutions with a leaf, dense, and times the leaf's fraction of nonzeros.
    Counted are products of which one side is a leaf, or made of leaves alone (transposed, cast, cut, masked,
    normalised: it then counts for the largest leaf in it), not those of data with data, such as the scores of
    attention. The step of a `scan` counts as often as it runs; `notes` names what is not known.

    Args:
        params: any pytree of floating-point arrays: a linen dict, an `nnx.State`, ...
        model_fn: `model_fn(params, *args) -> outputs`, to count the multiply-adds of one call.
        *args: its batch, as arrays or `jax.ShapeDtypeStruct`s; pass one example for the count per
            example.
        axes: what the axes of leaves mean, where names and shapes do not tell, as in `prune`.
        by_layer: a row for every layer that a leaf stacks, `blocks/Dense_0/kernel[0]`, ..., in place of one
            for all of them; multiply-adds in equal parts.

    Returns:
        A `Summary`: `.rows` and `.total` hold the numbers, `print` shows them as a table, `rich.print` with
        style.

    Raises:
        TypeError: if a leaf is not floating-point (a counter, a random key): pass the weights only.
        ValueError: if there is no weight at all; if `axes` does not fit.

    Cost:
        A few passes over the weights, summed in float32 at least; one transfer of at most ten numbers per
        leaf; with a model one trace of it.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.array([1.0, 1.0])}
        >>> result = hj.summary(params)
        >>> print(result)
        Name    Shape  Weights  Nonzero  Cols %  Rows %  Zeros %    Std   Mean  Abs-mean
        bias    2            2        2    0.00    0.00     0.00   0.00   1.00      1.00
        kernel  2×2          4        1   50.00   50.00    75.00  0.866  0.500     0.500
        total                6        3   50.00   50.00    50.00  0.745  0.667     0.667
        >>> result.total.sparsity
        0.5
        >>> hj.summary(params, lambda p, x: x @ p["kernel"] + p["bias"], jnp.ones((1, 2))).total.multiply_adds
        4
    """
    _tree.check_floating(params)
    checked_flag("by_layer", by_layer)
    if model_fn is not None or args:
        check_call("model_fn", model_fn, args)
    work = None if model_fn is None else multiply_adds(read(model_fn, params, *args))
    leaves, meanings = jax.tree.leaves(params), tree_axes(params, axes)
    spent = [None if work is None else work.by_leaf[i] for i in range(len(leaves))]
    entries = [
        entry
        for x, found, number in zip(leaves, meanings, spent, strict=True)
        for entry in (_by_layer(x, found, number) if by_layer else [_Entry(found.path, x, found, number)])
    ]
    counted = jax.device_get(
        [(_moments(entry.leaf), _zero_parts(entry.leaf, _meaning(entry.axes))) for entry in entries]
    )
    facts = [_facts(entry, *moments) for entry, moments in zip(entries, counted, strict=True)]
    return Summary(tuple(map(_row, facts)), _row(_total(facts)), () if work is None else work.notes)


class _Entry(NamedTuple):
    """What a row is about."""

    path: str
    leaf: Any
    axes: Axes
    multiply_adds: int | None


def _by_layer(leaf: Any, axes: Axes, work: int | None) -> list[_Entry]:
    """The layers that a leaf stacks, each with its part of the work, which `scan` does for all alike."""
    number = axes.num_layers
    each = None if work is None or not number else work // number
    alone = axes._replace(shape=axes.layer, stack=())
    pairs = zip(axes.layer_names(), layers_of(jnp.asarray(leaf), axes), strict=True)
    return [_Entry(name, layer, alone, each) for name, layer in pairs]


class _Facts(NamedTuple):
    """Counts and moments of a leaf, or of all.

    Attributes:
        parts: how many columns, rows, channels, kernels and filters there are.
        zero_parts: how many of them are zero throughout.
    """

    path: str
    shape: tuple[int, ...]
    number: int
    nonzeros: int
    multiply_adds: int | None
    multiply_adds_left: float | None
    parts: np.ndarray
    zero_parts: np.ndarray
    mean: float
    variance: float
    abs_mean: float


@jax.jit
def _moments(x: Array) -> tuple[Total, Array, Array, Array]:
    """Nonzeros, mean, standard deviation, mean of absolute values."""
    wide = _tree.wide(x)
    # In units of the largest: squares of weights of 1e-25 or 1e20 leave float32.
    largest = jnp.max(jnp.abs(wide), initial=0)
    unit = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    mean = jnp.mean(wide / unit)
    std = jnp.sqrt(jnp.mean((wide / unit - mean) ** 2))
    return num_set_in_all(x != 0), unit * mean, unit * std, unit * jnp.mean(jnp.abs(wide / unit))


@functools.partial(jax.jit, static_argnums=1)
def _zero_parts(x: Array, axes: Axes) -> dict[int, Array]:
    """How many columns (0), rows (1), channels (2), kernels (3) and filters (4) are zero throughout."""
    if axes.kind == "vector" or not x.size:
        return {}
    window, ins, outs = (
        tuple(axes.unstacked[i] for i in part) for part in (axes.spatial, axes.input, axes.output)
    )
    lines = jnp.all(x == 0, axis=window, keepdims=True)
    by_output, by_input = (jnp.sum(jnp.all(lines, axis=part)) for part in (ins, outs))
    return {2: by_input, 3: jnp.sum(lines), 4: by_output} if window else {0: by_output, 1: by_input}


def _meaning(axes: Axes) -> Axes:
    """Without the path: leaves of one shape share a program."""
    return axes._replace(path="", attention=None)


def _num_parts(axes: Axes) -> list[int]:
    if axes.kind == "vector" or 0 in axes.shape:
        return [0] * 5
    ins, outs = (math.prod(axes.layer[i] for i in part) for part in (axes.input, axes.output))
    number = axes.num_layers
    ins, both, outs = number * ins, number * ins * outs, number * outs
    return [0, 0, ins, both, outs] if axes.spatial else [outs, ins, 0, 0, 0]


def _facts(entry: _Entry, moments: tuple[Any, ...], zeros: dict[int, Any]) -> _Facts:
    nonzeros, mean, std, abs_mean = moments[0].exactly(), *(x.item() for x in moments[1:])
    shape, work = jnp.shape(entry.leaf), entry.multiply_adds
    number = math.prod(shape)
    left = None if work is None else work * nonzeros / max(number, 1)
    zero_parts = np.array([int(zeros.get(i, 0)) for i in range(5)])
    parts = np.array(_num_parts(entry.axes))
    return _Facts(entry.path, shape, number, nonzeros, work, left, parts, zero_parts, mean, std**2, abs_mean)


def _total(facts: list[_Facts]) -> _Facts:
    full = [x for x in facts if x.number]
    number = sum(x.number for x in full)
    mean = sum(x.number * x.mean for x in full) / number
    # Deviations from the common mean: within each leaf, and of the leaf's own mean.
    variance = sum(x.number * (x.variance + (x.mean - mean) ** 2) for x in full) / number
    return _Facts(
        path="total",
        shape=(),
        number=number,
        nonzeros=sum(x.nonzeros for x in full),
        multiply_adds=_sum(x.multiply_adds for x in full),
        multiply_adds_left=_sum(x.multiply_adds_left for x in full),
        parts=np.sum([x.parts for x in full], axis=0),
        zero_parts=np.sum([x.zero_parts for x in full], axis=0),
        mean=mean,
        variance=variance,
        abs_mean=sum(x.number * x.abs_mean for x in full) / number,
    )


def _sum(numbers: Iterable[Any]) -> Any:
    """Their sum; None if any is."""
    listed = list(numbers)
    return None if None in listed else sum(listed)


def _row(facts: _Facts) -> SummaryRow:
    fractions: list[Any] = (facts.zero_parts / np.maximum(facts.parts, 1)).tolist()
    sparsity = 1 - facts.nonzeros / facts.number if facts.number else 0.0
    values = (*facts[:6], *fractions, sparsity, facts.variance**0.5, facts.mean, facts.abs_mean)
    return SummaryRow(*values)
