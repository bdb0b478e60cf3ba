"""Exact ranks against numpy's stable argsort; sets of units, and what they count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax.pruning._ranking import ordered_keys, smallest
from hessjax.pruning._units import units_of


def reference(arrays, n):
    flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])
    marked = np.zeros(flat.size, bool)
    marked[np.argsort(flat, kind="stable")[:n]] = True
    return np.split(marked, np.cumsum([a.size for a in arrays])[:-1])


def select(arrays, n):
    return smallest(ordered_keys(arrays), n)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("n", [0, 1, 17, 44, 45])
def test_agrees_with_a_stable_argsort(dtype, n):
    rng = np.random.default_rng(n)
    # Rounded, so that ties abound; signed, with both zeros and infinities.
    arrays = [jnp.asarray(np.round(rng.normal(size=s), 1), dtype) for s in [(4, 5), (0, 3), (), (3, 4, 2)]]
    arrays[0] = arrays[0].at[0, :4].set(jnp.array([-0.0, 0.0, -jnp.inf, jnp.inf], dtype))
    for got, want in zip(select(arrays, n), reference(arrays, n), strict=True):
        np.testing.assert_array_equal(np.ravel(got), want)


def test_float64_is_ranked_in_full(x64):
    close = 1.0 + jnp.arange(8, dtype=jnp.float64)[::-1] * 1e-15  # one value in float32
    np.testing.assert_array_equal(select([close], 3)[0], [False] * 5 + [True] * 3)


def test_the_number_may_be_traced_and_nothing_compiles_anew(compilations):
    scores = [jnp.arange(12.0).reshape(3, 4)]
    f = jax.jit(select)
    f(scores, np.int32(3))
    del compilations[:]
    for n in range(13):
        assert sum(int(np.asarray(m).sum()) for m in f(scores, np.int32(n))) == n
    assert not compilations


def test_nan_is_the_smallest():
    np.testing.assert_array_equal(select([jnp.array([-jnp.inf, jnp.nan, 0.0, -jnp.nan])], 2)[0], [0, 1, 0, 1])


@pytest.mark.parametrize("shape", [(70_000,), (70_000, 2), (2, 70_000), (65_535,), (65_536,)])
def test_long_axes_are_counted_in_full(shape):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    for n in (scores.size - 1, scores.size):
        (got,) = select([scores], n)
        np.testing.assert_array_equal(np.ravel(got), reference([scores], n)[0])


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
