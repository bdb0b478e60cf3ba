import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)
BLOCKS = {"a_bias": slice(0, 3), "c_scale": slice(3, 4), "d_kernel": slice(4, 10)}


@pytest.mark.smoke
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_every_leaf_has_the_density_of_its_block(x64, reorthogonalise):
    """With more steps than a leaf has parameters: the nodes that carry weight are its eigenvalues."""
    params, batch = oracles.leaves(), oracles.batch(30)
    densities = hj.spectral_density_by_leaf(
        hj.hessian(oracles.loss_fn, params, batch), KEY, params, 2, 8, reorthogonalise=reorthogonalise
    )
    matrix = np.asarray(oracles.dense_hessian(oracles.loss_fn, params, batch))
    assert list(densities) == list(BLOCKS)  # the empty leaf has no spectrum
    for path, block in BLOCKS.items():
        density, want = densities[path], np.linalg.eigvalsh(matrix[block, block])
        assert float(density.dimension) == len(want)
        heavy = np.asarray(density.nodes[1])[np.asarray(density.weights[1]) > 1e-6]
        assert np.all(np.min(np.abs(heavy[:, None] - want), axis=1) < 1e-9)
        assert np.all(np.min(np.abs(heavy - want[:, None]), axis=1) < 1e-9)
        v = oracles.rows(jax.tree.map(lambda x: x[None], _probe(params, path)))[0]
        rayleigh = v @ matrix @ v / (v @ v)
        np.testing.assert_allclose(
            jnp.sum(density.weights[1] * density.nodes[1]), rayleigh, rtol=1e-9, atol=1e-12
        )


def _probe(params, path):
    """The second start vector of a leaf."""
    index = list(params).index(path)
    v = hj.probes.gaussian(jax.random.fold_in(jax.random.fold_in(KEY, index), 1), params)
    return {k: x if k == path else jnp.zeros_like(x) for k, x in v.items()}


def test_leaves_share_what_is_compiled_and_on_device_is_the_same(compilations):
    batch = oracles.batch(30)

    def densities(seed, **options):
        params = oracles.leaves(seed)
        return hj.spectral_density_by_leaf(
            hj.hessian(oracles.loss_fn, params, batch), KEY, params, 2, 4, at_once=2, **options
        )

    for options in ({}, {"on_device": True}):
        jax.block_until_ready(densities(0, **options))
        del compilations[:]
        jax.block_until_ready(densities(1, **options))
        assert not compilations
    oracles.close(densities(0), densities(0, on_device=True), rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(
        ValueError, match="`num_matvecs` must be at most 10, the number of parameters, got 99"
    ):
        hj.spectral_density_by_leaf(lambda v: v, KEY, oracles.leaves(), 1, 99)
    twice = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}}
    with pytest.raises(ValueError, match="a path of its own for every leaf, got a/b, a/b"):
        hj.spectral_density_by_leaf(lambda v: v, KEY, twice, 1, 2)
