"""Rows and tables; JSON, folders, the environment."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import hessjax as hj
from hessjax import _report as report


def estimate(mean, stderr, of_data=None):
    of_data = None if of_data is None else jnp.float32(of_data)
    return hj.Estimate(jnp.float32(mean), jnp.float32(stderr), jnp.int32(5), of_data)


TRACES = hj.TraceByLeaf(
    estimate(8.0, 1.0), {"bias": estimate(2.0, 0.5, 0.125), "kernel": estimate(6.0, jnp.inf)}
)
PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 3))}


def printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_layer_rows_add_up():
    rows = report.layer_rows(TRACES, PARAMS)
    assert rows[0] == ("bias", (2,), 2, 2.0, 0.5, 0.125, 0.25, 1.0)
    assert sum(row.share for row in rows) == 1.0
    assert rows[1].per_parameter == 1.0


def test_tables_show_the_uncertainty():
    pairs = hj.Eigenpairs(
        jnp.array([2.0, -1.0]), None, jnp.array([1e-6, 0.25]), jnp.array([True, False]), jnp.int32(9)
    )
    text = printed(report.eigenvalue_table(pairs))
    assert "1.0e-06  yes" in text
    assert "2.5e-01  no" in text
    text = printed(report.layer_table(TRACES, PARAMS))
    assert "2×3" in text
    assert "0.12" in text
    assert "inf" in text
    assert "total" in text
    assert "90.00" in printed(report.accuracy_table({"sparse": (0.9, 0.97)}))


def test_names_are_shown_as_they_are():
    leaf = estimate(2.0, 0.5)
    names = ("w[a]", "x[/a]", "y:smile:\\")
    traces, params = hj.TraceByLeaf(leaf, dict.fromkeys(names, leaf)), dict.fromkeys(names, jnp.ones(2))
    text = printed(report.layer_table(traces, params))
    text += printed(report.accuracy_table(dict.fromkeys(names, (0.9, 0.97))))
    assert all(text.count(name) == 2 for name in names)


def test_the_table_says_when_the_matvec_is_not_symmetric():
    pairs = hj.Eigenpairs(jnp.array([2.0]), None, jnp.array([1e-6]), jnp.array([True]), jnp.int32(9))
    assert "not symmetric" not in printed(
        report.eigenvalue_table(pairs._replace(asymmetry=jnp.float32(1e-6)))
    )
    assert "not symmetric" in printed(report.eigenvalue_table(pairs._replace(asymmetry=jnp.float32(0.1))))


def test_json_is_strict_and_round_trips(tmp_path):
    estimate = hj.Estimate(jnp.float32(6.0), jnp.float32(jnp.inf), jnp.int32(5))
    record = {
        "a": {"kernel": estimate},
        "b": (np.float32(0.5), jnp.arange(3), float("nan")),
        "c": None,
        "d": True,
    }
    report.write_json(tmp_path / "report.json", record)
    back = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert back["a"]["kernel"] == {"mean": 6.0, "stderr": "inf", "num_samples": 5, "data_stderr": None}
    assert back["b"] == [0.5, [0, 1, 2], "nan"]
    assert (back["c"], back["d"]) == (None, True)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["report.json"]


def test_prepare_refuses_a_file_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        report.prepare(tmp_path / "file")


def test_environment_names_versions_and_device():
    found = report.environment()
    assert {"jax", "flax", "optax"} <= set(found["versions"])
    assert found["device"]
