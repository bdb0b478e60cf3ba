"""What a check found: rows to compute with, a table to read."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table
from rich.text import Text

from hessjax import _tree
from hessjax._text import plain
from hessjax._typing import Params


class CheckRow(NamedTuple):
    """One property that was tested.

    Attributes:
        name: what should hold.
        passed: whether it does.
        measured: how far it is from holding; `check` says in which unit.
        limit: the most that may be; infinite for a note, which cannot fail.
        detail: what was seen, with the paths of the leaves at fault, and what may be the cause.
    """

    name: str
    passed: bool
    measured: float
    limit: float
    detail: str


class Check(NamedTuple):
    """What `check` returns: rows to compute with, and a table when printed.

    Attributes:
        rows: one for each property tested.
    """

    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def __rich__(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("Check", "Result", "Measured", "Limit"):
            table.add_column(
                title, justify="right" if title in ("Measured", "Limit") else "left", no_wrap=True
            )
        table.add_column("Detail")
        for row in self.rows:
            table.add_row(*_cells(row), style="" if row.passed else "bold red")
        return table

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:  # a notebook's last line shows the table
        return str(self)


def _cells(row: CheckRow) -> tuple[str | Text, ...]:
    note = math.isinf(row.limit)
    result = "FAILED" if not row.passed else "note" if note else "ok"
    return row.name, result, f"{row.measured:.3g}", "" if note else f"{row.limit:.3g}", Text(row.detail)


def named(params: Params, flags: Any) -> str:
    """The paths of the leaves that are flagged."""
    return ", ".join(path for path, flag in zip(_tree.leaf_paths(params), flags, strict=True) if flag)


def dtypes(params: Params) -> str:
    """The dtypes of the leaves, and whether there may be float64."""
    counts = Counter(str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params))
    shown = ", ".join(
        f"{dtype} ({number} {'leaf' if number == 1 else 'leaves'})" for dtype, number in counts.items()
    )
    return f"{shown}; x64 is {'on' if jnp.result_type(float) == jnp.float64 else 'off'}"
