"""States over several devices: born where the params lie and kept there, and nothing is gathered."""

import collections

import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import hessjax as hj

KEY = jax.random.key(7)
LENGTH = 48

# A leaf for each way to be laid out: FSDP, tensor parallel, both, data parallel, over all devices.
SHAPES = {"rows": (24, 36), "columns": (20, 44), "both": (28, 52), "whole": (12, 12), "bias": (LENGTH,)}
SPECS = {
    "rows": P("data"),
    "columns": P(None, "model"),
    "both": P("model", "data"),
    "whole": P(),
    "bias": P(("data", "model")),
}


def diagonal():
    """The diagonal of a matrix like which vectors are."""
    starts = {name: 1 + i for i, name in enumerate(SHAPES)}
    return {
        name: starts[name] + jnp.linspace(0, 1, jnp.zeros(shape).size).reshape(shape)
        for name, shape in SHAPES.items()
    }


product = jax.jit(lambda diagonal, vector: jax.tree.map(jnp.multiply, diagonal, vector))


def run(estimator, num_matvecs, **options):
    def call(matvec, like):
        return hj.run(estimator, matvec, KEY, like, max_matvecs=num_matvecs, **options)

    return call


def solve(method, **options):
    def call(matvec, like):
        return hj.solve(matvec, like, 0.1, method=method, max_matvecs=5, **options), None

    return call


def by_leaf(matvec, like):
    return hj.spectral_density_by_leaf(matvec, KEY, like, num_matvecs=3), None


by = hj.estimators
RUNS = {
    "lanczos": run(by.lanczos(1, "largest", basis_size=5), 9),
    "lanczos, blocks": run(by.lanczos(1, "largest", basis_size=6, block_size=2), 12),
    "lanczos, on device": run(by.lanczos(1, "largest", basis_size=5), 9, on_device=True),
    "power_iteration": run(by.power_iteration(2), 6),
    "hutchinson": run(by.hutchinson(), 3),
    "hutchinson_by_leaf": run(by.hutchinson_by_leaf(), 3),
    "hutchinson_diagonal": run(by.hutchinson_diagonal(), 3),
    "hutchinson_frobenius": run(by.hutchinson_frobenius(), 3),
    "hutchpp": run(by.hutchpp(9), 9),
    "xtrace": run(by.xtrace(6), 6),
    "slq": run(by.slq(2, 3), 6),
    "slq, two vectors": run(by.slq(2, 3, reorthogonalise=False, at_once=2), 6),
    "slq, by leaf": by_leaf,
    "conjugate_gradient": solve(by.conjugate_gradient),
    "conjugate_gradient, on device": solve(by.conjugate_gradient, on_device=True),
    "minres": solve(by.minres),
}


def strays(tree, mesh, like):
    """Arrays that are not on the whole mesh, or that are like a leaf and do not lie as it does."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        wanted = NamedSharding(mesh, P(*sharding_of(x.shape, like)))
        is_known = any(wanted.spec)
        if not x.sharding.is_equivalent_to(wanted, x.ndim) and (is_known or not x.is_fully_replicated):
            found.append(f"{jax.tree_util.keystr(path)}: {x.sharding}, not {wanted}")
    return found


def sharding_of(shape, like):
    """That of the leaf whose shape this is, behind one axis of rows or none."""
    for leaf in jax.tree.leaves(like):
        if shape in (leaf.shape, (*shape[:1], *leaf.shape)):
            return *[None] * (len(shape) - leaf.ndim), *leaf.sharding.spec
    return ()


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_a_state_stays_where_the_params_lie(x64, kind, name):
    mesh, alone = programs.mesh_of(kind), diagonal()
    placed = programs.placed(alone, mesh, SPECS)
    with programs.recorded() as texts:
        result, state = RUNS[name](jax.tree_util.Partial(product, placed), placed)
    # Sums over a basis of 8 rows are all that is sent, 64 bytes: no leaf has so few.
    found = [collective for text in texts for collective in programs.collectives(text)]
    assert [c for c in found if c.bytes > 128] == []
    times = collections.Counter(text.split(",", 1)[0] for text in texts)
    assert times["HloModule jit_absorb"] == (0 if "on device" in name else 1)
    assert strays((result, state), mesh, placed) == []
    want, _ = RUNS[name](jax.tree_util.Partial(product, alone), alone)
    if "lanczos" in name:  # what it says of rounding errors is one
        result, want = (pairs._replace(asymmetry=None) for pairs in (result, want))
    assert programs.difference(result, want) < 1e-6


class Longest(hj.estimators.Estimator):
    """Somebody's own, that knows nothing of layouts."""

    def init(self, key, like):
        return hj.probes.gaussian(key, like), jnp.zeros(())

    def query(self, state):
        return jax.tree.map(lambda x: x[None], state[0])

    def update(self, state, products):
        vector = jax.tree.map(lambda x: x[0], products)
        length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(vector)))
        return jax.tree.map(lambda x: x / length, vector), length

    def result(self, state):
        return state[1]

    def error(self, state):
        return jnp.inf


@pytest.mark.parametrize("kind", programs.MESH_KINDS)
def test_so_does_the_state_of_an_estimator_of_ones_own(kind):
    mesh, alone = programs.mesh_of(kind), diagonal()
    placed = programs.placed(alone, mesh, SPECS)
    with programs.recorded() as texts:
        length, state = run(Longest(), 4)(jax.tree_util.Partial(product, placed), placed)
    assert programs.apart(state[0], placed) == []
    assert sum("jit_absorb" in text.split(",", 1)[0] for text in texts) == 1
    want, _ = run(Longest(), 4)(jax.tree_util.Partial(product, alone), alone)
    assert float(length) == pytest.approx(float(want), rel=1e-6)


def test_one_device_keeps_its_arrays_free_to_move():
    like = diagonal()
    _, state = run(by.lanczos(1, "largest", basis_size=5), 6)(jax.tree_util.Partial(product, like), like)
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))


def test_a_state_of_an_earlier_run_goes_on_where_it_lies():
    mesh = programs.mesh_of("Auto")
    placed = programs.placed(diagonal(), mesh, SPECS)
    matvec, half = jax.tree_util.Partial(product, placed), by.hutchinson_diagonal()
    _, state = hj.run(half, matvec, KEY, placed, max_matvecs=2)
    result, more = hj.run(half, matvec, KEY, placed, max_matvecs=2, state=state)
    want, _ = hj.run(half, matvec, KEY, placed, max_matvecs=4)
    assert strays((result, more), mesh, placed) == []
    assert programs.difference(result, want) == 0


def test_params_on_two_meshes_are_named():
    mesh, like = programs.mesh_of("Auto"), diagonal()
    other = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    mixed = programs.placed({**like}, mesh, SPECS) | {
        "bias": jax.device_put(like["bias"], NamedSharding(other, P()))
    }
    with pytest.raises(
        ValueError, match=r"must lie on one mesh.*\n  bias: mesh \{'data': 2\} of devices 0, 1\n"
    ):
        hj.trace(jax.tree_util.Partial(product, like), KEY, mixed)
    with pytest.raises(ValueError, match="`params` must lie on one mesh"):
        hj.hessian(lambda params: jnp.sum(params["bias"]), mixed)
    # What is bound to no device goes where the others are.
    loose = programs.placed(like, mesh, SPECS) | {"bias": like["bias"]}
    assert float(hj.trace(jax.tree_util.Partial(product, like), KEY, loose, 2).mean) > 0
