"""Sets of units: what they count."""

import jax
import jax.numpy as jnp
import pytest

import hessjax as hj
from hessjax.pruning._ranking import units_of


def test_counts_sizes_and_what_may_go():
    scores = {"a": jnp.ones((4, 6)), "b": jnp.ones((8, 2))}
    units = units_of(scores, {"a": hj.patterns.filters(), "b": hj.patterns.n_of_m(1, 4)})
    assert units.counts == [6, 16]
    assert units.sizes == [4, 1]
    assert units.most == [6, 12]
    assert units.num_weights == [24, 16]
    assert units.paths == [["a"], ["b"]]


def test_too_many_weights_for_one_ranking():
    scores = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    for pattern in (hj.patterns.unstructured(), hj.patterns.rows()):
        with pytest.raises(ValueError, match=r"fewer than 2\*\*31 weights, got 2147483648: split by"):
            jax.eval_shape(lambda s, p=pattern: hj.allocations.uniform()(s, 0.5, p), scores)
