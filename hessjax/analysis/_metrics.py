"""The numbers that a metric returns: checked, named, in one order."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hessjax._core._messages import is_number
from hessjax.analysis._sensitivity_csv import COLUMNS, SensitivityRow, refusal

_ENOUGH = 3
"""Rows of equal numbers that are no accident: small sets of examples have few accuracies."""


def named(value: Any) -> dict[str, float]:
    """The metric's values by name.

    Raises:
        TypeError: what is no real scalar.
        ValueError: two names that are the same as text.
    """
    values = dict(value) if isinstance(value, Mapping) else {"metric": value}
    for name, x in values.items():
        if not is_number(x):
            kind = f"{x.dtype}{list(np.shape(x))}" if hasattr(x, "dtype") else repr(x)
            raise TypeError(
                f"`metric` must return a scalar or a dict of scalars, real numbers, got {kind} for `{name}`."
            )
    if not values or len({str(name) for name in values}) < len(values):
        raise ValueError(f"`metric` must return values of different names, got {list(values)}.")
    return {str(name): float(x) for name, x in values.items()}


def in_order(
    metrics: dict[str, float], earlier: Sequence[SensitivityRow], file: Path | None
) -> dict[str, float]:
    """The metrics in the order of the rows before, which must have the same names."""
    if reserved := metrics.keys() & COLUMNS:
        raise ValueError(f"`metric` must not name a value `{min(reserved)}`: that is a column already.")
    before = list(earlier[0].metrics) if earlier else list(metrics)
    if metrics.keys() == set(before):
        return {name: metrics[name] for name in before}
    reason = f"the metrics are {', '.join(before) or 'none'}, and `metric` returned {', '.join(metrics)}"
    if file is not None:
        raise refusal(file, 1, reason)
    raise ValueError(f"`metric` must return the same names every time: before, {reason}.")


def check_numbers(numbers: dict[str, float], question: tuple[str, str], file: Path | None) -> None:
    """Refuses NaN; `question` is the leaf that was pruned, and to what level."""
    name = next((name for name, x in numbers.items() if math.isnan(x)), None)
    if name is None:
        return
    kept = "" if file is None else f" The rows before it are in `{file}`, to go on from."
    whose = "the prediction" if name == "predicted" else "`metric`"
    raise FloatingPointError(
        f"{whose} must return numbers, got NaN for `{name}` with `{question[0]}` pruned to sparsity "
        f"{question[1]}: leave that level or leaf out, or evaluate in a wider dtype.{kept}"
    )


def warn_of_one_number(rows: Sequence[SensitivityRow]) -> None:
    """A metric that looks at other params than those it is given measures the same ones every time."""
    pruned = [row for row in rows if row.sparsity]
    if len(pruned) < _ENOUGH or not pruned[0].metrics:
        return
    first = rows[0].metrics
    if all(row.metrics == first for row in rows):
        warnings.warn(
            f"`metric` returned the same for all {len(rows)} rows, "
            f"{', '.join(f'{name} {x:.6g}' for name, x in first.items())}: does it use the params that it is "
            "given?",
            stacklevel=3,
        )
