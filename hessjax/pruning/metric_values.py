"""What a metric returned: numbers by name, in the order of the rows before, none of them NaN."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hessjax.pruning import sensitivity_csv
from hessjax.pruning.sensitivity_csv import SensitivityRow


def named(value: Any) -> dict[str, float]:
    """The metric's values by name."""
    values = dict(value) if isinstance(value, Mapping) else {"metric": value}
    for name, x in values.items():
        if jnp.ndim(x) or not jnp.issubdtype(jnp.result_type(x), jnp.number):
            raise TypeError(
                f"`metric` must return a scalar or a dict of scalars, got {jnp.result_type(x)}"
                f"{list(jnp.shape(x))} for `{name}`."
            )
    return {str(name): float(x) for name, x in values.items()}


def in_order(
    metrics: dict[str, float], earlier: Sequence[SensitivityRow], file: Path | None
) -> dict[str, float]:
    """The metrics in the order of the rows before, which must have the same names."""
    if reserved := metrics.keys() & sensitivity_csv.COLUMNS:
        raise ValueError(f"`metric` must not name a value `{min(reserved)}`: that is a column already.")
    before = list(earlier[0].metrics) if earlier else list(metrics)
    if metrics.keys() == set(before):
        return {name: metrics[name] for name in before}
    reason = f"the metrics are {', '.join(before) or 'none'}, and `metric` returned {', '.join(metrics)}"
    if file is not None:
        raise sensitivity_csv.refusal(file, 1, reason)
    raise ValueError(f"`metric` must return the same names every time: before, {reason}.")


def check_numbers(metrics: dict[str, float], question: tuple[str, str], file: Path | None) -> None:
    """Refuses NaN; `question` is the leaf that was pruned, and to what level."""
    name = next((name for name, x in metrics.items() if math.isnan(x)), None)
    if name is None:
        return
    kept = "" if file is None else f" The rows before it are in `{file}`, to go on from."
    raise FloatingPointError(
        f"`metric` must return numbers, got NaN for `{name}` with `{question[0]}` pruned to sparsity "
        f"{question[1]}: leave that level or leaf out, or evaluate in a wider dtype.{kept}"
    )
