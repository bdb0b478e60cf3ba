"""What the notebooks' studies make of their rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from studies import small_samples

import hessjax as hj


def density(nodes, weights):
    nodes, weights = (jnp.asarray([x], jnp.float32) for x in (nodes, weights))
    return hj.SpectralDensity(nodes, weights, jnp.int32(1), jnp.int32(2), jnp.float32(100))


def test_the_distance_of_densities_is_what_has_to_move_over_the_mean_size():
    one, other = density([-1.0, 3.0], [0.5, 0.5]), density([-2.0, 3.0], [0.25, 0.75])
    # A quarter goes from −2 to −1, a quarter from 3 to −1: 5/4, over a mean of |λ| of 11/4.
    assert small_samples.distance(one, other) == pytest.approx(5 / 11)
    assert small_samples.distance(one, one) == 0


def test_the_samples_kept_are_all_there_and_the_truth_first():
    rows, settings = small_samples.read(), small_samples.Settings()
    assert [row["epoch"] for row in rows[:2]] == list(settings.epochs)
    assert all(row["repeat"] < 0 for row in rows[:2])
    found = {(row["repeat"], row["epoch"], row["size"]) for row in rows[2:]}
    assert len(found) == len(rows) - 2 == settings.repeats * len(settings.epochs) * len(settings.sizes)


def test_a_small_sample_is_measured_with_bars_and_put_to_others():
    draw = np.random.default_rng(0)
    data = draw.standard_normal((64, 5)).astype(np.float32), draw.integers(10, size=64)
    settings = small_samples.Settings((1,), num_batches=2, num_probes=2, num_lanczos=4, hidden=3)
    params = small_samples.train(data, settings)[1]
    row, vectors, _ = small_samples.measure(params, data, settings)
    assert min(row["trace_data"], row["top_data"]) > 0
    assert small_samples.held_out(params, vectors, data) == pytest.approx(row["top"], rel=1e-4)
