"""The grids that the page of benchmarks shows, and the marks they go between."""

import json

import run_all
import table

GRID = table.Grid("% right", ["90%", "98%"], {"dense": [[95.0]], "best": [[90.0, 92.0], []]})


def kept(script="one", grid=GRID, device="CPU"):
    """As it comes back from the JSON."""
    extra = {} if grid is None else {"grid": grid._asdict()}
    return json.loads(
        json.dumps({"script": script, "question": "?", "device": device, "figures": [], **extra})
    )


def test_a_cell_is_the_mean_with_its_spread_and_may_be_empty():
    assert table.grids([kept(), kept("two", None)]) == {
        "one": "| % right (CPU) | 90% | 98% |\n|---|---:|---:|\n| dense | 95.0 |  |\n| best | 91.0 ± 1.4 |  |"
    }


def test_devices_stand_one_below_the_other():
    both = table.grids([kept(), kept(device="GPU")])["one"]
    assert both.count("| dense |") == 2
    assert "\n\n| % right (GPU)" in both


def test_text_changes_between_its_marks_only():
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert table.between(text, "x", "new") == text.replace("old", "new")
    assert table.between(text, "y", "new") == text
    assert table.between("<!-- x: begin -->", "x", "new") == "<!-- x: begin -->"


def test_the_readme_takes_the_grids_it_has_marks_for(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(run_all, "README", readme)
    names = ("benchmarks", "grid one")
    readme.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in names))
    run_all.into_readme([kept(), kept("two")])
    assert readme.read_text().count("91.0 ± 1.4") == 1
