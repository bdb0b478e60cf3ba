"""How sparse a network is: one row per leaf, as data and as a table."""

import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from hessjax import _tree
from hessjax._typing import Params


class SummaryRow(NamedTuple):
    """One leaf, or all of them together.

    Attributes:
        path: where the leaf is, `Conv_0/kernel`.
        shape: its shape; `()` for the total.
        number: how many weights it has.
        nonzeros: how many of them are not 0.0.
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
    sparsity: float
    std: float
    mean: float
    abs_mean: float


class Summary(NamedTuple):
    """What `summary` returns: numbers to compute with, and a table when printed.

    Attributes:
        rows: one per leaf, in the order of the tree.
        total: all leaves together; its `std`, `mean`, `abs_mean` are those of all weights in one bag.
    """

    rows: tuple[SummaryRow, ...]
    total: SummaryRow

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("Name", "Shape", "Weights", "Nonzero", "Zeros %", "Std", "Mean", "Abs-mean"):
            table.add_column(title, justify="left" if title in ("Name", "Shape") else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        table.add_section()
        table.add_row(*_cells(self.total), style="bold")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=1000, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __repr__(self) -> str:  # a notebook's last line shows the table
        return str(self)


def summary(params: Params) -> Summary:
    """Count the zeros of every leaf, and describe what is left.

    Args:
        params: any pytree of floating-point arrays: a linen dict, an `nnx.State`, ...

    Returns:
        A `Summary`: `.rows` and `.total` hold the numbers, `print` shows them as a table, `rich.print` with
        style.

    Raises:
        TypeError: if a leaf is not floating-point (a counter, a random key): pass the weights only.
        ValueError: if there is no weight at all.

    Cost:
        A few passes over the weights, summed in float32 at least; one transfer of five numbers per leaf.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.array([1.0, 1.0])}
        >>> result = hj.summary(params)
        >>> print(result)
        Name    Shape  Weights  Nonzero  Zeros %     Std    Mean  Abs-mean
        bias    2            2        2     0.00  0.0000  1.0000    1.0000
        kernel  2×2          4        1    75.00  0.8660  0.5000    0.5000
        total                6        3    50.00  0.7454  0.6667    0.6667
        >>> result.total.sparsity
        0.5
    """
    _tree.check_floating(params)
    leaves = jax.tree.leaves(params)
    moments = jax.device_get([_moments(leaf) for leaf in leaves])
    named = zip(_tree.leaf_paths(params), leaves, moments, strict=True)
    rows = tuple(
        _row(path, jnp.shape(x), jnp.size(x), *(n.item() for n in numbers)) for path, x, numbers in named
    )
    return Summary(rows, _total(rows))


@jax.jit
def _moments(x: Array) -> tuple[Array, Array, Array, Array]:
    """Nonzeros, mean, mean of squared deviations, mean of absolute values."""
    wide = _tree.wide(x)
    mean = jnp.mean(wide)
    return jnp.sum(x != 0, dtype=jnp.int32), mean, jnp.mean((wide - mean) ** 2), jnp.mean(jnp.abs(wide))


def _row(
    path: str,
    shape: tuple[int, ...],
    number: int,
    nonzeros: int,
    mean: float,
    variance: float,
    abs_mean: float,
) -> SummaryRow:
    sparsity = 1 - nonzeros / number if number else 0.0
    return SummaryRow(path, shape, number, nonzeros, sparsity, variance**0.5, mean, abs_mean)


def _total(rows: tuple[SummaryRow, ...]) -> SummaryRow:
    full = [row for row in rows if row.number]
    number = sum(row.number for row in full)
    mean = sum(row.number * row.mean for row in full) / number
    # Deviations from the common mean: within each leaf, and of the leaf's own mean.
    variance = sum(row.number * (row.std**2 + (row.mean - mean) ** 2) for row in full) / number
    abs_mean = sum(row.number * row.abs_mean for row in full) / number
    return _row("total", (), number, sum(row.nonzeros for row in full), mean, variance, abs_mean)


def _cells(row: SummaryRow) -> tuple[str, ...]:
    counts = (f"{row.number:,}", f"{row.nonzeros:,}", f"{100 * row.sparsity:.2f}")
    numbers = (f"{x:.4f}" for x in (row.std, row.mean, row.abs_mean))
    return (row.path, "×".join(map(str, row.shape)), *counts, *numbers)
