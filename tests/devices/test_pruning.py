"""Pruning on meshes: the masks of one device, in the params' layouts, without moving a leaf."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from programs import MESH_KINDS, gathers, mesh_of, placed, recorded

import hessjax as hj

KEY = jax.random.key(9)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"in": {"kernel": normal(0, 32, 64), "bias": normal(1, 64)}, "out": {"kernel": normal(2, 64, 16)}}
GRADS = jax.tree.map(lambda x: jnp.sin(3 * x) / 10, PARAMS)
LEAST = 64 * 16  # bytes of the smaller kernel's mask
BATCH = normal(3, 16, 32)


def specs(kernel_in, bias, kernel_out):
    return {"in": {"kernel": kernel_in, "bias": bias}, "out": {"kernel": kernel_out}}


LAYOUTS = {
    "data-parallel": specs(P(), P(), P()),
    "fsdp": specs(P("data", None), P(), P("data", None)),
    "tensor": specs(P(None, "model"), P("model"), P("model", None)),
    "mixed": specs(P("data", "model"), P("model"), P("model", "data")),
}

ATTENTION = {
    name: {"kernel": normal(i, *((4, 8, 16) if name == "out" else (16, 4, 8)))}
    for i, name in enumerate(("query", "key", "value", "out"))
}
ATTENTION_SPECS = {
    name: {"kernel": P("data", None, "model") if name == "out" else P("model", "data", None)}
    for name in ATTENTION
}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.mean((hidden @ params["out"]["kernel"]) ** 2)


def decay(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def context(mesh):
    """Explicit axes are asked for by `set_mesh`; automatic ones need nothing."""
    is_explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext()


def layout(x):
    """The mesh axes along each axis, up to the last that has one."""
    spec = list(x.sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return spec


def assert_laid_out_as(params, tree):
    """Every leaf of the shape of a kernel lies where that does."""
    want = {x.shape: layout(x) for x in jax.tree.leaves(params) if x.ndim > 1}
    for x in jax.tree.leaves(tree):
        if jnp.shape(x) in want:
            assert layout(x) == want[x.shape]


P_, A, S = hj.patterns, hj.allocations, hj.saliencies
TICKET = jax.tree.map(lambda x: x > 0, PARAMS)
CASES = {
    "magnitude": {},
    "n_of_m": {"pattern": P_.n_of_m(2, 4)},
    "n_of_m, uniform": {"pattern": P_.n_of_m(2, 4), "allocation": A.uniform()},
    "blocks": {"pattern": P_.blocks((2, 2))},
    "filters": {"pattern": P_.filters()},
    "channels": {"pattern": P_.channels(), "allocation": A.uniform()},
    "rows": {"pattern": P_.rows(), "regrow": False},
    "mixed patterns": {"pattern": {"in/*": P_.blocks((4, 1)), "*": P_.n_of_m(1, 2)}},
    "uniform": {"allocation": A.uniform()},
    "erdos_renyi": {"allocation": A.erdos_renyi()},
    "explicit": {"allocation": A.explicit({"in/*": 0.3, "*": 0.9})},
    "by_curvature": {"allocation": A.by_curvature({"in/kernel": 1.0, "out/kernel": 2.0}, floor=0.5)},
    "threshold": {"sparsity": A.threshold(0.5)},
    "random": {"saliency": S.random(KEY)},
    "gradient": {"saliency": S.gradient()},
    "movement": {"saliency": S.movement()},
    "movement, started": {"saliency": S.movement(optax.sgd(0.1), start=S.from_magnitudes)},
    "soft_movement": {"saliency": S.soft_movement(1.0)},
    "hard_concrete": {"saliency": S.hard_concrete(1.0, KEY, stop=2)},
    "static": {"saliency": S.static(TICKET)},
    "sparse_evolution": {"saliency": S.sparse_evolution(0.3, KEY)},
    "rigl": {"saliency": S.rigl(0.3)},
}
HARD = [("mixed", case) for case in CASES]
EASY = [(layout, case) for layout in LAYOUTS if layout != "mixed" for case in ("magnitude", "n_of_m")]


def trained(case, params, grads):
    """The first state, and params and state after an update with a mask step: one program."""
    options = {"saliency": S.magnitude(), "sparsity": 0.5} | CASES[case]
    tx = hj.prune(optax.sgd(1e-2, momentum=0.9), **options, every=1, start=1)
    first = tx.init(params)
    updates, state = tx.update(grads, first, params)
    return first, state, optax.apply_updates(params, updates)


@functools.cache
def on_one_device(case):
    return jax.jit(functools.partial(trained, case))(PARAMS, GRADS)


@pytest.mark.parametrize("kind", MESH_KINDS)
@pytest.mark.parametrize(("layout", "case"), [*HARD, *EASY])
def test_a_pruned_step_moves_no_leaf_and_keeps_every_layout(layout, case, kind):
    mesh = mesh_of(kind)
    params, grads = (placed(tree, mesh, LAYOUTS[layout]) for tree in (PARAMS, GRADS))
    with context(mesh):
        program = jax.jit(functools.partial(trained, case)).lower(params, grads).compile()
        found = program(params, grads)
    assert gathers([program.as_text()], LEAST) == []
    assert_laid_out_as(params, found)
    expected = on_one_device(case)
    jax.tree.map(np.testing.assert_array_equal, found[1].mask, expected[1].mask)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), found[2], expected[2])


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_heads_are_ranked_where_they_lie(kind):
    mesh, where = mesh_of(kind), hj.patterns.heads()
    allocate = jax.jit(lambda scores: hj.allocations.global_threshold()(scores, 0.5, where))
    scores = placed(ATTENTION, mesh, ATTENTION_SPECS)
    with context(mesh):
        program = allocate.lower(scores).compile()
        found = program(scores)
    assert gathers([program.as_text()], 16 * 4 * 8) == []
    jax.tree.map(np.testing.assert_array_equal, found, allocate(ATTENTION))


CALLS = {
    "prune_once": lambda p, g: hj.prune_once(p, S.magnitude(), 0.5),
    "n_of_m": lambda p, g: hj.prune_once(p, S.magnitude(), 0.5, pattern=P_.n_of_m(2, 4)),
    "filters": lambda p, g: hj.prune_once(p, S.magnitude(), 0.5, pattern=P_.filters(), recomputes=2),
    "gradient": lambda p, g: hj.prune_once(p, S.gradient(), 0.5, grads_fn=lambda _: jax.tree.map(pair, g)),
    "several": lambda p, g: hj.prune_once(p, (S.magnitude(), S.random(KEY)), 0.5, loss_fn=decay),
    "summary": lambda p, g: [(row.nonzeros, row.std, row.zero_rows) for row in hj.summary(p).rows],
    "random": lambda p, g: hj.directions.random(KEY, p),
    "line": lambda p, g: hj.directions.line(p, g),
    "landscape": lambda p, g: hj.landscape(decay, p, directions=[p, g], distances=[-1.0, 0.0, 1.0]).losses,
    "side by side": lambda p, g: (
        hj.landscape(decay, p, directions=g, points_at_once=3, distances=[0.0, 1.0]).losses
    ),
    "sensitivity": lambda p, g: [row.metrics for row in hj.sensitivity(decay, p, [0.5]).rows],
}


def pair(x):
    return jnp.stack([x, 2 * x])


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_what_runs_outside_jit_moves_no_leaf_and_keeps_layouts(kind):
    mesh = mesh_of(kind)
    params, grads = (placed(tree, mesh, LAYOUTS["mixed"]) for tree in (PARAMS, GRADS))
    expected = {name: call(PARAMS, GRADS) for name, call in CALLS.items()}
    with context(mesh), recorded() as programs:
        found = {name: call(params, grads) for name, call in CALLS.items()}
    assert gathers(programs, LEAST) == []
    assert_laid_out_as(params, {name: found[name] for name in found if name != "landscape"})
    for name in CALLS:
        for ours, theirs in zip(*map(jax.tree.leaves, (found[name], expected[name])), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_a_restored_state_keeps_its_layout(kind, tmp_path):
    mesh = mesh_of(kind)
    params, grads = (placed(tree, mesh, LAYOUTS["mixed"]) for tree in (PARAMS, GRADS))
    with context(mesh):
        tx = hj.prune(optax.sgd(1e-2, momentum=0.9), S.movement(), 0.5, every=1, start=1)
        _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        assert_laid_out_as(params, tx.init(params))
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "state", state)
        with ocp.StandardCheckpointer() as saver:
            restored = saver.restore(tmp_path / "state", tx.init(params))
        assert_laid_out_as(params, restored)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        jax.tree.map(np.testing.assert_array_equal, hj.mask_of(restored), hj.mask_of(state))


def watched(params, batches):
    """A training that prunes and watches its curvature, in one `lax.scan`."""
    tx = hj.prune(optax.adam(1e-2), S.movement(), optax.linear_schedule(0.0, 0.5, 3), every=1, start=1)

    def step(carry, batch):
        params, state = carry
        matvec = hj.hessian(loss_fn, params, batch)
        values = hj.eigenpairs(matvec, KEY, params, k=1, max_matvecs=6, on_device=True).values
        mean = hj.trace(matvec, KEY, params, num_probes=2, on_device=True).mean
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), (values, mean)

    return jax.lax.scan(step, (params, tx.init(params)), batches)


@functools.cache
def watched_on_one_device():
    return jax.jit(watched)(PARAMS, BATCH.reshape(2, 8, 32))


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_curvature_and_pruning_in_one_jitted_scan(kind):
    (params, state), curvature = watched_on_one_device()
    assert int(state.num_updates) == 2
    assert float(state.sparsity) == pytest.approx(1 / 3)
    mesh = mesh_of(kind)
    with context(mesh):
        # Explicit axes ask for a layout of every product that sums over shards: of this loss none does.
        there = placed(PARAMS, mesh, specs(P(), P(), P(None, "model")))
        batches = placed(BATCH.reshape(2, 8, 32), mesh, P(None, "data", None))
        (found, _), numbers = jax.jit(watched)(there, batches)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
    jax.tree.map(close, found, params)
    jax.tree.map(close, numbers, curvature)


@pytest.mark.parametrize("kind", MESH_KINDS)
def test_a_stack_divided_by_layers_is_pruned_as_on_one_device(kind):
    params = {
        "layers": {"kernel": jax.random.normal(jax.random.key(3), (4, 8, 16)), "bias": jnp.ones((4, 16))}
    }
    mesh = mesh_of(kind)
    whole = hj.prune_once(params, hj.saliencies.magnitude(), 0.5).mask
    with jax.set_mesh(mesh):
        split = placed(params, mesh, {"layers": {"kernel": P("data", None, "model"), "bias": P("data")}})
        found = hj.prune_once(split, hj.saliencies.magnitude(), 0.5).mask
    assert found["layers"]["kernel"].sharding.spec == P("data", None, "model")
    jax.tree.map(np.testing.assert_array_equal, found, whole)
