"""What the study of movement keeps of its runs."""

from types import SimpleNamespace

import jax.numpy as jnp
import movement as study
import numpy as np
import optax
import rows

import hessjax as hj

SETTINGS = study.Settings()


def test_the_runs_kept_are_all_there():
    runs = [study.label(*run) for run in study.names(SETTINGS)]
    assert len(set(runs)) == len(runs)
    assert set(rows.load("movement")) == {*runs, *(f"{study.DENSE} | seed {seed}" for seed in study.SEEDS)}


def test_every_run_left_as_many_weights_as_it_was_asked_for():
    sizes = {"widen": 4, "narrow": 4}
    for method, left, taught, seed in study.names(SETTINGS):
        found = rows.load("movement")[study.label(method, left, taught, seed)]["by_layer"]
        counts = np.array([sizes.get(path.split("/")[2], 1) for path in found])
        assert len(found) == 6 * SETTINGS.layers
        np.testing.assert_allclose(counts @ list(found.values()) / counts.sum(), left, rtol=1e-3)


def test_a_mask_is_put_to_the_largest_before_matrix_by_matrix():
    before, params = (
        {"encoder": {"layer_0": {"query": {"kernel": jnp.array(rows_), "bias": jnp.ones(2)}}}}
        for rows_ in ([[3.0, -4.0], [1.0, 2.0]], [[5.0, 0.0], [0.1, 0.9]])
    )
    state = hj.prune(optax.sgd(0.0), hj.saliencies.magnitude(), 0.5, where="encoder/*/kernel").init(params)
    found = study.masks(before, SimpleNamespace(state=state))
    # 5 and 0.9 are kept; −4 and 3 were the largest: one of two.
    path = "encoder/layer_0/query/kernel"
    assert found == {"by_layer": {path: 0.5}, "largest": {path: 0.5}}
