"""How much each leaf can be pruned: one at a time, at one sparsity at a time, measured and predicted."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from hessjax._core import _files, _tree
from hessjax._core._layout import kernels
from hessjax._core._messages import check_functions, checked_flag, checked_number, shown
from hessjax._core._tables import Column, Row, Table, printable
from hessjax._core._types import Block, Params, Where
from hessjax._core._words import AxisWords
from hessjax._run import _drivers
from hessjax._run._arguments import check_callbacks
from hessjax.analysis import _metrics, _sensitivity_csv, _sensitivity_file
from hessjax.analysis._sensitivity_csv import SensitivityRow, level_name
from hessjax.analysis._sensitivity_parts import Network, parts_of, pruned, record_of
from hessjax.pruning._ranking import check_sparsity
from hessjax.pruning.patterns._pattern import Patterns, unstructured
from hessjax.pruning.saliencies._first_order import magnitude
from hessjax.pruning.saliencies._saliency import Saliency, checked_saliency

_Question: TypeAlias = tuple[str, str]
"""A leaf or what goes together, by name, and a level as the file has it."""


@printable
class Sensitivity(NamedTuple):
    """What `sensitivity` returns: rows to compute with, and a table when printed.

    Attributes:
        rows: leaf by leaf, and for each the levels in the order given.
    """

    rows: tuple[SensitivityRow, ...]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `parameter,sparsity,<metrics>`, and `predicted` if there is a prediction.

        A file that is there is replaced in one go, once the new one is on disk. Names that a spreadsheet
        would compute (`=a`, `-b`) have a `'` before them.
        """
        _sensitivity_csv.write(_files.local_path("path", path), self.rows)

    def to_text(self, width: int | None = None) -> str:
        """The table, at most `width` columns wide; by default as wide as the terminal, 80 without one."""
        return self._table().to_text(width)

    def _table(self) -> Table:
        has_model = any(row.predicted is not None for row in self.rows)
        metrics = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        heads = [Column("parameter", "name"), Column("sparsity")]
        heads += [Column(name, rank=2 * rank) for rank, name in enumerate(metrics)]  # the last ones go first
        heads += [Column("predicted rise", rank=1)] if has_model else []
        rows, last = [], ""
        for row in self.rows:
            numbers = [row.metrics.get(name) for name in metrics] + [row.predicted] * has_model
            name, last = "" if row.parameter == last else row.parameter, row.parameter
            rows.append(Row((name, level_name(row.sparsity), *map(_cell, numbers))))
        return Table(tuple(heads), tuple(rows), hint="`.to_text({width})` and `.to_csv` have them.")


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def sensitivity(
    metric: Callable[[Params], Any] | None,
    params: Params,
    levels: Iterable[float | int],
    saliency: Saliency = magnitude(),  # noqa: B008 (a value, never changed)
    *,
    grads_fn: Callable[[Params], Block] | None = None,
    diagonal: Params | None = None,
    pattern: Patterns = unstructured(),  # noqa: B008 (a value, never changed)
    where: Where = kernels,
    axes: AxisWords | None = None,
    by_layer: bool = False,
    path: str | os.PathLike[str] | None = None,
    callbacks: Sequence[_drivers.Callback] = (),
) -> Sensitivity:
    """Prune one leaf at a time to every level, the others left as they are, and see what it does to a metric.

    Leaves that a pattern ties to each other, as `heads` does those of an attention, are pruned together.

    Beside the measured metric stands what a quadratic model of the loss predicts, which takes no evaluation:
    the increase that the saliency itself expects (`obs`, `wood_taylor`, `obd`), or with `diagonal` h

        ½ Σᵢ hᵢ δᵢ²,

    δ being the change of the weights: −w where they are pruned. Both hold for small changes: where much goes
    at once, the loss of a network can rise by far more.

    Args:
        metric: `(params) -> scalar`, or a dict of scalars by name, over a whole data set as you like; called
            for every leaf and level, once for all leaves at level 0. None: only predict.
        params: pytree of real floating-point arrays, trained.
        levels: sparsities in [0, 1), each the fraction of zeros in one leaf, or in the leaves that are tied.
        saliency: what a weight is worth. One that moves the kept weights does so within the leaf.
        grads_fn: `(params) -> block` of gradients, as for `prune_once`; called once.
        diagonal: like `params`: the diagonal of the Hessian in loss per squared parameter,
            `hj.diagonal(matvec, key, params, ...).mean`. It takes precedence over the saliency's own
            prediction.
        pattern: which weights go together, as in `prune`: `filters()` for whole filters, `heads()` for those
            of whole attentions, whose rows are called by what the paths of their leaves have in common,
            `blocks/0/attn`.
        where: which leaves, as in `prune`: by default all kernels; empty ones are left out.
        axes: as in `prune`. Every layer that a leaf stacks is pruned to the level, as if it stood alone.
        by_layer: rows for every layer that a leaf stacks, `blocks/Dense_0/kernel[0]`, ..., of which one at a
            time is pruned, in place of all of them at once.
        path: a CSV file to which every row is added as soon as it is measured. Rows that are in it already
            are not measured again; of a line that a kill cut off, nothing is kept. Beside it, `<path>.json`
            records the params, the saliency, the diagonal and the patterns, and a table of others is
            refused. It does not know what `metric` and `grads_fn` compute: take one file for one question.
        callbacks: told of the evaluations as `run` tells them of products:
            `hj.progress_bar("sensitivity", unit="evaluations")`.

    Returns:
        The rows `(parameter, sparsity, metrics, predicted)`, with the metrics in their own units and the
        prediction in those of the loss; a scalar metric is called `metric`. `print` shows a table, `to_csv`
        writes a file that Distiller's users know, `hessjax.plot.sensitivity` draws it.

    Raises:
        ValueError: a level outside [0, 1) or twice; no metric and nothing to predict from; a metric whose
            names change, or are names of other columns; if `where` matches no leaf, or only empty
            ones, or ones that stay whole; with `by_layer`, for a saliency that compensates, as `obs` does; if
            `path` holds something else (it names the line), or a table of other params.
        BlockingIOError: if another process adds to `path`.
        TypeError: a metric that is not a scalar.
        FloatingPointError: if a metric or a prediction is NaN: it names leaf and level. Rows before it stay
            in the file.

    Cost:
        For every leaf and level one evaluation of the metric, one scoring of the leaf and a ranking. With
        `by_layer`, for every layer and level.

    References:
        Li et al., Pruning filters for efficient convnets (2016), arXiv 1608.08710: sensitivity by layer.
        LeCun et al., Optimal brain damage (1990): the diagonal model.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"one": jnp.array([[3.0, 1.0]]), "two": jnp.array([[2.0, 4.0]])}
        >>> hessian = {"one": jnp.array([[1.0, 1.0]]), "two": jnp.array([[1.0, 1.0]])}
        >>> def loss_fn(p):
        ...     return {"loss": sum(jnp.sum((p[k] - params[k]) ** 2) / 2 for k in p)}
        >>> hj.sensitivity(loss_fn, params, [0.0, 0.5], diagonal=hessian)
        parameter  sparsity  loss  predicted rise
        one               0     0               0
                        0.5   0.5             0.5
        two               0     0               0
                        0.5     2               2
    """
    _tree.check_leaves(params)
    checked_saliency("saliency", saliency)
    check_functions(metric=metric, grads_fn=grads_fn)
    check_callbacks(callbacks)
    _check_by_layer(by_layer, saliency)
    parts, chosen = parts_of(params, where, pattern, axes, by_layer), _checked_levels(levels)
    has_model = diagonal is not None or saliency.compensates
    _check_question(metric, params, diagonal, has_model)
    network = Network(params, saliency, parts, axes, None, diagonal, has_model)
    questions = [(name, level_name(level)) for name in parts for level in chosen]
    with contextlib.ExitStack() as stack:
        file, rows = None, []
        if path is not None:
            file = _files.local_path("path", path)
            record, names = record_of(network), _tree.leaf_paths(params)
            rows = stack.enter_context(_sensitivity_file.opened(file, record, names, has_model))
        known = {(row.parameter, level_name(row.sparsity)): row for row in rows}
        # Gradients are what is expensive: none are taken when the file has all the answers.
        if grads_fn is not None and not known.keys() >= set(questions):
            network = network._replace(grads=grads_fn(params))
        stack.enter_context(_drivers.entered(callbacks))
        for number, question in enumerate(questions, start=1):
            if question not in known:
                known[question] = _answer(metric, network, question, list(known.values()), file)
            _tell(callbacks, number, len(questions))
    result = Sensitivity(tuple(known[question] for question in questions))
    _metrics.warn_of_one_number(result.rows)
    return result


def _answer(
    metric: Callable[[Params], Any] | None,
    network: Network,
    question: _Question,
    earlier: Sequence[SensitivityRow],
    file: Path | None,
) -> SensitivityRow:
    params, predicted = pruned(network, network.parts[question[0]], float(question[1]))
    metrics: dict[str, float] = {}
    if metric is not None:
        # The network at level 0 is the same whichever leaf is asked about: evaluated once.
        dense = [row.metrics for row in earlier if row.sparsity == 0 == float(question[1])]
        metrics = dense[0] if dense else _metrics.named(metric(params))
        metrics = _metrics.in_order(metrics, earlier, file)
    numbers = metrics if predicted is None else metrics | {"predicted": predicted}
    _metrics.check_numbers(numbers, question, file)
    row = SensitivityRow(question[0], float(question[1]), metrics, predicted)
    # Written at once: an evaluation may take minutes, and a killed run goes on from here.
    if file is not None:
        _sensitivity_file.append(file, row)
    return row


def _tell(callbacks: Sequence[_drivers.Callback], number: int, total: int) -> None:
    for callback in callbacks:
        callback(_drivers.Progress(number, total, math.inf, -math.inf, None, number == total))


# -- checks --------------------------------------------------------------------------------------


def _check_by_layer(by_layer: bool, saliency: Saliency) -> None:
    if checked_flag("by_layer", by_layer) and saliency.compensates:
        raise ValueError(
            "`by_layer=True` must go with a saliency that moves no weights and predicts nothing, such as "
            f"`magnitude()`, got {saliency}, which sees a leaf as a whole: predict by a `diagonal`."
        )


def _check_question(metric: Any, params: Params, diagonal: Params | None, has_model: bool) -> None:
    if metric is None and not has_model:
        raise ValueError(
            "`metric` must be given, or something to predict from: a `diagonal`, or a saliency like `obd()`."
        )
    if diagonal is not None:
        _tree.check_like(diagonal, params, "diagonal", "params")


def _checked_levels(levels: Iterable[float | int]) -> list[float]:
    if isinstance(levels, (str, Mapping)) or not isinstance(levels, Iterable):
        raise TypeError(f"`levels` must be a sequence of sparsities, got {shown(levels)}.")
    listed = [float(checked_number("levels", level)) for level in levels]
    names = [level_name(level) for level in listed]  # 0.3 and 0.1 + 0.2 are one level, in the file too
    if not listed or len(set(names)) < len(names):
        raise ValueError(f"`levels` must be one or more different sparsities, got [{', '.join(names)}].")
    for level in listed:
        check_sparsity(level, argument="levels")
    if "1" in names:
        raise ValueError("`levels` must be below 1 in their first six digits, by which they are told apart.")
    return listed
