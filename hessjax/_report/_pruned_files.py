"""What a pruning leaves in its folder: checkpoint, masks, sparse file, smaller network, tables, the page."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core import _files, _tree
from hessjax._core._tables import percent
from hessjax._report._folder import FolderError
from hessjax._report._html import Cell, Html, brief, chart, document, join, table, tag
from hessjax._report._plan import LEVELS
from hessjax._report._problem import Problem, first_batch
from hessjax._report._pruning import Before, Outcome, numbers
from hessjax._report._record import environment, prepare, write_json
from hessjax.analysis._sensitivity import sensitivity
from hessjax.analysis._summary import summary
from hessjax.compaction._compact import compact
from hessjax.compaction._sparse import save_npz

NAMES = ("report.json", "report.html", "masks.npz", "sparse.npz", "sensitivity.csv", "sensitivity.csv.json",
         "summary.txt", "checkpoint", "compacted")  # fmt: skip


def make_room(out: Path, force: bool) -> None:
    """A folder to write to.

    Raises:
        FolderError: it holds something, and no `force`.
        OSError: it cannot be written to.
    """
    prepare(out)
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if there and not force:
        raise FolderError(
            f"`out` must be an empty folder, but `{out}` holds {', '.join(there[:4])}: `--force` writes over "
            "what a pruning leaves, `--out` takes another folder."
        )


def write_all(problem: Problem, outcome: Outcome, dense: Before, out: Path, target: str) -> dict[str, Any]:
    """Everything; the network first, the page last.

    Returns:
        The record that `report.json` holds.
    """
    _save(out / "checkpoint", outcome.params)
    _files.write_whole(out / "masks.npz", lambda file: np.savez_compressed(file, **_masks(outcome)))
    with contextlib.suppress(ValueError):  # nothing sparse enough to be worth it
        save_npz(out / "sparse.npz", outcome.params)
    after = numbers(problem, outcome.params)
    rows = summary(outcome.params)
    _files.write_whole(out / "summary.txt", lambda file: file.write(f"{rows.to_text(120)}\n".encode()))
    if outcome.curvature:
        _sensitivity(problem, outcome, out / "sensitivity.csv")
    record = {
        "format": 1,
        "kind": "pruning",
        "environment": environment(),
        "problem": {
            "name": problem.name or target,
            "target": target,
            "parameters": _tree.size(problem.params),
        },
        "how": outcome.how,
        "before": {"loss": dense.loss, "metrics": dense.metrics},
        "after": {"loss": after.loss, "metrics": after.metrics},
        "predicted_rise": outcome.predicted,
        "trials": outcome.trials,
        "zeros": _zeros(outcome),
        "compacted": _compacted(problem, outcome, out),
        "files": sorted(path.name for path in out.iterdir() if path.name in NAMES),
    }
    write_json(out / "report.json", record)
    text = _page(record)
    _files.write_whole(out / "report.html", lambda file: file.write(text.encode()))
    return record


def _save(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp  # here, because it takes half a second to import

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def _masks(outcome: Outcome) -> Any:
    named = zip(_tree.leaf_paths(outcome.mask), jax.tree.leaves(outcome.mask), strict=True)
    return {path: np.asarray(mask) for path, mask in named if jnp.ndim(mask)}


def _zeros(outcome: Outcome) -> list[dict[str, Any]]:
    named = zip(_tree.leaf_paths(outcome.params), jax.tree.leaves(outcome.params), strict=True)
    return [{"path": path, "number": x.size, "zeros": int(jnp.sum(x == 0))} for path, x in named]


def _sensitivity(problem: Problem, outcome: Outcome, path: Path) -> None:
    leaves = [
        jnp.full_like(leaf, outcome.curvature.get(name, 0.0))
        for name, leaf in zip(_tree.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
    ]
    diagonal = jax.tree.unflatten(jax.tree.structure(problem.params), leaves)
    sensitivity(None, problem.params, LEVELS, diagonal=diagonal).to_csv(path)


def _compacted(problem: Problem, outcome: Outcome, out: Path) -> dict[str, Any] | None:
    """The smaller network, where whole channels went; what is smaller, or why it is not."""
    if problem.model_fn is None:
        return None
    try:
        small = compact(problem.model_fn, outcome.params, first_batch(problem))
    except (TypeError, ValueError) as error:
        return {"why_not": str(error)}
    changed = {path: [list(x) for x in pair] for path, pair in small.shapes.items() if pair[0] != pair[1]}
    if not changed:
        return {"why_not": "no whole channel went"}
    _save(out / "compacted", small.params)
    return {"shapes": changed, "parameters": _tree.size(small.params), "difference": float(small.difference)}


# -- the page --------------------------------------------------------------------------------------


def _page(record: Mapping[str, Any]) -> str:
    name, charts = record["problem"]["name"], dict[str, Any]()
    body = [
        tag("h1", f"{name}, pruned"),
        tag("p", f"{record['how']}.", class_="quiet"),
        _before_and_after(record),
        *_trials(record, charts),
        tag("h2", "Zeros by layer"),
        table(
            (Cell("Layer", "name"), "Weights", "Zeros", "Zeros %"),
            map(_row, record["zeros"]),
            "Zeros by layer",
        ),
        *_small(record),
        tag("p", f"Beside this page: {', '.join(record['files'])}.", class_="quiet small"),
    ]
    return document(f"{name}, pruned", body, charts)


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    share = row["zeros"] / row["number"] if row["number"] else 0.0
    return row["path"], f"{row['number']:,}", f"{row['zeros']:,}", percent(share)


def _before_and_after(record: Mapping[str, Any]) -> Html:
    before, after = record["before"], record["after"]
    rows = [
        ("loss", brief(before["loss"], 4), brief(after["loss"], 4), brief(after["loss"] - before["loss"], 2))
    ]
    rows += [
        (
            name,
            brief(value, 4),
            brief(after["metrics"].get(name), 4),
            brief(after["metrics"][name] - value, 2),
        )
        for name, value in before["metrics"].items()
        if name in after["metrics"]
    ]
    made = table((Cell("", "name"), "Before", "After", "Change"), rows, "Before and after")
    if record["predicted_rise"] is None:
        return made
    return join(
        [made, tag("p", f"The mean curvature predicted a rise of {brief(record['predicted_rise'], 2)}.")]
    )


def _trials(record: Mapping[str, Any], charts: dict[str, Any]) -> list[Html]:
    trials = sorted(record["trials"], key=lambda trial: trial["sparsity"])
    if not trials:
        return []
    series = [
        {"name": name, "points": [(trial["sparsity"], trial[key]) for trial in trials]}
        for name, key in (("measured", "rise"), ("predicted", "predicted"))
    ]
    charts["chart-trials"] = {"kind": "lines", "series": series, "x": {"label": "zeros", "percent": True},
                              "y": {"label": "rise of the loss"}}  # fmt: skip
    alt = f"Rise of the loss at {len(trials)} sparsities, measured and predicted."
    return [tag("h2", "What was tried"), chart("chart-trials", alt, None, alt)]


def _small(record: Mapping[str, Any]) -> list[Html]:
    small = record["compacted"]
    if small is None or "why_not" in small:
        return [] if small is None else [tag("p", f"No smaller network: {small['why_not']}.")]
    rows = [(path, str(before), str(after)) for path, (before, after) in small["shapes"].items()]
    said = f"{small['parameters']:,} parameters are left of {record['problem']['parameters']:,}; "
    said += f"the outputs differ by {brief(small['difference'], 2)}, relative."
    heads = (Cell("Layer", "name"), "Before", "After")
    return [tag("h2", "The smaller network"), tag("p", said), table(heads, rows, "Shapes")]
