"""What is said of memory holds: the formulas of docstrings, and estimates of what nobody could allocate."""

import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj

E = hj.estimators
ONE = {"a": jax.ShapeDtypeStruct((2048, 512), jnp.float32)}
SIZE = 4 * 2048 * 512


def scaled(params, vector):
    return jax.tree.map(jnp.multiply, params, vector)


# Each beside what its docstring says, in vectors: of what it takes besides the params and a product's own.
FORMULAS = {
    "lanczos": (E.lanczos(2, basis_size=20), 20 + 3 + 3),
    "lanczos, blocks": (E.lanczos(2, basis_size=20, block_size=3), 20 + 3 * 3 + 3),
    "lanczos, many pairs": (E.lanczos(9, basis_size=20), 20 + 1 + 18 + 4),
    "lanczos, bfloat16": (E.lanczos(2, basis_size=20, basis_dtype=jnp.bfloat16), 21 / 2 + 4 + 4),
    "power_iteration": (E.power_iteration(3), 7 * 3),
    "hutchinson": (E.hutchinson(), 3),
    "hutchinson_by_leaf": (E.hutchinson_by_leaf(), 3),
    "hutchpp": (E.hutchpp(30), 30 / 3 + 5),
    "xtrace": (E.xtrace(30), 1.6 * 30 + 2),
    "hutchinson_diagonal": (E.hutchinson_diagonal(), 7),
    "hutchinson_frobenius": (E.hutchinson_frobenius(), 3),
    "slq": (E.slq(1, 20), 20 + 6),
    "slq, two vectors": (E.slq(2, 20, reorthogonalise=False, at_once=2), 6 * 2),
    "conjugate_gradient": (E.conjugate_gradient(ONE), 5),
    "minres": (E.minres(ONE), 10),
    "conjugate_gradient, preconditioned": (
        E.conjugate_gradient(ONE, 0.0, preconditioner=jax.tree_util.Partial(scaled, ONE)),
        4 + 1,  # its own
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_peaks_are_those_of_the_docstrings(name):
    estimator, vectors = FORMULAS[name]
    found = hj.memory_estimate(estimator, jax.tree_util.Partial(scaled, ONE), ONE)
    assert (found.total - SIZE) / SIZE == pytest.approx(vectors, rel=0.1)


def test_every_estimator_has_a_formula():
    made = {name for name, x in vars(E).items() if isinstance(x, type) and issubclass(x, E.Estimator)}
    assert made - {"Estimator"} == {name.split(",")[0] for name in FORMULAS}


def network(params, x):
    for weights in params.values():
        x = jnp.tanh(
            jnp.matmul(x, weights, out_sharding=P() if jax.typeof(weights).sharding.spec[0] else None)
        )
    return jnp.mean(x**2)


def test_ten_billion_weights_are_asked_for_and_not_allocated():
    mesh = programs.mesh_of("Explicit")
    place = lambda spec: NamedSharding(mesh, spec)
    like = {
        f"layer {i}": jax.ShapeDtypeStruct((32768, 32768), jnp.float32, sharding=place(P("data", "model")))
        for i in range(10)
    }
    x = jax.ShapeDtypeStruct((8, 32768), jnp.float32, sharding=place(P()))
    each = 4 * 10 * 32768**2 // 8  # 5.4 GB on every one of the eight
    with jax.set_mesh(mesh):
        found = hj.memory_estimate(
            E.slq(1, 20, reorthogonalise=False), jax.tree_util.Partial(scaled, like), like
        )
        gradient = hj.memory_estimate(jax.grad(network), like, x)
    assert found.rows[:2] == (("params and data", each, False), ("state", found.rows[1].bytes, False))
    assert found.rows[1].bytes == pytest.approx(2 * each, rel=0.01)
    assert (
        5 * each < found.total < 7.1 * each
    )  # with many leaves less than with one: its parts come one by one
    assert gradient.total > 2 * each
