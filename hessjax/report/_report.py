"""A run as JSON, and its tables."""

import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from hessjax._core import _tree
from hessjax._core._types import Eigenpairs, Estimate, Params
from hessjax.estimators._trace import TraceByLeaf


def environment() -> dict[str, Any]:
    """What a number in a report depends on: versions, device, processor cores.

    Example:
        >>> from hessjax.report import environment
        >>> sorted(environment())
        ['cores', 'device', 'platform', 'python', 'versions']
    """
    packages = ("hessjax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    device = jax.devices()[0]
    return {
        "versions": {name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prepare(out: Path) -> None:
    """Make the folder `out`, and try it by writing to it.

    Raises:
        OSError: if that fails.

    Example:
        >>> import pathlib, tempfile
        >>> from hessjax.report import prepare
        >>> out = pathlib.Path(tempfile.mkdtemp()) / "a" / "b"
        >>> prepare(out)
        >>> list(out.iterdir())
        []
    """
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def to_json(value: Any) -> Any:
    """`value` in JSON's own types: named tuples become objects, arrays lists, NaN and infinities strings.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax.report import to_json
        >>> to_json(hj.Estimate(jnp.float32(1.5), jnp.float32(jnp.inf), jnp.int32(1)))
        {'mean': 1.5, 'stderr': 'inf', 'num_samples': 1, 'data_stderr': None}
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value).tolist()
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    # JSON has no NaN: what Python would write, other readers refuse.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, record: Any) -> None:
    """Write `record` whole or not at all: into a temporary file beside `path`, then renamed.

    Args:
        path: where to.
        record: anything that `to_json` takes.

    Raises:
        OSError: if the folder cannot be written to.
        TypeError: if `record` holds what JSON cannot.

    Example:
        >>> import pathlib, tempfile
        >>> from hessjax.report import write_json
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.json"
        >>> write_json(path, {"a": (1, 2)})
        >>> path.read_text().split()
        ['{', '"a":', '[', '1,', '2', ']', '}']
    """
    text = json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False)
    # Beside `path`: only within one file system a rename is atomic.
    file = tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False)  # noqa: SIM115
    try:
        with file:
            file.write(text + "\n")
        # A temporary file is for its owner alone.
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise


class LayerRow(NamedTuple):
    """The curvature of one leaf of the params.

    Attributes:
        path: where the leaf is, `Conv_0/kernel`.
        shape: its shape.
        parameters: how many weights it has.
        trace: trace of its diagonal block, in loss per squared parameter.
        stderr: standard error of the trace from the probes.
        data_stderr: and from the data being a sample; None where it is not known.
        share: the trace over that of the whole Hessian.
        per_parameter: the trace over `parameters`: the mean eigenvalue of the block.
    """

    path: str
    shape: tuple[int, ...]
    parameters: int
    trace: float
    stderr: float
    data_stderr: float | None
    share: float
    per_parameter: float


def layer_rows(traces: TraceByLeaf, params: Params) -> tuple[LayerRow, ...]:
    """One row for every leaf, in the order of the tree.

    Args:
        traces: from `hessjax.trace_by_leaf`.
        params: the params it was taken at.

    Returns:
        The rows.

    Cost:
        Reads two numbers of every leaf.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax.report import layer_rows
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> rows = layer_rows(hj.trace_by_leaf(A, jax.random.key(0), params, num_probes=2), params)
        >>> [(row.path, row.share, row.per_parameter) for row in rows]
        [('bias', 0.25, 2.0), ('kernel', 0.75, 3.0)]
    """
    total = float(traces.total.mean)
    named = zip(_tree.leaf_paths(params), jax.tree.leaves(params), strict=True)
    rows = [(path, np.shape(leaf), int(np.size(leaf))) for path, leaf in named]
    return tuple(_layer_row(*row, traces.leaves[row[0]], total) for row in rows)


def _layer_row(path: str, shape: tuple[int, ...], size: int, estimate: Estimate, total: float) -> LayerRow:
    trace = float(estimate.mean)
    share = trace / total if total else math.nan
    per_parameter = trace / size if size else math.nan
    data = None if estimate.data_stderr is None else float(estimate.data_stderr)
    return LayerRow(path, shape, size, trace, float(estimate.stderr), data, share, per_parameter)


# -- tables --------------------------------------------------------------------------------------


def eigenvalue_table(pairs: Eigenpairs) -> Table:
    """Eigenvalues with their residuals, largest first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax.report import eigenvalue_table
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(-1.0, 4.0, 50))
        >>> eigenvalue_table(hj.eigenpairs(A, jax.random.key(0), jnp.zeros(50), k=2)).row_count
        4
    """
    table = _table("Eigenvalues", "", "Eigenvalue", "Residual", "Converged", "± data")
    data = [None] * len(pairs.values) if pairs.data_stderr is None else pairs.data_stderr
    columns = zip(pairs.values, pairs.residuals, pairs.converged, data, strict=True)
    for rank, (value, residual, converged, of_data) in enumerate(jax.device_get(list(columns)), 1):
        verdict = "yes" if converged else "[bold red]no"
        table.add_row(f"{rank}", f"{value:.5g}", f"{residual:.1e}", verdict, _stderr(of_data))
    # A thousandth of the largest value: float32 products of a symmetric matrix are far below it.
    if pairs.asymmetry is not None and pairs.asymmetry > 1e-3 * np.max(np.abs(pairs.values), initial=0):
        table.caption = (
            f"[bold red]The matvec is not symmetric (by {float(pairs.asymmetry):.1e}): see hj.check."
        )
    return table


def _stderr(stderr: SupportsFloat | None) -> str:
    """The sampling error of the data, where it is known."""
    return "" if stderr is None else f"{float(stderr):.2g}"


def layer_table(traces: TraceByLeaf, params: Params) -> Table:
    """The trace of every leaf's block with its standard error, its share and its mean per parameter.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> from hessjax.report import layer_table
        >>> A = jax.tree_util.Partial(jnp.multiply, 2.0)
        >>> params = jnp.zeros(3)
        >>> layer_table(hj.trace_by_leaf(A, jax.random.key(0), params, num_probes=2), params).row_count
        2
    """
    headers = ("Layer", "Shape", "Params", "Trace", "± probes", "± data", "Share %", "Mean λ")
    table = _table("Curvature by layer", *headers)
    total, size = traces.total, _tree.size(params)
    for row in layer_rows(traces, params):
        table.add_row(*_cells(row))
    table.add_section()
    # Not the sum of the rows: the errors of the leaves go together, and the estimator knows how.
    whole = _layer_row("total", (), size, total, float(total.mean))
    table.add_row(*_cells(whole), style="bold")
    return table


def _cells(row: LayerRow) -> tuple[str | Text, ...]:
    return (
        Text(row.path),
        "×".join(map(str, row.shape)),
        f"{row.parameters:,}",
        f"{row.trace:.3g}",
        f"{row.stderr:.2g}",
        _stderr(row.data_stderr),
        f"{100 * row.share:.1f}",
        f"{row.per_parameter:.1e}",
    )


def accuracy_table(rows: Mapping[str, tuple[float, float]]) -> Table:
    """Sparsity against accuracy, one row for every network: `{name: (sparsity, accuracy)}`.

    Example:
        >>> from hessjax.report import accuracy_table
        >>> accuracy_table({"dense": (0.0, 0.98), "sparse": (0.9, 0.97)}).row_count
        2
    """
    table = _table("Dense against sparse", "Network", "Zeros %", "Test accuracy %")
    for name, (sparsity, accuracy) in rows.items():
        table.add_row(Text(name), f"{100 * sparsity:.2f}", f"{100 * accuracy:.2f}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        box=None, title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False
    )
    for column in columns:
        words = column in ("Layer", "Shape", "Network")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table
