"""A pruning that is killed, at whatever moment, ends as one that never was; the same by `hessjax prune`."""

import json

import jax
import numpy as np
import pytest
from kills import KILLS, Moments, stages
from reporting import small_problem

from hessjax._report import _passes, _training, _work
from hessjax._report._engine import Watcher
from hessjax._report._folder import FolderError
from hessjax._report._prune_engine import Wish, prune

pytestmark = pytest.mark.promotes  # optax, in a loop of its own

RECIPE = """
version: 1
pruners:
  layers:
    class: movement
    args:
      where: "*/kernel"
      final_sparsity: 0.5
      allocation: uniform
      optimizer: {class: sgd, args: {learning_rate: 1.0}}
policies:
  - pruner: {instance_name: layers}
    starting_step: 1
    ending_step: 7
    frequency: 2
"""


PROBLEM = small_problem()._replace(model_fn=None, likelihood=None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    pytest.importorskip("pydantic")
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def checkpoint(folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((folder / "checkpoint").resolve(), PROBLEM.params)
    return jax.tree.map(np.asarray, params)


def results(record):
    return {name: entry["result"] for name, entry in record["stages"].items()}


def lived(wish, folder, place):
    """A life from beginning to end, and what kills in it would have left."""
    with pytest.MonkeyPatch.context() as patch, Moments(folder, place).watched() as moments:
        patch.setattr(_work.Pace, "is_due", lambda pace: True)
        record = prune(PROBLEM, folder, wish, Watcher())
    return results(record), checkpoint(folder), moments


def check(wish, folder, expected, params):
    record = prune(PROBLEM, folder, wish, Watcher(), resume=True)
    assert record["complete"]
    assert results(record) == expected
    jax.tree.map(np.testing.assert_array_equal, checkpoint(folder), params)
    names = {"report.json", "report.html", *expected["network"]["files"]}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("way", ["recipe", "rise"])
def test_a_kill_at_whatever_moment_loses_nothing(recipe, tmp_path, way):
    wish = Wish(recipe=recipe) if way == "recipe" else Wish(rise=0.05)
    expected, params, moments = lived(wish, tmp_path / "life", tmp_path)
    for copy in moments.chosen(max(KILLS // 4, 1), stages):
        check(wish, copy, expected, params)


def test_a_training_that_is_interrupted_makes_only_the_steps_that_are_left(recipe, tmp_path, monkeypatch):
    class StopError(Exception):
        pass

    class Stopping(Watcher):
        def made(self, stage, products, total):
            seen.append(products)
            if products == 6:
                raise StopError

    seen, wish = [], Wish(recipe=recipe, steps=10)
    monkeypatch.setattr(_work.Pace, "is_due", lambda pace: True)
    with pytest.raises(StopError):
        prune(PROBLEM, tmp_path, wish, Stopping())
    record = prune(PROBLEM, tmp_path, wish, Stopping(), resume=True)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [row["step"] for row in results(record)["training"]["history"]] == [4, 8, 10]


def test_a_search_that_is_interrupted_does_not_measure_again(tmp_path, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*args)

    measured = _passes.mean_loss
    monkeypatch.setattr(_passes, "mean_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        prune(PROBLEM, tmp_path, Wish(rise=0.05), Watcher())
    record = prune(PROBLEM, tmp_path, Wish(rise=0.05), Watcher(), resume=True)
    assert len(calls) == 4 + 5 + 1  # before and two trials, one that failed; five trials; after
    whole = prune(PROBLEM, tmp_path / "whole", Wish(rise=0.05), Watcher())
    assert results(record) == results(whole)


def test_another_pruning_is_refused_by_what_differs(recipe, tmp_path):
    prune(PROBLEM, tmp_path, Wish(sparsity=0.5), Watcher())
    for wish, word in (
        (Wish(sparsity=0.6), "--sparsity: 0.5 there, 0.6 here"),
        (Wish(recipe=recipe), "--recipe"),
    ):
        with pytest.raises(FolderError, match=word):
            prune(PROBLEM, tmp_path, wish, Watcher(), resume=True)
    other = PROBLEM._replace(params=jax.tree.map(lambda x: 2 * x, PROBLEM.params))
    with pytest.raises(FolderError, match="params: a/kernel, b/kernel"):
        prune(other, tmp_path, Wish(sparsity=0.5), Watcher(), resume=True)
    with pytest.raises(FolderError, match="must be an empty folder"):
        prune(PROBLEM, tmp_path, Wish(sparsity=0.5), Watcher())


def test_force_replaces_a_pruning_and_nothing_else(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prune(PROBLEM, tmp_path, Wish(sparsity=0.5), Watcher(), force=True)
    assert (tmp_path / "sensitivity.csv").exists()
    record = prune(PROBLEM, tmp_path, Wish(recipe=recipe), Watcher(), force=True)
    assert not (tmp_path / "sensitivity.csv").exists()  # it was of the one before
    names = {*record["stages"]["network"]["result"]["files"], "report.json", "report.html", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_networks_of_others_are_not_replaced_even_so(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_text("months of work")
    with pytest.raises(FolderError, match="must not hold a `checkpoint` of yours"):
        prune(PROBLEM, tmp_path, Wish(sparsity=0.5), Watcher(), force=True)
    assert (tmp_path / "checkpoint" / "weights").read_text() == "months of work"
    (tmp_path / "report.json").write_text(json.dumps({"format": 1, "stages": {}}))  # of an analysis
    with pytest.raises(FolderError, match="`hessjax prune`, but .* is one of `hessjax analyze`"):
        prune(PROBLEM, tmp_path, Wish(sparsity=0.5), Watcher(), force=True)


def test_a_step_that_donates_its_params_leaves_those_of_the_problem(recipe, tmp_path):
    step = jax.jit(_training._Step(PROBLEM)._step, static_argnums=0, donate_argnums=(1, 2))
    record = prune(PROBLEM._replace(step=step), tmp_path, Wish(recipe=recipe), Watcher())
    assert record["complete"]
