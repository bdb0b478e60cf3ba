import jax
import jax.numpy as jnp
import numpy as np

import hessjax as hj
from hessjax.estimators._samples import hashed_signs, sampling_error


def test_equal_batches_give_the_textbook_error(x64):
    x = np.random.default_rng(0).normal(size=(7, 3))
    got = sampling_error(jnp.asarray(x), jnp.full(7, 5.0))
    np.testing.assert_allclose(got, x.std(axis=0, ddof=1) / np.sqrt(7), rtol=1e-12)


def test_ragged_batches_estimate_the_error_of_the_mean_over_examples(x64):
    rng, sizes = np.random.default_rng(0), np.array([40, 40, 40, 3])
    ends = np.cumsum(sizes)
    errors = []
    for _ in range(2000):
        examples = rng.normal(size=sizes.sum())
        means = [examples[b - n : b].mean() for b, n in zip(ends, sizes, strict=True)]
        errors.append(float(sampling_error(jnp.asarray(means), jnp.asarray(sizes, float))) ** 2)
    np.testing.assert_allclose(np.mean(errors), 1 / sizes.sum(), rtol=0.05)


def test_one_batch_says_nothing():
    assert np.isinf(sampling_error(jnp.ones(1), jnp.ones(1)))


def test_signs_are_the_same_without_jit():
    like = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    with jax.disable_jit():  # a loop then counts in Python's integers
        eager = jax.lax.fori_loop(3, 4, lambda i, _: hashed_signs(i, like), like)
    compiled = jax.lax.fori_loop(3, 4, lambda i, _: hashed_signs(i, like), like)
    for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_array_equal(x, y)


def test_eigenpairs_without_jit(untyped):
    A = jax.tree_util.Partial(jnp.multiply, jnp.arange(1.0, 4.0))
    with jax.disable_jit():
        values = hj.eigenpairs(A, jax.random.key(0), jnp.ones(3), k=1, which="largest").values
    np.testing.assert_allclose(values, [3.0], rtol=1e-5)
