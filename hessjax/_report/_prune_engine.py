"""The engine of `hessjax prune`: stages one after the other, each kept as soon as it is there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hessjax._core import _files
from hessjax._core._messages import checked_count, checked_number
from hessjax._report import _pruning, _training
from hessjax._report._engine import Watcher, described
from hessjax._report._folder import Folder, opened
from hessjax._report._page import pruned_page
from hessjax._report._plan import FORWARD, Asked
from hessjax._report._problem import Problem, checked_problem, fingerprint
from hessjax._report._pruned_files import write_all
from hessjax._report._pruning import Curvature, Pruned, Trial
from hessjax._report._record import environment, read_json, to_json, write_json
from hessjax._report._stages import Done
from hessjax._report._training import Plan
from hessjax._report._work import Work, timed
from hessjax.pruning._ranking import check_sparsity

TRAINING, TRIALS = "training", "trials.json"


class Wish(NamedTuple):
    """How a network is to be pruned: one of the first three.

    Attributes:
        recipe: a YAML file to train under.
        sparsity: zeros at once.
        rise: as many as this rise of the loss allows.
        steps: updates under the recipe.
        seed: of the probes of the curvature.
    """

    recipe: Path | None = None
    sparsity: float | None = None
    rise: float | None = None
    steps: int | None = None
    seed: int = 0


def checked_wish(wish: Wish) -> Wish:
    """The same, being one that can be met.

    Raises:
        ValueError: naming the option.
    """
    names = ("--recipe", "--sparsity", "--to-loss")
    given = [name for name, x in zip(names, wish[:3], strict=True) if x is not None]
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise ValueError(f"one of `--recipe`, `--sparsity` and `--to-loss` must be given, got {told}.")
    if wish.sparsity is not None:
        check_sparsity(wish.sparsity, argument="--sparsity")
    if wish.rise is not None and not 0 < checked_number("--to-loss", wish.rise) < float("inf"):
        raise ValueError(f"`--to-loss` must be above 0, a rise of the loss, got {wish.rise}.")
    if wish.steps is not None and wish.recipe is None:
        raise ValueError("`--steps` must come with `--recipe`: nothing else trains.")
    checked_count("--seed", wish.seed, 0)
    return wish


def prune(
    problem: Problem,
    out: Path,
    wish: Wish,
    watcher: Watcher,
    target: str = "",
    *,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Prune a network into a folder, or go on with it.

    Args:
        problem: whose.
        out: the folder.
        wish: how.
        watcher: hears how it gets on.
        target: where the problem came from, `module:problem`.
        resume: go on with the pruning in the folder.
        force: replace it.

    Returns:
        The record that `report.json` holds.

    Raises:
        ProblemError, FolderError, OSError, ValueError: before any work.
    """
    problem, wish = checked_problem(problem), checked_wish(wish)
    plan = None
    if wish.recipe is not None:
        plan = _training.planned(problem, wish.recipe.expanduser(), wish.steps)
    else:
        _pruning.check_kernels(problem)
    head = {"kind": "pruning", "environment": environment(), "problem": described(problem, target)}
    marks = fingerprint(problem) | _marks(wish, plan)
    out = _files.local_path("out", out)
    with opened(out, head, marks, resume=resume, force=force) as folder:
        job = _Job(problem, wish, plan, folder, watcher)
        watcher.planned({name: _cost(job, name) for name in _stages(wish) if name not in folder.stages})
        for name in _stages(wish):
            if name not in folder.stages:
                _one_stage(job, name)
        folder.record["complete"] = True
        _write(folder)
        folder.close()
        return folder.record


def _marks(wish: Wish, plan: Plan | None) -> dict[str, Any]:
    """What a pruning depends on beside the problem, by the names of the options."""
    if plan is not None:
        return {"--recipe": f"{plan.name} {plan.digest}", "--steps": plan.steps}
    return {"--sparsity": wish.sparsity, "--to-loss": wish.rise, "--seed": wish.seed}


class _Job:
    """A pruning at work.

    Attributes:
        problem: whose.
        wish: how.
        plan: of the training, under a recipe.
        folder: where.
        watcher: hears how it gets on.
    """

    def __init__(
        self, problem: Problem, wish: Wish, plan: Plan | None, folder: Folder, watcher: Watcher
    ) -> None:
        self.problem, self.wish, self.plan, self.folder, self.watcher = problem, wish, plan, folder, watcher
        self._trained: _training.Trained | None = None

    def result(self, stage: str) -> Any:
        """What a stage found that is done."""
        return self.folder.stages[stage]["result"]

    @property
    def curvature(self) -> Curvature:
        """Of the dense network, by leaf; empty under a recipe."""
        return {} if self.plan is not None else self.result("curvature")["leaves"]

    def trained(self) -> _training.Trained:
        """The training done; what is on disk of it is not done again."""
        if self._trained is None:
            assert self.plan is not None
            # Not in a folder that ends with the stage: the network is not written yet.
            place, names = self.folder.state / "weights", self.result("before")["metrics"]
            self._trained = _training.trained(self.problem, self.plan, names, place, self._tell_steps)
        return self._trained

    def _tell_steps(self, done: int, total: int) -> None:
        self.watcher.made(TRAINING, done, total)


def _stages(wish: Wish) -> tuple[str, ...]:
    if wish.recipe is not None:
        return ("before", TRAINING, "network")
    search = ("search",) if wish.rise is not None else ()
    return ("before", "curvature", *search, "network")


def _cost(job: _Job, name: str) -> int:
    """Products, or updates of a training."""
    steps = 0 if job.plan is None else job.plan.steps
    search = round(FORWARD * _pruning.TRIALS)
    return {"curvature": _pruning.PROBES, "search": search, TRAINING: steps}.get(name, 0)


def _one_stage(job: _Job, name: str) -> None:
    job.watcher.begun(name)
    with timed() as seconds:
        found = _STAGES[name](job)
        took = seconds()
    entry = {"result": found.result, "products": found.products, "seconds": took}
    job.folder.add_stage(name, to_json(entry))
    _write(job.folder)
    job.watcher.ended(name, job.folder.stages[name])


def _write(folder: Folder) -> None:
    folder.save()
    folder.write_page(pruned_page(folder.record))


# -- the stages ------------------------------------------------------------------------------------


def _before(job: _Job) -> Done:
    return Done(_pruning.numbers(job.problem, job.problem.params)._asdict(), FORWARD)


def _curvature(job: _Job) -> Done:
    asked = Asked(seed=job.wish.seed)
    work = Work(job.problem, asked, job.folder.state, job.watcher.made)
    found = _pruning.curvature_of(job.problem, job.wish.seed, work.callbacks("curvature"))
    return Done({"leaves": found}, _pruning.PROBES)


def _search(job: _Job) -> Done:
    assert job.wish.rise is not None
    path = job.folder.state / "search" / TRIALS
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = [Trial(*map(float, row.values())) for row in read_json(path) or []]

    def keep(trials: list[Trial]) -> None:
        write_json(path, trials)
        job.watcher.made("search", round(FORWARD * len(trials)), _cost(job, "search"))

    dense = float(job.result("before")["loss"])
    level, trials = _pruning.to_loss(job.problem, job.wish.rise, dense, job.curvature, earlier, keep)
    return Done({"sparsity": level, "trials": trials}, FORWARD * len(trials))


def _train(job: _Job) -> Done:
    assert job.plan is not None
    return Done({"steps": job.plan.steps, "history": job.trained().history}, None)


def _network(job: _Job) -> Done:
    pruned = _pruned(job)
    files = write_all(job.problem, pruned, job.curvature, job.folder.path)
    found = _pruning.numbers(job.problem, pruned.params)
    told = {"how": _how(job), "predicted_rise": pruned.predicted}
    return Done(found._asdict() | told | files, FORWARD)


def _pruned(job: _Job) -> Pruned:
    if job.plan is not None:
        return job.trained().pruned
    return _pruning.at_once(job.problem, _level(job), job.curvature)


def _level(job: _Job) -> float:
    if job.wish.sparsity is not None:
        return job.wish.sparsity
    return float(job.result("search")["sparsity"])


def _how(job: _Job) -> str:
    if job.plan is not None:
        return f"{job.plan.steps:,} steps of training under the recipe {job.plan.name}"
    head = f"{_level(job):.1%} of the kernels' weights at once"
    if job.wish.rise is not None:
        return f"{head}: the most tried that raises the loss by at most {job.wish.rise:g}"
    return f"{head}, those of least curvature times square"


_STAGES: Mapping[str, Any] = {
    "before": _before,
    "curvature": _curvature,
    "search": _search,
    TRAINING: _train,
    "network": _network,
}
