"""Results that people print: estimates and eigenpairs, as text with their uncertainty."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from hessjax._core import _tree
from hessjax._core._tables import Column, Row, Table, number, printable, shape_text
from hessjax._core._types import Block, Scalar, as_text

_MOST_DECIMALS = 6
_LARGE = 1e6
"""Beyond these, numbers are written with an exponent."""


def is_known(*values: Any) -> bool:
    """Whether all leaves are numbers that can be read here and now: not traced, donated or elsewhere."""
    return all(map(_is_known, jax.tree.leaves(values)))


def _is_known(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return leaf.is_fully_addressable and not leaf.is_deleted()
    return isinstance(leaf, np.ndarray | np.number | np.bool_ | float | int)


def is_single(value: Any) -> bool:
    """Whether it is one number: not several, as under `vmap`, and not none at all."""
    return value is not None and np.ndim(value) == 0


def by_shapes(result: Any) -> str:
    """A named tuple whose numbers are not known, or several at once under `vmap`."""
    fields = [f"{name}={as_text(x)}" for name, x in result._asdict().items()]
    return f"{type(result).__name__}({', '.join(fields)})"


def with_error(mean: Any, stderr: Any, data_stderr: Any = None) -> str:
    """`55.24 ± 0.41`: the error to two digits, the mean to as many decimals."""
    data = "" if data_stderr is None else f", ± {number(data_stderr, 2)} of the data"
    value, error = float(mean), float(stderr)
    decimals = max(1 - math.floor(math.log10(error)), 0) if 0 < error < math.inf else 99
    if decimals <= _MOST_DECIMALS and abs(value) < _LARGE and error < _LARGE:
        return f"{value:.{decimals}f} ± {error:.{decimals}f}{data}"
    return f"{value:.6g} ± {error:.2g}{data}"


def counted(count: Any, what: str) -> str:
    """`1 product`, `80 products`."""
    return f"{int(count):,} {what}{'' if int(count) == 1 else 's'}"


@printable
class Estimate(NamedTuple):
    """The mean of independent samples, with its uncertainty.

    Attributes:
        mean: the estimate, in the units of what was estimated: a number, or a tree like the params.
        stderr: its standard error; infinite where too few samples were taken to tell.
        num_samples: how many samples entered.
        data_stderr: where the matvec is a mean over batches of data: the standard error that comes from
            the data being a sample, whatever the number of probes. None where it is not known.
    """

    mean: PyTree[Float[Array, "..."]]
    stderr: PyTree[Float[Array, "..."]]
    num_samples: Int[Array, ""]
    data_stderr: Float[Array, "..."] | None = None

    def _table(self) -> Table | str:
        if not (is_known(self) and is_single(self.num_samples)):
            return by_shapes(self)
        if isinstance(self.mean, dict | list | tuple) or np.ndim(self.mean):
            return self._by_leaf()
        samples = counted(self.num_samples, "sample")
        return f"{with_error(self.mean, self.stderr, self.data_stderr)} ({samples})"

    def _by_leaf(self) -> Table:
        columns = (
            Column("Leaf", "name"),
            Column("Shape", "word", 3),
            Column("Mean"),
            Column("Least", rank=2),
            Column("Largest", rank=1),
            Column("± of an entry"),
        )
        leaves = zip(*map(jax.tree.leaves, jax.device_get((self.mean, self.stderr))), strict=True)
        named = zip(_tree.leaf_paths(self.mean), leaves, strict=True)
        rows = tuple(Row((path, *_entries(*pair))) for path, pair in named)
        return Table(columns, rows, notes=(f"{counted(self.num_samples, 'sample')}.",))


def _entries(mean: Any, stderr: Any) -> tuple[str, ...]:
    shape, x = shape_text(np.shape(mean)), np.asarray(mean, np.float64)
    if not x.size:
        return shape, "", "", "", ""
    # Scaled, so that its squares stay within range.
    error = np.asarray(stderr, np.float64)
    top = error.max()
    spread = top * np.sqrt(np.mean((error / top) ** 2)) if 0 < top < np.inf else top
    return shape, *(f"{y:.4g}" for y in (x.mean(), x.min(), x.max())), number(spread, 2)


@printable
class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric matrix, with their uncertainty.

    Attributes:
        values: (k,) eigenvalues, largest first, in loss per squared parameter; NaN where too few products
            were made to have one.
        vectors: the eigenvectors of norm 1, as a block: the params' structure, leading axis k.
        residuals: (k,) ‖Av − θv‖: some eigenvalue of A lies within this of each value.
        converged: (k,) whether the residual is within the tolerance asked for.
        num_matvecs: how many products it took, those for the residuals included.
        data_stderr: (k,) where the matvec is a mean over batches of data: the standard error of the values
            that comes from the data being a sample, to first order. None where it is not known.
        asymmetry: by how much the products contradicted each other, the largest |uᵀAv − vᵀAu| seen among
            vectors of norm 1: far above the rounding errors of the values, the matvec is not symmetric, and
            nothing here holds (`check` says where). None where it was not looked at.
    """

    values: Float[Array, " k"]
    vectors: Block
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    num_matvecs: Int[Array, ""]
    data_stderr: Float[Array, " k"] | None = None
    asymmetry: Scalar | None = None

    def _table(self) -> Table | str:
        shown = self._replace(vectors=None)
        if not is_known(shown) or np.ndim(self.values) != 1:
            return by_shapes(self)
        return eigenvalue_table(self, notes=(f"{counted(self.num_matvecs, 'product')}.",))


def eigenvalue_table(pairs: Eigenpairs, title: str = "", notes: tuple[str, ...] = ()) -> Table:
    """Eigenvalues with their residuals, largest first."""
    heads = [Column(""), Column("Eigenvalue"), Column("Residual"), Column("Converged", "word")]
    heads += [Column("± data", rank=1)] if pairs.data_stderr is not None else []
    data = [None] * len(pairs.values) if pairs.data_stderr is None else pairs.data_stderr
    columns = zip(pairs.values, pairs.residuals, pairs.converged, data, strict=True)
    found = enumerate(jax.device_get(list(columns)), 1)
    rows = tuple(_eigenvalue(rank, *entries) for rank, entries in found)
    return Table(tuple(heads), rows, title, (*notes, *_asymmetry(pairs)))


def _eigenvalue(rank: int, value: Any, residual: Any, converged: Any, of_data: Any) -> Row:
    cells = [str(rank), f"{value:.5g}", f"{residual:.1e}", "yes" if converged else "no"]
    cells += [] if of_data is None else [number(of_data, 2)]
    return Row(tuple(cells), "" if converged else "bold red")


def _asymmetry(pairs: Eigenpairs) -> tuple[str, ...]:
    # A thousandth of the largest value: float32 products of a symmetric matrix are far below it.
    if pairs.asymmetry is None or not pairs.asymmetry > 1e-3 * np.max(np.abs(pairs.values), initial=0):
        return ()
    return (f"The matvec is not symmetric (by {float(pairs.asymmetry):.1e}): see hj.check.",)
