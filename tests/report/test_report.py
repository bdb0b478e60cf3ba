"""Rows; JSON, folders, the environment."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax import _report as report


def estimate(mean, stderr, of_data=None):
    of_data = None if of_data is None else jnp.float32(of_data)
    return hj.Estimate(jnp.float32(mean), jnp.float32(stderr), jnp.int32(5), of_data)


TRACES = hj.TraceByLeaf(
    estimate(8.0, 1.0), {"bias": estimate(2.0, 0.5, 0.125), "kernel": estimate(6.0, jnp.inf)}
)
PARAMS = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 3))}


def test_layer_rows_add_up():
    rows = report.layer_rows(TRACES, PARAMS)
    assert rows[0] == ("bias", (2,), 2, 2.0, 0.5, 0.125, 0.25, 1.0)
    assert sum(row.share for row in rows) == 1.0
    assert rows[1].per_parameter == 1.0


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
