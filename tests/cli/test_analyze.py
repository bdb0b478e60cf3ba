"""`hessjax analyze`, `prune`, `compare`, `init`: words, exit codes, files, and mistakes in one line."""

import importlib.util
import json
import os
import re

import jax
import numpy as np
import pytest
from reporting import small_problem
from typer.testing import CliRunner

import hessjax as hj
from hessjax.cli import _analyze, _errors, app

pytestmark = pytest.mark.promotes  # networks of others, and optax

PROBLEM = "from reporting import small_problem as problem\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PROBLEM)
    return tmp_path


def hessjax(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyzed")
    (folder / "mine.py").write_text(PROBLEM)
    done = hessjax("analyze", folder / "mine.py", "--out", folder / "step-10", "--budget", 90, "--top", 1)
    assert done.exit_code == 0, done.output
    return folder, done


def test_analyze_says_what_it_finds_and_where_it_is(analyzed):
    folder, done = analyzed
    assert done.stdout.startswith("Self-test")
    assert "Is this a minimum?" in done.stdout
    assert f"Written to {folder / 'step-10' / 'report.html'}" in done.stdout
    assert "\x1b" not in done.output  # no colours but on a terminal


def test_json_is_the_record_and_nothing_else(analyzed):
    folder, _ = analyzed
    out = folder / "step-10"
    words = ("--out", out, "--budget", 90, "--top", 1, "--resume", "--json")
    done = hessjax("analyze", folder / "mine.py", *words)
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads((out / "report.json").read_text())


def test_beside_json_a_problem_may_print_what_it_likes(folder):
    body = "def problem():\n    print('loading')\n    return small_problem()\n"
    (folder / "loud.py").write_text(f"from reporting import small_problem\n{body}")
    done = hessjax("prune", "loud.py", "--out", "out", "--sparsity", 0.5, "--json")
    assert json.loads(done.stdout)["complete"]
    assert "loading" in done.stderr


def test_a_folder_is_refused_before_the_problem_is_made(folder):
    (folder / "slow.py").write_text("def problem():\n    raise AssertionError('began')\n")
    for words in (("analyze",), ("prune", "--sparsity", 0.5)):
        done = hessjax(words[0], "slow.py", "--out", folder, *words[1:])
        assert "must be an empty folder" in done.stderr


def test_quiet_says_nothing(analyzed):
    folder, _ = analyzed
    words = ("--out", folder / "step-10", "--budget", 90, "--top", 1, "--resume", "--quiet")
    done = hessjax("analyze", folder / "mine.py", *words)
    assert (done.exit_code, done.output) == (0, "")


def test_compare_puts_reports_side_by_side(analyzed, tmp_path):
    folder, _ = analyzed
    hj.report(small_problem(0.3), tmp_path / "step-20", density=False, budget=90, top=1)
    page = tmp_path / "page.html"
    done = hessjax("compare", folder / "step-10", tmp_path / "step-20", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
    assert {x[0] for x in charts["chart-steps-largest"]["series"][0]["points"]} == {10, 20}
    assert {row["name"] for row in charts["chart-layers"]["rows"]} == {"step-10", "step-20"}
    assert hessjax("compare", folder / "step-10", "--out", page).exit_code == 2
    done = hessjax("compare", folder / "step-10", tmp_path, "--out", page)
    assert "must hold a `report.json`" in done.stderr


MISTAKES = {
    "nothing_here:problem": "there is no module `nothing_here`",
    "nothing.py:problem": "there is no file `nothing.py`; `hessjax init` writes one",
    "mine.py:problems": "`mine.py` has no `problems`; it has problem",
    "mine.py:": "must be of the form",
}


@pytest.mark.parametrize("target", MISTAKES)
def test_a_problem_that_is_not_there_is_one_line(folder, target):
    done = hessjax("analyze", target, "--out", "out")
    assert done.exit_code == 2
    assert MISTAKES[target] in done.stderr
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
    assert not (folder / "out").exists()


FIELDS = {
    "loss_fn=3": "field `loss_fn` of the problem: `loss_fn` must be a function",
    "params={'w': 'x'}": "field `params` of the problem: `params`",
    "batches=p.batches[0]": "field `batches` of the problem: `loss_fn(params, batch)` must work for each of",
    "batches=[]": "field `batches` of the problem: `batches` must hold at least one batch",
    "batches=(b for b in p.batches)": "`batches` must start afresh at every product",
    "params={'w': 1.0, 'step': 3}": "field `params` of the problem: `params` must have real floating-point",
    "loss_fn=lambda p, b: (b[0].sum(), {})": "got a tuple. Take the mean of per-example losses; return no",
    "metric=0.5": "field `metric` of the problem: `metric` must be a function",
    "likelihood='categorical'": "field `likelihood` of the problem: `likelihood` must be",
    "optimizer='adam'": "field `optimizer` of the problem: `optimizer` must be an optax optimizer",
    "step=len": "field `step` of the problem: `step` must",
    "groups=['a']": "field `groups` of the problem: `groups` must map names",
    "loss_fn=lambda p, b: b[0]": "TypeError: `loss_fn` must return one real number",
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_wrong_is_named(folder, field):
    name = f"wrong_{abs(hash(field))}.py"
    text = "from reporting import small_problem\np = small_problem()\ndef problem():\n    return p._replace"
    (folder / name).write_text(f"{text}({field})\n")
    done = hessjax("analyze", name, "--out", "out")
    assert done.exit_code == 2
    assert FIELDS[field] in done.stderr
    assert not (folder / "out").exists()


def test_what_a_problem_raises_is_told_with_its_place_and_debug_shows_it(folder):
    (folder / "bad.py").write_text("def problem():\n    return 1 / 0\n")
    done = hessjax("analyze", "bad.py", "--out", "out")
    assert done.exit_code == 2
    assert "`bad.py` raised ZeroDivisionError: division by zero (line 2 of " in done.stderr
    done = hessjax("analyze", "bad.py", "--out", "out", "--debug")
    assert isinstance(done.exception.__cause__, ZeroDivisionError)
    (folder / "none.py").write_text("def problem():\n    pass\n")
    assert "must return an `hj.Problem`, got None" in hessjax("analyze", "none.py", "--out", "out").stderr


def test_a_self_test_that_fails_has_an_exit_code_of_its_own(folder):
    text = "from reporting import small_problem, small_loss\ndef problem():\n    return "
    (folder / "inf.py").write_text(
        text + "small_problem()._replace(loss_fn=lambda p, b: small_loss(p, b) / 0)\n"
    )
    done = hessjax("analyze", "inf.py", "--out", "out")
    assert done.exit_code == _errors.CHECK_FAILED
    assert "finite loss: the loss is inf" in done.stderr


def test_a_folder_that_cannot_be_written_to_is_one_line(folder):
    (folder / "file").touch()
    done = hessjax("analyze", "mine.py", "--out", folder / "file" / "below")
    assert done.exit_code == 2
    assert done.stderr.startswith("hessjax: cannot write to `")
    assert done.stderr.count("\n") == 1


def test_an_error_of_ours_is_one_line_and_a_hint(folder, monkeypatch):
    monkeypatch.setattr(_analyze, "load_problem", lambda _: {}["key"])
    done = hessjax("analyze", "mine.py", "--out", "out")
    assert done.exit_code == 1
    assert "KeyError" in done.stderr
    assert "`--debug` shows where" in done.stderr


@pytest.mark.parametrize("command", ["analyze", "prune", "compare", "init"])
def test_help_has_examples(command):
    done = hessjax(command, "--help")
    assert done.exit_code == 0
    assert f"hessjax {command}" in done.output
    assert "Example" in done.output


# -- prune -----------------------------------------------------------------------------------------


def restored(path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.resolve(), small_problem().params)


def test_prune_to_a_rise_of_the_loss_stays_below_it(folder):
    done = hessjax("prune", "mine.py", "--out", "out", "--to-loss", 0.05, "--json")
    assert done.exit_code == 0, done.output
    found = {name: entry["result"] for name, entry in json.loads(done.stdout)["stages"].items()}
    assert 0 < found["network"]["loss"] - found["before"]["loss"] <= 0.05
    with np.load(folder / "out" / "masks.npz") as file:
        masks = dict(file)
    params = jax.tree.map(np.asarray, restored(folder / "out" / "checkpoint"))
    assert set(masks) == {"a/kernel", "b/kernel"}
    assert not params["a"]["kernel"][~masks["a/kernel"]].any()
    tried = [x["sparsity"] for x in found["search"]["trials"] if x["rise"] > 0.05]
    zeros = sum(row["zeros"] for row in found["network"]["zeros"] if row["pruned"]) / 20
    assert not tried or min(tried) >= zeros - 0.1
    page = (folder / "out" / "report.html").read_text()
    assert "Search by the loss" in page
    assert "is not finished" not in page
    words = ("--out", "out", "--to-loss", 0.05, "--resume", "--quiet")
    assert hessjax("prune", "mine.py", *words).exit_code == 0


RECIPE = """
version: 1
pruners:
  layers:
    class: magnitude
    args: {where: "*/kernel", final_sparsity: 0.5, allocation: uniform}
policies:
  - pruner: {instance_name: layers}
    starting_epoch: 0
    ending_epoch: 2
"""


def test_prune_by_a_recipe_trains_with_the_step_of_the_problem(folder):
    pytest.importorskip("pydantic")
    (folder / "recipe.yaml").write_text(RECIPE)
    done = hessjax("prune", "mine.py", "--out", "out", "--recipe", "recipe.yaml", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    record = json.loads((folder / "out" / "report.json").read_text())
    found = {name: entry["result"] for name, entry in record["stages"].items()}
    assert [row["zeros"] for row in found["network"]["zeros"]] == [0, 6, 4]
    assert found["network"]["how"].startswith("12 steps of training")
    assert [row["step"] for row in found["training"]["history"]] == [4, 8, 12]
    assert [row["zeros"] for row in found["training"]["history"]][1:] == [0.5, 0.5]
    assert hessjax("prune", "mine.py", "--out", "out", "--sparsity", 0.5).exit_code == 2  # not empty


def test_what_cannot_be_pruned_is_said_before_any_work(folder):
    pytest.importorskip("pydantic")
    (folder / "recipe.yaml").write_text(RECIPE.replace("*/kernel", "*/weight"))
    done = hessjax("prune", "mine.py", "--out", "out", "--recipe", "recipe.yaml")
    assert (done.exit_code, "*/weight" in done.stderr) == (2, True)
    text = "import reporting\ndef problem():\n    p = reporting.small_problem()\n    return p._replace"
    fields = "loss_fn=lambda w, b: (w * b[0][:, 0]).mean(), metric=None, "
    fields += "model_fn=None, groups=None, params=p.params['a']['bias'][:1]"
    (folder / "flat.py").write_text(f"{text}({fields})")
    done = hessjax("prune", "flat.py", "--out", "out", "--sparsity", 0.5)
    assert "`params` must hold a kernel for `--sparsity`" in done.stderr
    assert not (folder / "out").exists()
    done = hessjax("analyze", "flat.py", "--out", "out", "--budget", 60, "--top", 1)
    assert "nothing to prune" in done.stdout
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("way", ["--sparsity", "--recipe"])
def test_a_disk_that_is_full_is_one_line_and_the_rest_goes_on(folder, monkeypatch, way):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "a.kernel": No space left on device [and more]')

    pytest.importorskip("pydantic")
    (folder / "recipe.yaml").write_text(RECIPE)
    words = ("prune", "mine.py", "--out", "out", way, 0.5 if way == "--sparsity" else "recipe.yaml")
    with monkeypatch.context() as patch:
        for kind in (ocp.StandardCheckpointer, ocp.Checkpointer):
            patch.setattr(kind, "save", full)
        done = hessjax(*words)
    assert done.exit_code == 2
    kept = "what was done is kept there, and `--resume` goes on"
    assert done.stderr == f"hessjax: cannot write to `out`: No space left on device; {kept}\n"
    assert hessjax(*words, "--resume").exit_code == 0


def test_prune_wants_one_way(folder):
    done = hessjax("prune", "mine.py", "--out", "out", "--sparsity", 0.5, "--to-loss", 0.1)
    assert "one of `--recipe`, `--sparsity` and `--to-loss`" in done.stderr
    assert hessjax("prune", "mine.py", "--out", "out").exit_code == 2
    assert (
        "`--steps` must come"
        in hessjax("prune", "mine.py", "--out", "o", "--sparsity", 0.5, "--steps", 3).stderr
    )
    assert not (folder / "out").exists()


# -- init ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_a_template_runs_as_it_is(folder, library):
    assert hessjax("init", "problem.py", "--library", library).exit_code == 0
    assert hessjax("init", "problem.py").exit_code == 2  # it is there
    if importlib.util.find_spec("equinox") is None and library == "equinox":
        pytest.skip("needs equinox")
    spec = importlib.util.spec_from_file_location(f"template_{library}", folder / "problem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    problem = module.problem()
    assert problem.metric(problem.params)["accuracy"] > 0.7
    assert hj.layers.coverage(problem.model_fn, problem.params, problem.batches[0]).covered
    assert os.path.basename(folder / "problem.py") in (folder / "problem.py").read_text()
