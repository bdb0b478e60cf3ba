"""Square roots of the Fisher against the Fisher itself."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj


def model_fn(params, x):
    """Three outputs, also for inputs with a further axis."""
    return params["scale"] * jnp.tanh(x @ params["kernel"])


PARAMS = {"kernel": np.random.default_rng(0).normal(size=(2, 3)), "scale": 1.5}


def example(*shape):
    return jax.tree.map(jnp.asarray, PARAMS), jnp.asarray(np.random.default_rng(1).normal(size=(*shape, 2)))


@pytest.mark.parametrize("likelihood", [hj.likelihoods.categorical, hj.likelihoods.gaussian])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_ggn_roots_square_to_the_fisher(x64, likelihood, shape):
    params, x = example(*shape)
    rows = oracles.rows(hj.ggn_roots(model_fn, params, x, likelihood=likelihood))
    expected = oracles.matrix_of(hj.fisher(model_fn, params, x, likelihood=likelihood), params)
    assert len(rows) == 3 * np.prod(shape)
    np.testing.assert_allclose(rows.T @ rows / len(rows), expected, rtol=1e-9, atol=1e-12)


def test_temperature_changes_the_probabilities_alone(x64):
    params, x = example(4)
    rows = oracles.rows(hj.ggn_roots(model_fn, params, x, temperature=4.0))
    J = np.asarray(jax.vmap(lambda x: _jacobian(params, x))(x))
    p = np.asarray(jax.nn.softmax(model_fn(params, x) / 4))
    H = np.stack([np.diag(p) - np.outer(p, p) for p in p])
    expected = np.einsum("nci,ncd,ndj->ij", J, H, J) / 4
    np.testing.assert_allclose(rows.T @ rows / len(rows), expected, rtol=1e-9, atol=1e-12)


def _jacobian(params, x):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.jacobian(lambda v: model_fn(unravel(v), x[None])[0])(flat)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_sampled_grads_are_unbiased(x64, shape):
    """The mean over 4000 draws is within six standard errors of the Fisher."""
    params, x = example(*shape)
    block = hj.sampled_grads(model_fn, params, x, key=jax.random.key(0), num_samples=4000)
    squares = np.einsum("ni,nj->nij", rows := oracles.rows(block), rows)
    expected = oracles.matrix_of(
        hj.fisher(model_fn, params, x, likelihood=hj.likelihoods.categorical), params
    )
    stderr = squares.std(axis=0) / np.sqrt(len(rows))
    assert (np.abs(squares.mean(axis=0) - expected) <= 6 * stderr + 1e-9).all()


def test_give_an_inverse_fisher(x64):
    params, x = example(6)
    batches = (hj.ggn_roots(model_fn, params, part) for part in (x[:2], x[2:]))
    inverse = hj.inverse_fisher(batches, 0.1)
    A = hj.fisher(model_fn, params, x, likelihood=hj.likelihoods.categorical)
    product = jax.tree.map(lambda y, v: y + 0.1 * v, A(params), params)
    oracles.close(inverse.apply(product), params)


def test_bad_input():
    params, x = example(2)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        hj.sampled_grads(model_fn, params, x, key=jax.random.key(0), num_samples=0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`temperature` must be positive and finite, got"):
            hj.ggn_roots(lambda w, x: x @ w, jnp.ones((2, 2)), jnp.ones((3, 2)), temperature=temperature)
    with pytest.raises(TypeError, match="`model_fn` must return one array"):
        hj.ggn_roots(lambda p, x: {"out": x}, params, x)
    with pytest.raises(ValueError, match="no arguments"):
        hj.ggn_roots(model_fn, params)
