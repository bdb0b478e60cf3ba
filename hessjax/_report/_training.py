"""Training while a recipe prunes, saved every few seconds: what a kill leaves is gone on from."""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hessjax._core import _processes
from hessjax._core._types import Params
from hessjax._report import _passes
from hessjax._report._problem import Problem
from hessjax._report._pruning import Pruned
from hessjax._report._record import disk_errors
from hessjax._report._work import Pace
from hessjax._run import _checkpoint_files, _store
from hessjax._run._checkpoint_files import Run, Saved
from hessjax._run._identity import fingerprint
from hessjax.curvature._data import unweighed
from hessjax.pruning.training._masks import mask_of
from hessjax.recipes._recipe import Recipe, load_recipe


class Row(NamedTuple):
    """How far a training has come.

    Attributes:
        step: updates made.
        zeros: the share of zeros among what is pruned.
        metrics: of the problem, by name.
    """

    step: int
    zeros: float
    metrics: dict[str, float]


class Plan(NamedTuple):
    """How a network is to be trained.

    Attributes:
        recipe: who is pruned, how and when.
        name: of the recipe's file.
        digest: of what is in it.
        epoch: updates in a pass over the data.
        steps: updates in all.
    """

    recipe: Recipe
    name: str
    digest: str
    epoch: int
    steps: int


def planned(problem: Problem, path: Path, steps: int | None) -> Plan:
    """A recipe for a problem, to the end of its last policy and one pass more.

    Raises:
        ValueError: what is wrong in the file, or with it for these params; fewer `steps` than its last
            policy needs.
    """
    epoch = sum(1 for _ in unweighed(problem.batches))
    recipe = load_recipe(path, steps_per_epoch=epoch)
    last = max(int(rule.options["stop"]) for rule in recipe.rules)
    if steps is not None and steps < last:
        raise ValueError(
            f"`--steps` must be at least {last}, the end of the recipe's last policy, got {steps}."
        )
    # Whether it fits the params shows now, not after the first pass.
    jax.eval_shape(recipe.prune(optax.identity()).init, problem.params)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Plan(recipe, path.name, digest, epoch, last + epoch if steps is None else steps)


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        pruned: the network.
        history: a row after each pass over the data, and one at the end.
    """

    pruned: Pruned
    history: list[Row]


def trained(
    problem: Problem, plan: Plan, metrics: Iterable[str], folder: Path, tell: Callable[[int, int], None]
) -> Trained:
    """Train while a recipe prunes, with the problem's own step or a plain one.

    Args:
        problem: whose network, optimizer and step.
        plan: the recipe, and for how long.
        metrics: the names of what the problem's metric returns.
        folder: where the training is saved; what is there is gone on from.
        tell: told after each update how many were made, and how many there will be.
    """
    tx = plan.recipe.prune(problem.optimizer or optax.adam(1e-4))
    step = problem.step or _Step(problem)
    # Copies: a step may donate what it is given.
    params = jax.tree.map(jnp.copy, problem.params)
    with _saved(folder, problem, plan, tuple(metrics), (params, tx.init(params))) as saved:
        (params, state), done, history = saved.begun()
        for batch in _batches(problem, plan, done):
            params, state = step(tx, params, state, batch)
            done += 1
            if not done % plan.epoch or done == plan.steps:
                history.append(_row(problem, done, params, mask_of(state)))
            saved.look((params, state), done, history)
            tell(done, plan.steps)
        return Trained(Pruned(params, mask_of(state), None), history)


def _batches(problem: Problem, plan: Plan, done: int) -> Iterator[Any]:
    """Those of the updates that are left; passes begin afresh, so whole ones need not be read again."""
    passes = itertools.chain.from_iterable(unweighed(problem.batches) for _ in itertools.count())
    return itertools.islice(passes, done % plan.epoch, done % plan.epoch + plan.steps - done)


def _row(problem: Problem, step: int, params: Params, mask: Params) -> Row:
    pruned = [
        leaf for leaf, kept in zip(*map(jax.tree.leaves, (params, mask)), strict=True) if jnp.ndim(kept)
    ]
    zeros = sum(int(jnp.sum(leaf == 0)) for leaf in pruned) / max(sum(leaf.size for leaf in pruned), 1)
    return Row(step, zeros, _passes.metrics(problem, params))


class _Step:
    """The plain training step: the gradient of the loss, compiled once."""

    def __init__(self, problem: Problem) -> None:
        self._loss_fn = problem.loss_fn
        self._compiled = jax.jit(self._step, static_argnums=0)

    def __call__(self, tx: Any, params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        return self._compiled(tx, params, state, batch)

    def _step(self, tx: Any, params: Params, state: Any, batch: Any) -> tuple[Params, Any]:
        updates, state = tx.update(jax.grad(self._loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state


# -- on disk -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _saved(
    folder: Path, problem: Problem, plan: Plan, metrics: tuple[str, ...], fresh: Any
) -> Iterator["_Saved"]:
    """Where a training is saved, for the time of a block."""
    leaves, form = jax.tree.flatten(fresh)
    identity = fingerprint(problem.params, "params") | {"recipe": plan.digest, "steps": str(plan.steps)}
    run = Run(identity, _checkpoint_files.devices_of(leaves), list(map(_as_array, leaves)))
    with _store.opened(folder, _processes.holders(leaves)) as store:
        yield _Saved(store, run, form, metrics, plan.steps)


class _Saved:
    """The checkpoints of one training."""

    def __init__(self, store: Any, run: Run, form: Any, metrics: tuple[str, ...], steps: int) -> None:
        self._store, self._run, self._form = store, run, form
        self._metrics, self._steps, self._pace = metrics, steps, Pace()

    def begun(self) -> tuple[Any, int, list[Row]]:
        """Params and state, the updates made and the history: of the latest checkpoint, or fresh."""
        found = _checkpoint_files.read(self._store, self._run) or Saved(self._run.fresh, {}, 0)
        rows = found.gathered[_HISTORY].tolist() if _HISTORY in found.gathered else []
        history = [Row(int(step), x, dict(zip(self._metrics, more, strict=True))) for step, x, *more in rows]
        return jax.tree.unflatten(self._form, found.leaves), found.num_matvecs, history

    def look(self, tree: Any, done: int, history: list[Row]) -> None:
        """Save where it is time, and at the end."""
        if done < self._steps and not self._pace.is_due():
            return
        with self._pace.saving(), disk_errors():
            rows = [self._numbers(row) for row in history]
            table = {_HISTORY: np.array(rows, np.float64).reshape(len(rows), 2 + len(self._metrics))}
            leaves = list(map(_as_array, jax.tree.leaves(tree)))
            _checkpoint_files.write(self._store, self._run, Saved(leaves, table, done))

    def _numbers(self, row: Row) -> list[float]:
        return [float(row.step), row.zeros, *(row.metrics.get(name, math.nan) for name in self._metrics)]


_HISTORY = "history"


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
