import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)


def leave_one_out(matrix, tests):
    """The definition: for each test vector (row) the basis of the others' products, from scratch."""
    d, estimates = len(matrix), []
    for i, omega in enumerate(tests):
        others = np.delete(tests, i, axis=0)
        left, values, _ = np.linalg.svd(matrix @ others.T, full_matrices=False)
        Q = left[:, values > 1e-10 * max(np.linalg.norm(matrix), 1e-300)]
        mu = omega - Q @ (Q.T @ omega)
        rest = d - Q.shape[1]
        sample = rest * (mu @ matrix @ mu) / (mu @ mu) if rest else 0.0
        estimates.append(np.trace(Q.T @ matrix @ Q) + sample)
    return np.array(estimates)


def drawn(like, num):
    draws = [hj.gaussian(jax.random.fold_in(KEY, i), like) for i in range(num)]
    return np.stack([np.asarray(jax.flatten_util.ravel_pytree(v)[0]) for v in draws])


SPECTRA = {
    "decaying": 0.7 ** np.arange(30),
    "indefinite": np.linspace(-2, 3, 30),
    "steep": 10.0 ** -np.arange(30),
    "rank 4": np.r_[3, -2, 1, 0.5, np.zeros(26)],
    "rank 1": np.r_[5.0, np.zeros(29)],
    "zero": np.zeros(30),
    "identity": np.ones(30),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SPECTRA)
def test_against_the_definition_after_any_number_of_products(x64, name):
    like = oracles.tree_like(30)
    matrix, _ = oracles.symmetric(SPECTRA[name])
    matvec, state = oracles.matvec_of(matrix, like), None
    estimator = hj.xtrace(20)
    for products in (2, 1, 3, 14, 4):  # the last four are more than there is room for
        estimate, state = hj.run(estimator, matvec, KEY, like, max_matvecs=products, state=state)
        n = min(int(state.num_matvecs) // 2, 10)
        want = leave_one_out(matrix, drawn(like, n))
        assert int(estimate.num_samples) == n
        np.testing.assert_allclose(estimate.mean, want.mean(), rtol=1e-8, atol=1e-10)
        if n > 1:
            stderr = want.std(ddof=1) / np.sqrt(n)
            np.testing.assert_allclose(estimate.stderr, stderr, rtol=1e-8, atol=1e-10)
        else:
            assert np.isinf(estimate.stderr)
