import jax.numpy as jnp
import numpy as np

from hessjax.estimators._samples import sampling_error


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
