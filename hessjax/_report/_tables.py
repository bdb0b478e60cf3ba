"""The tables of a report: eigenvalues, curvature by layer, accuracies."""

from collections.abc import Mapping
from dataclasses import replace

from hessjax._core import _results, _tree
from hessjax._core._results import Eigenpairs
from hessjax._core._tables import Column, Row, Table, number, percent, shape_text
from hessjax._core._types import Params
from hessjax._report._record import LayerRow, layer_row, layer_rows
from hessjax.estimators._trace import TraceByLeaf

HINT = "A terminal of {width} columns shows all, `report.json` holds all."


def eigenvalue_table(pairs: Eigenpairs) -> Table:
    """Eigenvalues with their residuals, largest first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax._report import eigenvalue_table
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(-1.0, 4.0, 50))
        >>> len(eigenvalue_table(hj.eigenpairs(A, jax.random.key(0), jnp.zeros(50), k=2)).rows)
        4
    """
    return replace(_results.eigenvalue_table(pairs, "Eigenvalues"), hint=HINT)


def layer_table(traces: TraceByLeaf, params: Params) -> Table:
    """The trace of every leaf's block with its standard error, its share and its mean per parameter.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax._report import layer_table
        >>> A = jax.tree_util.Partial(jnp.multiply, 2.0)
        >>> params = jnp.zeros(3)
        >>> len(layer_table(hj.trace_by_leaf(A, jax.random.key(0), params, num_probes=2), params).rows)
        2
    """
    total, size = traces.total, _tree.size(params)
    # Not the sum of the rows: the errors of the leaves go together, and the estimator knows how.
    whole = layer_row("total", (), size, total, float(total.mean))
    rows = (*(Row(_cells(row)) for row in layer_rows(traces, params)), Row(_cells(whole), "bold"))
    return Table(_LAYERS, rows, "Curvature by layer", hint=HINT)


_LAYERS = (
    Column("Layer", "name"),
    Column("Shape", "word", 5),
    Column("Params", rank=4),
    Column("Trace"),
    Column("± probes"),
    Column("± data", rank=3),
    Column("Share %", rank=1),
    Column("Mean λ", rank=2),
)


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        row.path,
        shape_text(row.shape),
        f"{row.parameters:,}",
        number(row.trace),
        number(row.stderr, 2),
        number(row.data_stderr, 2),
        f"{100 * row.share:.1f}",
        f"{row.per_parameter:.1e}",
    )


def accuracy_table(rows: Mapping[str, tuple[float, float]]) -> Table:
    """Sparsity against accuracy, one row for every network: `{name: (sparsity, accuracy)}`.

    Example:
        >>> from hessjax._report import accuracy_table
        >>> len(accuracy_table({"dense": (0.0, 0.98), "sparse": (0.9, 0.97)}).rows)
        2
    """
    heads = (Column("Network", "name"), Column("Zeros %"), Column("Test accuracy %"))
    found = [Row((name, percent(zeros), f"{100 * right:.2f}")) for name, (zeros, right) in rows.items()]
    return Table(heads, tuple(found), "Dense against sparse", hint=HINT)
