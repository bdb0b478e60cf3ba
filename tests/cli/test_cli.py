"""The command: its words, its errors, and what it says when its extras are missing."""

import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from hessjax import __main__
from hessjax.cli import app


def test_version():
    try:
        want = version("hessjax")
    except PackageNotFoundError:
        pytest.skip("hessjax is on the path, not installed")
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"hessjax {want}\n")


def test_help_names_the_tour():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "tour" in result.output


def test_unwritable_out_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("hessjax.cli._digits.load", lambda: pytest.fail("began to work"))
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["tour", "--out", str(tmp_path / "file" / "below")])
    assert result.exit_code == 2
    assert result.stderr.startswith("hessjax: cannot write to `")
    assert result.stderr.count("\n") == 1


def test_an_earlier_result_is_not_overwritten_without_force(tmp_path, monkeypatch):
    monkeypatch.setattr("hessjax.cli._digits.load", lambda: pytest.fail("began to work"))
    (tmp_path / "density.png").write_text("mine")
    result = CliRunner().invoke(app, ["tour", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "`out` must be an empty folder" in result.stderr
    assert "density.png: `--resume` goes on with a report, `--force` replaces it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "density.png").read_text() == "mine"


def test_a_reader_that_stops_early_ends_the_command_without_a_word(tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("hessjax.cli._tour.run_tour", stopped)
    result = CliRunner().invoke(app, ["tour", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (1, "")


def test_negative_seed_is_refused():
    result = CliRunner().invoke(app, ["tour", "--seed", "-1"])
    assert result.exit_code == 2


@pytest.mark.parametrize("package", ["typer", "sklearn"])
def test_missing_extra_is_one_line(package, monkeypatch, capsys):
    for module in ("hessjax.cli", "hessjax.cli._tour", "hessjax.cli._digits"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.datasets", None)
    monkeypatch.setattr(sys, "argv", ["hessjax", "tour"])
    with pytest.raises(SystemExit) as caught:
        __main__.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "pip install 'hessjax[tour]'" in error
    assert error.count("\n") == 1
