"""The tour on real data, in its quick form, run once: what it is made of, and that it can be interrupted."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hessjax as hj
from hessjax.cli import _digits, _tour, app
from hessjax.cli._load import load_problem

pytestmark = pytest.mark.promotes  # linen and optax


def hessjax(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour") / "new" / "folder"
    done = hessjax("tour", "--quick", "--out", folder)
    assert done.exit_code == 0, done.output
    return folder, done


@pytest.fixture(scope="module")
def out(toured):
    return toured[0]


@pytest.fixture(scope="module")
def record(out):
    return json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)


def result(record, stage):
    return record["stages"][stage]["result"]


def pruned(record, stage):
    return record["pruned"]["stages"][stage]["result"]


def test_network_learns_the_digits(record):
    assert pruned(record, "before")["metrics"]["test accuracy"] >= 0.97
    assert pruned(record, "before")["metrics"] == result(record, "loss")["metrics"]


def test_the_self_test_passes(record):
    assert result(record, "check")["passed"]


def test_eigenvalues_are_at_both_ends_and_converged(record):
    found = result(record, "eigenpairs")
    assert all(found["converged"])
    assert found["values"] == sorted(found["values"], reverse=True)
    assert found["values"][0] > 0 > found["values"][-1]
    assert max(found["residuals"]) <= 1e-4 * max(map(abs, found["values"]))


def test_layers_share_the_trace(record):
    found = result(record, "trace")
    rows, total = found["leaves"], found["total"]
    assert sum(row["trace"] for row in rows) == pytest.approx(total["mean"], rel=1e-4)
    assert sum(row["share"] for row in rows) == pytest.approx(1, rel=1e-4)
    assert sum(row["parameters"] for row in rows) == 21546
    assert all(row["stderr"] > 0 and row["data_stderr"] > 0 for row in rows)
    assert total["num_samples"] >= 20


def test_density_agrees_with_the_trace_and_blocks_lie_within_the_whole(record):
    of_density, of_probes = result(record, "density")["trace"], result(record, "trace")["total"]
    gap = abs(of_density["mean"] - of_probes["mean"])
    assert gap < 4 * np.hypot(float(of_density["stderr"]), of_probes["stderr"])
    values = result(record, "eigenpairs")["values"]
    slack = 1e-3 * values[0]
    for row in result(record, "per_layer")["leaves"]:  # interlacing, and Ritz values from inside
        assert values[-1] - slack <= row["least"] <= row["largest"] <= values[0] + slack


def test_pruned_network_is_exactly_sparse_and_good(out, record):
    import orbax.checkpoint as ocp

    after = pruned(record, "network")
    rows = [row for row in after["zeros"] if row["pruned"]]
    number, zeros = (sum(row[name] for row in rows) for name in ("number", "zeros"))
    assert zeros == round(0.9 * number)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((out / "pruned" / "checkpoint").resolve())
    quality = _digits.quality(params, _digits.load().test)
    assert float(quality.sparsity) == pytest.approx(0.9, abs=1e-4)
    assert float(quality.accuracy) == pytest.approx(after["metrics"]["test accuracy"])
    assert after["metrics"]["test accuracy"] >= 0.95
    at_once = next(row for row in result(record, "pruning")["levels"] if row["sparsity"] == 0.9)
    assert after["metrics"]["test accuracy"] > at_once["metrics"]["test accuracy"] + 0.1


def test_history_goes_to_the_sparsity_and_stays_there(record):
    rows = pruned(record, "training")["history"]
    assert [row["step"] for row in rows] == [*range(12, 400, 12), 400]
    zeros = [row["zeros"] for row in rows]
    assert zeros == sorted(zeros)
    assert zeros[17] == zeros[-1] == pytest.approx(0.9, abs=1e-4)


def test_report_says_where_it_was_made(record):
    assert record["environment"]["versions"]["jax"] == jax.__version__
    assert (record["asked"]["seed"], record["complete"], record["kind"]) == (0, True, "analysis")
    assert all(entry["seconds"] > 0 for entry in record["stages"].values())


def test_one_page_has_it_all_and_what_it_shows_is_there(out, record):
    names = {name for entry in record["stages"].values() for name in entry["figures"]}
    kept = {"report.json", "report.html", "recipe.yaml", "pruned", ".hessjax-state"}
    assert {path.name for path in out.iterdir()} == names | kept
    page = (out / "report.html").read_text()
    assert len(page) < 4e6
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.DOTALL)[1])
    assert {"chart-density", "chart-landscape", "chart-trace", "chart-training-1"} <= set(charts)
    for words in ("In plain words", "What did pruning cost?", "Before and after", "Zeros by layer"):
        assert words in page


def test_figures_are_pictures(out, record):
    for entry in record["stages"].values():
        for name in entry["figures"]:
            with Image.open(out / name) as image:
                assert min(image.size) > 400
                assert len(image.convert("L").getcolors()) > 20


def test_lines_fit_a_narrow_terminal(toured):
    _, done = toured
    lines = done.stdout.split("\n\n")[0].splitlines()
    assert lines[0].startswith("The network")
    assert max(map(len, lines)) <= 80


def test_the_network_is_the_problem_of_that_name(record):
    problem, data = load_problem("tour"), _digits.load()
    assert problem.name == record["problem"]["name"]
    expected = _digits.trained(data, _tour.FULL.train_steps)
    jax.tree.map(np.testing.assert_array_equal, problem.params, expected)


def test_a_tour_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    def network(settings, seed, live):
        return load_problem("mine.py")

    def interrupted(*_, **__):
        raise RuntimeError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from reporting import small_problem as problem\n")
    monkeypatch.setattr(_tour, "_network", network)
    quick = _tour.QUICK._replace(tune_steps=8, asked=_tour.Asked(top=1, budget=60))
    monkeypatch.setattr(_tour, "_SETTINGS", {True: quick})
    with monkeypatch.context() as patch:
        patch.setattr(_tour, "prune", interrupted)
        assert hessjax("tour", "--quick", "--out", "out").exit_code == 1
    assert hessjax("tour", "--quick", "--out", "out").exit_code == 2
    done = hessjax("tour", "--quick", "--out", "out", "--resume", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "report.json").read_text())
    assert pruned(record, "training")["steps"] == 8
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = hessjax("tour", "--quick", "--out", "out", "--force", "--quiet")
    assert (again.exit_code, again.output) == (0, "")
    assert (tmp_path / "out" / "notes.txt").exists()


def test_digits_are_split_once_and_for_all():
    first, second = _digits.load(), _digits.load()
    assert [len(part[1]) for part in first] == [1437, 360]
    jax.tree.map(np.testing.assert_array_equal, tuple(first), tuple(second))


def test_loss_of_the_tour_has_a_symmetric_hessian():
    params = _digits.NETWORK.init(jax.random.key(0), _digits.load().train[0][:1])["params"]
    batch = tuple(part[:8] for part in _digits.load().train)
    A = hj.hessian(_digits.loss_fn, params, batch)
    u, v = (
        jax.tree.map(lambda w, s=seed: jax.random.normal(jax.random.key(s), w.shape), params)
        for seed in (1, 2)
    )

    def inner(a, b):
        return sum(float((x * y).sum()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    assert inner(u, A(v)) == pytest.approx(inner(v, A(u)), rel=1e-3)
