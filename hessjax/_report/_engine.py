"""The engine: the stages of a report one after the other, each kept as soon as it is there."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hessjax._core import _files, _tree
from hessjax._report._folder import Folder, opened
from hessjax._report._page import page
from hessjax._report._plan import Asked, Plan, checked_asked, planned, stage_names
from hessjax._report._problem import Problem, checked_problem, fingerprint
from hessjax._report._reading import reading
from hessjax._report._record import environment, to_json
from hessjax._report._stages import done
from hessjax._report._work import Work, seconds_per_product, timed


class Watcher:
    """Hears how a report gets on; does nothing of it."""

    def planned(self, products: Mapping[str, int]) -> None:
        """The stages that are to come, and how many products each may make."""

    def begun(self, stage: str) -> None:
        """A stage begins."""

    def made(self, stage: str, products: int, total: int) -> None:
        """A stage has made so many products."""

    def ended(self, stage: str, entry: Mapping[str, Any]) -> None:
        """A stage is done, and on disk."""


class CheckFailedError(ValueError):
    """The self-test failed, and nothing was measured after it."""


class Order(NamedTuple):
    """What to do about what is in the way.

    Attributes:
        resume: go on with the report in the folder.
        force: replace it.
        anyway: measure although the self-test failed.
    """

    resume: bool = False
    force: bool = False
    anyway: bool = False


def analyze(
    problem: Problem, out: Path, asked: Asked, order: Order, watcher: Watcher, target: str = ""
) -> dict[str, Any]:
    """Make a report in a folder, or go on with it.

    Args:
        problem: whose.
        out: the folder.
        asked: what is wanted.
        order: what to do about what is in the way.
        watcher: hears how it gets on.
        target: where the problem came from, `module:problem`.

    Returns:
        The record that `report.json` holds.

    Raises:
        ProblemError, FolderError, OSError, ValueError: before any work.
        CheckFailedError: the self-test failed; what it found is on disk.
    """
    problem, asked = checked_problem(problem), checked_asked(asked)
    out = _files.local_path("out", out)
    head = {"kind": "analysis", "environment": environment(), "problem": described(problem, target)}
    with opened(out, head, fingerprint(problem), resume=order.resume, force=order.force) as folder:
        folder.record["asked"] = asked._asdict()
        work = Work(problem, asked, folder.state, watcher.made)
        work.results = {name: entry["result"] for name, entry in folder.stages.items() if "result" in entry}
        work.steepest = folder.kept_vectors(problem.params)
        _all_stages(folder, work, order, watcher)
        folder.record["complete"] = True
        _write(folder)
        return folder.record


def described(problem: Problem, target: str) -> dict[str, Any]:
    """A problem in a record: its name, and the shapes of its params."""
    named = zip(_tree.leaf_paths(problem.params), jax.tree.leaves(problem.params), strict=True)
    shapes = {path: list(jax.numpy.shape(leaf)) for path, leaf in named}
    name = problem.name or target or "network"
    return {"name": name, "target": target, "parameters": _tree.size(problem.params), "shapes": shapes}


def _all_stages(folder: Folder, work: Work, order: Order, watcher: Watcher) -> None:
    started = time.monotonic()
    for name in stage_names(work.asked):
        if name == "trace":
            _make_plan(folder, work, watcher, time.monotonic() - started)
        if not _is_done(folder, work, name):
            _one_stage(folder, work, watcher, name)
        if name == "check":
            _judge(folder, order)


def _judge(folder: Folder, order: Order) -> None:
    if folder.stages["check"]["result"]["passed"] or order.anyway:
        return
    rows = folder.stages["check"]["result"]["rows"]
    failed = "\n".join(f"  {row['name']}: {row['detail']}" for row in rows if not row["passed"])
    _write(folder)
    raise CheckFailedError(
        f"the self-test failed, so what would be measured could not be believed:\n{failed}\n"
        "`--anyway` measures all the same, where the loss is finite."
    )


def _make_plan(folder: Folder, work: Work, watcher: Watcher, spent: float) -> None:
    """How many products there are for each stage; kept, so that a resumed report goes on by it."""
    limits = {"budget": work.asked.budget, "minutes": work.asked.minutes, "stages": stage_names(work.asked)}
    earlier = folder.record.get("plan")
    if earlier is None or earlier["limits"] != to_json(limits):
        shape = _tree.size(work.problem.params), len(jax.tree.leaves(work.problem.params))
        products = planned(work.asked, *shape, _budget(work, spent)).products
        # What is done already stays, however the budget is divided now.
        products |= {
            k: x["settings"]["products"] for k, x in folder.stages.items() if k in products and "result" in x
        }
        earlier = {"limits": limits, "products": products}
        folder.record["plan"] = earlier
        folder.save()
    work.plan = Plan(dict(earlier["products"]))
    left = {name: count for name, count in work.plan.products.items() if not _is_done(folder, work, name)}
    watcher.planned(left)


def _budget(work: Work, spent: float) -> float | None:
    """Products, those of the self-test and the first gradient being made already."""
    if work.asked.minutes is None:
        return None if work.asked.budget is None else float(max(work.asked.budget - 26, 0))
    left = 60 * work.asked.minutes - spent
    # A tenth for figures, compilation and what does not come in products.
    return max(0.9 * left, 0.0) / max(seconds_per_product(work), 1e-6)


def _settings(work: Work, name: str) -> dict[str, Any]:
    """What the result of a stage depends on, beside the problem."""
    found: dict[str, Any] = {"seed": work.asked.seed, "products": work.plan.products.get(name)}
    return found | ({"top": work.asked.top} if name == "eigenpairs" else {})


def _is_done(folder: Folder, work: Work, name: str) -> bool:
    entry = folder.stages.get(name)
    if entry is None:
        return False
    if name in ("check", "loss"):  # before the plan
        return True
    return entry["settings"] == to_json(_settings(work, name))


def _one_stage(folder: Folder, work: Work, watcher: Watcher, name: str) -> None:
    if work.plan.left_out(name):
        entry: dict[str, Any] = {
            "settings": _settings(work, name),
            "skipped": "the budget is too small for it",
        }
    elif name == "landscape" and not _has_directions(folder, work):
        entry = {"settings": _settings(work, name), "skipped": "there are no eigenvectors"}
    else:
        watcher.begun(name)
        entry = _worked(folder, work, name)
    folder.add_stage(name, to_json(entry))
    _write(folder)
    watcher.ended(name, folder.stages[name])


def _has_directions(folder: Folder, work: Work) -> bool:
    if work.steepest is None and "eigenpairs" in work.results:  # the file went: make them again
        work.steepest = _remade(work)
    return work.steepest is not None and all(
        bool(jax.numpy.all(jax.numpy.isfinite(leaf))) for leaf in jax.tree.leaves(work.steepest)
    )


def _remade(work: Work) -> Any:
    done("eigenpairs", work)
    return work.steepest


def _worked(folder: Folder, work: Work, name: str) -> dict[str, Any]:
    """Do a stage, and draw its figures."""
    from hessjax._report._figures import figures  # matplotlib is optional

    with timed() as seconds:
        found = done(name, work)
        work.results[name] = found.result
        if name == "eigenpairs" and work.steepest is not None:
            folder.keep_vectors(work.steepest)
        took = seconds()
    pictures = figures(name, found, work)
    for file, picture in pictures.items():
        folder.add_figure(file, picture)
    return {
        "settings": _settings(work, name),
        "result": found.result,
        "products": found.products,
        "seconds": took if math.isfinite(took) else 0.0,
        "figures": list(pictures),
    }


def add_pruned(out: Path, record: dict[str, Any], pruned: dict[str, Any], place: str) -> dict[str, Any]:
    """A report with the before and after of a pruning in it, on its page too.

    Args:
        out: the folder of the report.
        record: of the report.
        pruned: the record of the pruning.
        place: its folder within `out`.

    Returns:
        The record of the report.
    """
    folder = Folder(out, {**record, "pruned": {"folder": place, "stages": pruned["stages"]}})
    _write(folder)
    return folder.record


def _write(folder: Folder) -> None:
    """The reading and the page, which follow from the record."""
    folder.record["reading"] = [line._asdict() for line in reading(folder.record)]
    folder.save()
    folder.write_page(page(folder.record, folder.path))
