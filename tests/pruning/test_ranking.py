"""Exact ranks against numpy's stable argsort; sets of units, and what they count."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax._core import _counting
from hessjax._core._counting import Total, num_set, num_set_in_all, total, totals_before
from hessjax.pruning._ranking import num_zeros_in_all, ordered_keys, smallest
from hessjax.pruning._units import units_of


def reference(arrays, n):
    flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])
    marked = np.zeros(flat.size, bool)
    marked[np.argsort(flat, kind="stable")[:n]] = True
    return np.split(marked, np.cumsum([a.size for a in arrays])[:-1])


def select(arrays, n):
    return smallest(ordered_keys(arrays), n)[0]


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


def test_too_many_weights_in_one_layer():
    scores = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    for pattern in (hj.patterns.unstructured(), hj.patterns.rows()):
        with pytest.raises(
            ValueError, match=r"fewer than 2\*\*31 weights, got 2147483648 in w: leave it out"
        ):
            jax.eval_shape(lambda s, p=pattern: hj.allocations.uniform()(s, 0.5, p), scores)


@pytest.mark.parametrize("allocation", ["global_threshold", "uniform", "erdos_renyi"])
def test_any_number_of_weights_in_one_tree(allocation):
    scores = {f"w{i}": jax.ShapeDtypeStruct((2**16, 2**14), jnp.float32) for i in range(7)}
    mask = jax.eval_shape(lambda s, x: getattr(hj.allocations, allocation)()(s, x), scores, jnp.float32(0.5))
    assert jax.tree.map(jnp.shape, mask) == jax.tree.map(jnp.shape, scores)


@pytest.mark.parametrize("zeros", [0, 7, 2**31, 5 * 2**32 - 1, 2**35, 2**35 + 12345])
def test_numbers_beyond_32_bits(zeros):
    # A few entries stand for many each, so that nothing large is held.
    rng, sizes = np.random.default_rng(zeros), np.array([2**24, 2**24, 3 * 2**22, 1, 2**25], np.int64)
    arrays = [jnp.asarray(np.round(rng.normal(size=(6, 10)), 1), jnp.float32) for _ in sizes]
    got, numbers = smallest(ordered_keys(arrays), Total.of(zeros), jnp.asarray(sizes, jnp.int32))
    order = np.argsort(np.concatenate([np.ravel(x) for x in arrays]), kind="stable")
    fitting = np.cumsum(np.repeat(sizes, 60)[order]) <= zeros
    want = np.zeros(300, bool)
    want[order[fitting]] = True
    np.testing.assert_array_equal(np.concatenate([np.ravel(x) for x in got]), want)
    np.testing.assert_array_equal(numbers, want.reshape(5, 60).sum(1))


@pytest.mark.parametrize("size", [1000, 2**31 - 1, 2**31, 7 * 10**9, 2**40 + 3])
def test_the_number_of_zeros_is_exact_whatever_the_size(size):
    for sparsity in np.float32([0, 0.25, 1 / 3, 0.5, 0.9, 0.99]):
        found = num_zeros_in_all(jnp.asarray(sparsity), size)
        assert found.exactly() == round(fractions.Fraction(float(sparsity)) * size)


def test_words_carry_and_compare():
    assert num_set_in_all(jnp.ones((70_000, 3), bool).at[5].set(False)).exactly() == 209_997
    assert num_set_in_all(jnp.ones((), bool)).exactly() == 1
    assert jax.eval_shape(num_set, jax.ShapeDtypeStruct((2**16, 2**16), bool)).dtype == jnp.int32
    numbers = np.array([2**31 - 1, 5, 2**31 - 1, 65536, 0, 65535])
    found = total(jnp.asarray(numbers, jnp.int32))
    assert found.exactly() == numbers.sum()
    assert int(found.clipped()) == 2**31 - 1
    assert int(Total.of(70_000).minus(Total.of(70_001)).clipped()) == -1
    assert int(Total.of(3).minus(Total.of(numbers.sum().item())).clipped()) == -(2**31)
    assert bool(Total.of(2**33).least(Total.of(2**33 + 1)).at_most(Total.of(2**33)))
    before = totals_before(jnp.asarray(numbers, jnp.int32))
    words = np.asarray(before.high, np.int64) * 2**16 + np.asarray(before.low)
    np.testing.assert_array_equal(words, np.cumsum(numbers) - numbers)


@pytest.mark.parametrize("n", [0, 999, 5000, 7021])
def test_pieces_count_as_wholes_do(n, monkeypatch):
    rng = np.random.default_rng(n)
    arrays = [jnp.asarray(np.round(rng.normal(size=s), 1), jnp.float32) for s in [(60, 70), (2801,), (4, 5)]]
    want = smallest.__wrapped__(ordered_keys(arrays), n)
    monkeypatch.setattr(_counting, "PIECE", 256)
    monkeypatch.setattr(_counting, "_is_cut", lambda size: size > 1000)
    got = smallest.__wrapped__(ordered_keys(arrays), n)
    for ours, theirs, exact in zip(got[0], want[0], reference(arrays, n), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(np.ravel(ours), exact)
