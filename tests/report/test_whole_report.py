"""The whole report of a small problem: numbers against dense mathematics, the page, resuming."""

import html.parser
import json
import re

import jax
import jax.flatten_util
import numpy as np
import pytest
from reporting import small_loss, small_model, small_problem

import hessjax as hj
from hessjax._report import _engine, _stages
from hessjax._report._engine import CheckFailedError
from hessjax._report._folder import FolderError


@pytest.fixture(scope="module")
def dense(problem):
    """The Hessian over all data, as a matrix."""
    flat, unravel = jax.flatten_util.ravel_pytree(problem.params)

    def mean(w):
        return sum(small_loss(unravel(w), batch) for batch in problem.batches) / len(problem.batches)

    return np.asarray(jax.hessian(mean)(flat), float), float(mean(flat)), np.asarray(jax.grad(mean)(flat))


def result(report, name):
    return report.record["stages"][name]["result"]


def test_the_numbers_are_those_of_dense_mathematics(whole, dense):
    hessian, loss, gradient = dense
    values = np.linalg.eigvalsh(hessian)[::-1]
    assert result(whole, "loss")["loss"] == pytest.approx(loss, rel=1e-5)
    assert result(whole, "loss")["norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    found = result(whole, "eigenpairs")["values"]
    np.testing.assert_allclose(found, [*values[:2], *values[-2:]], rtol=1e-3, atol=1e-4)
    total = result(whole, "trace")["total"]
    assert abs(total["mean"] - np.trace(hessian)) < 4 * total["stderr"]
    row = result(whole, "per_layer")["leaves"][1]
    block = np.linalg.eigvalsh(hessian[4:16, 4:16])
    assert row["path"] == "a/kernel"
    assert row["largest"] == pytest.approx(block[-1], rel=1e-3)


def test_the_noise_of_the_gradient_is_that_of_its_batches(whole, problem):
    grads = [
        jax.flatten_util.ravel_pytree(jax.grad(small_loss)(problem.params, b))[0] for b in problem.batches
    ]
    rows = np.asarray(grads, float)
    expected = np.sqrt(rows.var(axis=0, ddof=1).sum() / len(rows))
    assert result(whole, "loss")["noise"] == pytest.approx(expected, rel=1e-4)


def test_a_budget_holds(whole):
    assert sum(entry.get("products", 0) for entry in whole.record["stages"].values()) <= 420 * 1.02
    assert whole.record["complete"]


def test_every_part_is_there(whole):
    names = ["check", "loss", "trace", "pruning", "eigenpairs", "density", "per_layer", "landscape", "layers"]
    assert list(whole.record["stages"]) == names
    assert not any("skipped" in entry for entry in whole.record["stages"].values())
    assert len(whole.record["reading"]) == 5


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_stands_alone_and_says_what_it_shows(whole):
    page = Page(whole.html)
    assert len(whole.html) < 4e6
    assert all(x["src"].startswith("data:") and x["alt"] for x in page.named("img"))
    assert not page.named("link")
    assert not [x for x in page.named("script") if "src" in x]
    assert "default-src 'none'" in page.named("meta")[1]["content"]
    regions = [x for x in page.named("div") if x.get("class") == "scroll"]
    assert len(regions) == len(page.named("table")) >= 8
    assert all(x["tabindex"] == "0" and x["aria-label"] for x in regions)
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', whole.html, re.DOTALL)[1])
    places = {x["id"] for x in page.named("div") if x.get("class") == "chart"}
    assert (
        places
        == set(charts)
        == {f"chart-{x}" for x in ("density", "trace", "per_layer", "landscape", "pruning")}
    )
    assert "a &lt;small&gt; network" in whole.html
    assert "<small>" not in whole.html


def test_files_are_those_of_the_record(whole):
    from pathlib import Path

    figures = {name for entry in whole.record["stages"].values() for name in entry.get("figures", [])}
    there = {path.name for path in Path(whole.folder).iterdir()}
    assert there == {*figures, "report.json", "report.html", ".hessjax-state"}
    assert [path.name for path in (Path(whole.folder) / ".hessjax-state").iterdir()] == ["eigenvectors.npz"]
    assert json.loads((Path(whole.folder) / "report.json").read_text()) == whole.record


def test_a_notebook_shows_the_page_in_a_frame_and_a_terminal_the_answers(whole):
    assert whole._repr_html_().startswith("<iframe title=")
    assert "Is this a minimum?" in repr(whole)


def test_what_is_done_is_not_done_again(whole, problem, monkeypatch):
    monkeypatch.setattr(_engine, "done", lambda *_: pytest.fail("worked"))
    again = hj.report(problem, whole.folder, top=2, density=True, per_layer=True, landscape=True, layers=True,
                      budget=420, resume=True)  # fmt: skip
    assert again.record == whole.record


def test_a_folder_that_is_not_empty_is_refused(whole, problem, tmp_path):
    with pytest.raises(FolderError, match=r"holds .*: `--resume` goes on"):
        hj.report(problem, whole.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="notes.txt"):
        hj.report(problem, tmp_path)


def test_another_problem_is_refused_by_what_differs(whole):
    with pytest.raises(FolderError, match=r"another problem; these differ:\n  params: a/kernel, b/kernel"):
        hj.report(small_problem(scale=0.25), whole.folder, resume=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["loss", "eigenpairs"])
def test_an_interruption_keeps_what_was_done(problem, tmp_path, monkeypatch, stage):
    def killed(name, work):
        if name == stage:
            raise Killed
        return _stages.done(name, work)

    monkeypatch.setattr(_engine, "done", killed)
    with pytest.raises(Killed):
        hj.report(problem, tmp_path, density=False, budget=90)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert stage not in kept["stages"]
    assert not kept["complete"]
    monkeypatch.undo()
    found = hj.report(problem, tmp_path, density=False, budget=90, resume=True)
    assert found.record["complete"]
    assert {name: found.record["stages"][name] for name in kept["stages"]} == kept["stages"]


def test_a_full_disk_leaves_the_report_before_it(problem, tmp_path, monkeypatch):
    from hessjax._core import _files

    hj.report(problem, tmp_path, density=False, budget=60, top=1)
    before = (tmp_path / "report.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        hj.report(problem, tmp_path, density=True, budget=100, top=1, resume=True)
    assert (tmp_path / "report.json").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_a_loss_that_is_not_finite_ends_after_the_self_test(problem, tmp_path):
    broken = problem._replace(loss_fn=lambda p, batch: small_loss(p, batch) / 0.0)
    with pytest.raises(CheckFailedError, match="finite loss: the loss is inf"):
        hj.report(broken, tmp_path, density=False)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert list(kept["stages"]) == ["check"]
    assert "FAILED" in (tmp_path / "report.html").read_text()


def test_batches_that_are_filled_up_have_a_report_without_kfac(problem, tmp_path):
    def loss_fn(params, batch):
        *batch, weights = batch
        each = np.float32(0.5) * ((small_model(params, batch) - batch[1]) ** 2).sum(-1)
        return (each * weights).sum() / weights.sum()

    short = [*problem.batches[:2], jax.tree.map(lambda x: x[:5], problem.batches[2])]
    padded = hj.batches(short, with_weights=lambda batch, weights: (*batch, weights))
    filled = problem._replace(loss_fn=loss_fn, batches=padded)
    asked = {"density": False, "layers": True, "top": 1, "budget": 100}
    found = hj.report(filled, tmp_path / "padded", **asked)
    assert found.record["stages"]["layers"]["result"]["why_not"].startswith("`batches` must not be filled up")
    plain = hj.report(problem._replace(batches=short), tmp_path / "plain", **asked)
    for stage, path in (("loss", ("loss",)), ("trace", ("total", "mean"))):
        a, b = result(found, stage), result(plain, stage)
        for name in path:
            a, b = a[name], b[name]
        assert a == pytest.approx(b, rel=1e-5)
    np.testing.assert_allclose(
        result(found, "eigenpairs")["values"], result(plain, "eigenpairs")["values"], 1e-4
    )
