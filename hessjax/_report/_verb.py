"""`hj.report`: the report of a problem, from Python, shown inline by a notebook."""

import html
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessjax._core import _files
from hessjax._core._messages import check_flags
from hessjax._report._engine import Order, Watcher, analyze
from hessjax._report._folder import PAGE
from hessjax._report._plan import Asked
from hessjax._report._problem import Problem
from hessjax._report._words import lines


class Report:
    """What `report` returns: a record to compute with, text when printed, the page in a notebook.

    Attributes:
        record: what `report.json` holds: `record["stages"]["trace"]["result"]["total"]["mean"]`, ...
        html: the page, whole: `Path("report.html").write_text(report.html)`.
        folder: where the report is kept, as text; empty if it was given no folder.
    """

    def __init__(self, record: Mapping[str, Any], page: str, folder: str = "") -> None:
        self.record, self.html, self.folder = record, page, folder

    def __repr__(self) -> str:
        return "\n".join(lines(self.record))

    def _repr_html_(self) -> str:
        # A frame of its own: the page's style and scripts are kept apart from the notebook's.
        style = "width:100%;height:44rem;border:1px solid #8888;border-radius:6px"
        page = html.escape(self.html, quote=True)
        return f'<iframe title="curvature report" style="{style}" srcdoc="{page}"></iframe>'


def report(
    problem: Problem,
    out: str | os.PathLike[str] | None = None,
    *,
    top: int = 5,
    density: bool = True,
    per_layer: bool = False,
    landscape: bool = False,
    layers: bool = False,
    budget: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    anyway: bool = False,
) -> Report:
    """The whole curvature report of a network: what `hessjax analyze` writes, from Python.

    First a self-test, then the quantities in the order of their cost: loss and gradient, trace by layer, what
    could be pruned, eigenvalues, and what is asked for beside. Each is on disk in `out` as soon as it is
    there, and runs are saved every few seconds: after a kill the same call with `resume=True` goes on.

    Args:
        problem: loss, params, data: an `hj.Problem`.
        out: a folder, made if it is not there, for `report.html`, `report.json` and pictures. None: kept
            nowhere but in what is returned.
        top: eigenpairs from each end of the spectrum.
        density: the spectral density.
        per_layer: the spectrum of the block of every leaf.
        landscape: the loss across the plane of the two steepest directions.
        layers: what each leaf takes part in; with `model_fn` and `likelihood`, how good K-FAC is.
        budget: the most products for all of it. All parts shrink alike; those for which too few are left are
            left out, which the report says.
        minutes: the most time, likewise, by the time that a product takes.
        seed: of all random vectors.
        resume: go on with the report in `out`.
        force: replace it. Other files in the folder stay.
        anyway: go on although the self-test failed, where the loss is finite.

    Returns:
        A `Report`: `.record` holds the numbers in the units that the page names, `print` shows the answers,
        a notebook the page.

    Raises:
        ValueError: a field of `problem` is not what it must be (it names the field); the folder holds
            something, and neither `resume` nor `force` says what is to be done; it is another problem's; the
            self-test failed.
        BlockingIOError: another process works in the folder.
        OSError: it cannot be written to.

    Cost:
        About 430 products over all data with the density, or `budget`; memory as `eigenpairs`.

    Example:
        >>> import jax.numpy as jnp
        >>> import hessjax as hj
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["w"]) ** 2)
        >>> data = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
        >>> problem = hj.Problem(loss_fn, {"w": jnp.ones(3)}, [data[:2], data[2:]])
        >>> found = hj.report(problem, density=False)  # doctest: +SKIP
        >>> found.record["stages"]["eigenpairs"]["result"]["values"][0]  # doctest: +SKIP
        18.2
    """
    check_flags(resume=resume, force=force, anyway=anyway)
    asked = Asked(top, density, per_layer, landscape, layers, budget, minutes, seed)
    order = Order(resume, force, anyway)
    if out is not None:
        return _made(problem, _files.local_path("out", out), asked, order, str(out))
    with tempfile.TemporaryDirectory() as folder:
        return _made(problem, Path(folder), asked, order, "")


def _made(problem: Problem, path: Path, asked: Asked, order: Order, folder: str) -> Report:
    record = analyze(problem, path, asked, order, Watcher())
    return Report(record, (path / PAGE).read_text(encoding="utf-8"), folder)
