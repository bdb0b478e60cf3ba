"""A run as JSON, its folder and its rows."""

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hessjax._core import _files, _tree
from hessjax._core._results import Estimate
from hessjax._core._types import Params
from hessjax.estimators._trace import TraceByLeaf


def environment() -> dict[str, Any]:
    """What a number in a report depends on: versions, device, processor cores.

    Example:
        >>> from hessjax._report import environment
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
        >>> from hessjax._report import prepare
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
        >>> from hessjax._report import to_json
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
        >>> from hessjax._report import write_json
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "report.json"
        >>> write_json(path, {"a": (1, 2)})
        >>> path.read_text().split()
        ['{', '"a":', '[', '1,', '2', ']', '}']
    """
    text = json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False)
    _files.write_whole(Path(path), lambda file: file.write(f"{text}\n".encode()))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What Orbax raises in the block as one OSError: of a full disk it tells by errors of every kind."""
    try:
        yield
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        number, told = (errno.ENOSPC, full) if full in str(error) else (errno.EIO, str(error)[:200])
        raise OSError(number, told) from error


def read_json(path: Path) -> Any:
    """What was written; None if there is nothing that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def zero_share(rows: Iterable[Mapping[str, Any]]) -> float:
    """The fraction of zeros among the leaves that were pruned, of a record's `zeros`."""
    found = [row for row in rows if row["pruned"]]
    return sum(row["zeros"] for row in found) / max(sum(row["number"] for row in found), 1)


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
        >>> from hessjax._report import layer_rows
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> rows = layer_rows(hj.trace_by_leaf(A, jax.random.key(0), params, num_probes=2), params)
        >>> [(row.path, row.share, row.per_parameter) for row in rows]
        [('bias', 0.25, 2.0), ('kernel', 0.75, 3.0)]
    """
    total = float(traces.total.mean)
    named = zip(_tree.leaf_paths(params), jax.tree.leaves(params), strict=True)
    rows = [(path, np.shape(leaf), int(np.size(leaf))) for path, leaf in named]
    return tuple(layer_row(*row, traces.leaves[row[0]], total) for row in rows)


def layer_row(path: str, shape: tuple[int, ...], size: int, estimate: Estimate, total: float) -> LayerRow:
    """One leaf, or the whole."""
    trace = float(estimate.mean)
    share = trace / total if total else math.nan
    per_parameter = trace / size if size else math.nan
    data = None if estimate.data_stderr is None else float(estimate.data_stderr)
    return LayerRow(path, shape, size, trace, float(estimate.stderr), data, share, per_parameter)
