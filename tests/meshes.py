"""What is public, called on a small network: for the tests of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hessjax as hj

KEY = jax.random.key(2)


def model_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"]


def output_loss(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


def loss_fn(params, batch):
    return output_loss(model_fn(params, batch), batch)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"in": {"kernel": normal(0, 8, 16), "bias": normal(1, 16)}, "out": {"kernel": normal(2, 16, 8) / 4}}
BATCH = normal(3, 12, 8), normal(4, 12, 8)


def hessian(params, batch):
    return hj.hessian(loss_fn, params, batch)


def ridge(params, batch):
    return hj.weighted_sum([hj.ggn(model_fn, output_loss, params, batch)], shift=1.0)


def inverse(params, batch, block_size):
    return hj.inverse_fisher(hj.per_example_grads(loss_fn, params, batch), damping=0.1, block_size=block_size)


def trained(saliency, params, batch):
    tx = hj.prune(optax.adam(1e-2), saliency, 0.5, every=1, start=1)
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.jit(jax.grad(loss_fn))(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params, hj.mask_of(state)


def once(params, saliency=None, pattern=None, allocation=None, **options):
    return hj.prune_once(
        params,
        hj.saliencies.magnitude() if saliency is None else saliency,
        0.5,
        pattern=hj.patterns.unstructured() if pattern is None else pattern,
        allocation=hj.allocations.global_threshold() if allocation is None else allocation,
        **options,
    ).params


def once_obs(params, batch, block_size):
    grads_fn = lambda at: hj.per_example_grads(loss_fn, at, batch)
    return once(params, hj.saliencies.obs(block_size=block_size), grads_fn=grads_fn)


CALLS = {
    "hessian": lambda p, b: hessian(p, b)(p),
    "hessian, linearized": lambda p, b: hj.hessian(loss_fn, p, b, linearize=True)(p),
    "ggn": lambda p, b: hj.ggn(model_fn, output_loss, p, b)(p),
    "fisher": lambda p, b: hj.fisher(model_fn, p, b, likelihood=hj.likelihoods.categorical)(p),
    "empirical_fisher": lambda p, b: hj.empirical_fisher(loss_fn, p, b)(p),
    "per_example_grads": lambda p, b: hj.per_example_grads(loss_fn, p, b),
    "trace": lambda p, b: hj.trace(hessian(p, b), KEY, p, num_probes=3).mean,
    "trace, on device": lambda p, b: hj.trace(hessian(p, b), KEY, p, num_probes=3, on_device=True).mean,
    "xtrace": lambda p, b: hj.trace(hessian(p, b), KEY, p, 6, estimator=hj.estimators.xtrace).mean,
    "hutchpp": lambda p, b: hj.trace(hessian(p, b), KEY, p, 6, estimator=hj.estimators.hutchpp).mean,
    "diagonal": lambda p, b: hj.diagonal(hessian(p, b), KEY, p, num_probes=3).mean,
    "eigenpairs": lambda p, b: hj.eigenpairs(hessian(p, b), KEY, p, k=2, which="largest").values,
    "power_iteration": lambda p, b: (
        hj.run(hj.estimators.power_iteration(1), hessian(p, b), KEY, p, max_matvecs=10)[0].values
    ),
    "spectral_density": lambda p, b: (
        hj.spectral_density(hessian(p, b), KEY, p, num_probes=2, num_matvecs=4).nodes
    ),
    "solve": lambda p, b: hj.solve(ridge(p, b), p).x,
    "minres": lambda p, b: hj.run(hj.estimators.minres(p), ridge(p, b), KEY, p, max_matvecs=10)[0].x,
    "inverse_fisher": lambda p, b: (inverse(p, b, None).apply(p), inverse(p, b, None).diagonal()),
    "inverse_fisher, blocks": lambda p, b: (inverse(p, b, 8).apply(p), inverse(p, b, 8).diagonal()),
    "landscape": lambda p, b: (
        hj.landscape(loss_fn, p, b, directions=p, distances=jnp.array([0.0, 1.0])).losses
    ),
    "directions.random": lambda p, b: hj.directions.random(KEY, p),
    "prune, magnitude": lambda p, b: trained(hj.saliencies.magnitude(), p, b),
    "prune, movement": lambda p, b: trained(hj.saliencies.movement(), p, b),
    "prune, rigl": lambda p, b: trained(hj.saliencies.rigl(0.3), p, b),
    "uniform": lambda p, b: once(p, allocation=hj.allocations.uniform()),
    "n_of_m": lambda p, b: once(p, pattern=hj.patterns.n_of_m(2, 4)),
    "filters": lambda p, b: once(p, pattern=hj.patterns.filters()),
    "blocks": lambda p, b: once(p, pattern=hj.patterns.blocks((2, 2))),
    "obs": lambda p, b: once_obs(p, b, None),
    "obs, blocks": lambda p, b: once_obs(p, b, 8),
}


def difference(ours, theirs):
    """The largest over all leaves, beside the largest entry of each."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.max(np.abs(a - b))) / max(float(np.max(np.abs(a))), 1e-30) for a, b in pairs)
