"""Pages made at build, and the check that a built site loads nothing from elsewhere."""

import json

import generated
import offline
import pytest


def test_the_benchmarks_page_shows_every_result_kept():
    page = generated.benchmarks()
    for path in (generated.ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert f"## {result['question']}\n" in page
        assert all(f"| {figure['name']} |" in page for figure in result["figures"])
        assert all(f"| {row} |" in page for row in result.get("grid", {"rows": {}})["rows"])


def test_tables_on_the_benchmarks_page_have_as_many_cells_as_columns():
    tables = [block for block in generated.benchmarks().split("\n\n") if block.startswith("|")]
    assert tables
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<a href="https://arxiv.org/abs/1">paper</a>', 0),
        ('<script src="_static/a.js"></script><img src="figure.png">', 0),
        ('<script defer src="https://cdn.example/a.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', 1),
        ("<style>@font-face { src: url('https://fonts.example/a.woff') }</style>", 1),
    ],
)
def test_what_a_browser_would_load_from_elsewhere_is_found(tmp_path, html, found):
    (tmp_path / "page.html").write_text(html)
    assert len(offline.loaded_from_elsewhere(tmp_path)) == found
