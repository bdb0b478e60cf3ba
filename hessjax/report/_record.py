"""What is kept of a run: what its numbers depend on, and strict JSON, written whole or not at all."""

import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


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
    file = tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False)  # noqa: SIM115
    try:
        with file:
            file.write(text + "\n")
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)
    except OSError:
        Path(file.name).unlink(missing_ok=True)
        raise
