"""One small problem, and its whole report, made once for all tests that read it."""

import jax
import jax.numpy as jnp
import pytest

import hessjax as hj


def small_model(params, batch):
    return jnp.tanh(batch[0] @ params["a"]["kernel"] + params["a"]["bias"][None]) @ params["b"]["kernel"]


def small_loss(params, batch):
    return jnp.mean(jnp.sum((small_model(params, batch) - batch[1]) ** 2, -1)) / 2


def small_problem(scale=0.5):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (32, 3))
    y = jnp.sin(x[:, :2])
    params = {
        "a": {"kernel": scale * jax.random.normal(keys[1], (3, 4)), "bias": jnp.zeros(4)},
        "b": {"kernel": scale * jax.random.normal(keys[2], (4, 2))},
    }
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    return hj.Problem(
        small_loss,
        params,
        batches,
        metric=lambda p: {"error": 2 * small_loss(p, (x, y))},
        model_fn=small_model,
        likelihood=hj.likelihoods.gaussian,
        groups={"first": "a/*"},
        name="a <small> network",
    )


@pytest.fixture(scope="session")
def problem():
    return small_problem()


@pytest.fixture(scope="session")
def whole(problem, tmp_path_factory):
    """`hj.report` with everything in it."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return hj.report(
            problem, folder, top=2, density=True, per_layer=True, landscape=True, layers=True, budget=420
        )
