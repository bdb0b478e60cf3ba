"""Rows of gradients and the inverse Fisher on several devices: the numbers of one, and nothing gathered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import MESH_KINDS, collectives, gathers, mesh_of, placed, recorded

import hessjax as hj

NUM_GRADS = 8
SHAPES = {"bias": (24,), "kernel": (16, 24), "stack": (3, 16, 8)}  # of `nn.scan`: three layers in one leaf
LEAF = 4 * 384
"""Bytes of a large leaf."""

DATA, MODEL = "data", "model"
LAYOUTS = {
    "data-parallel": (DATA, {"bias": P(), "kernel": P(), "stack": P()}),
    "FSDP": (None, {"bias": P(DATA), "kernel": P(DATA), "stack": P(None, DATA)}),
    "tensor": (None, {"bias": P(MODEL), "kernel": P(None, MODEL), "stack": P(None, None, MODEL)}),
    "mixed": (None, {"bias": P(MODEL), "kernel": P(DATA, MODEL), "stack": P(None, DATA, MODEL)}),
    "data and tensor": (DATA, {"bias": P(), "kernel": P(None, MODEL), "stack": P(None, None, MODEL)}),
}


def normal(seed: int, *lead: int, dtype=np.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype) for name, shape in SHAPES.items()}


def rows_on(mesh, layout: str, grads: dict) -> dict:
    examples, specs = LAYOUTS[layout]
    return placed(grads, mesh, {name: P(examples, *spec) for name, spec in specs.items()})


def vector_on(mesh, layout: str, vector: dict) -> dict:
    return placed(vector, mesh, LAYOUTS[layout][1])


def close(ours, theirs, tol=1e-6) -> None:
    for name, expected in theirs.items():
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(ours[name]), np.asarray(expected), atol=tol * scale, rtol=0)


def check_sent(texts: list[str], layout: str, is_local: bool) -> None:
    """No device gets more than its share of the gradients, twice for blocks that fill up, or one result."""
    examples, specs = LAYOUTS[layout]
    count = {DATA: 4, MODEL: 2, None: 1}
    parts = np.prod([count[name] for name in specs["kernel"]], initial=count[examples])
    share = NUM_GRADS * LEAF / int(parts)
    assert [c for text in texts for c in collectives(text) if c.bytes > 2 * share] == []
    whole = [c for c in gathers(texts, 1) if c.kind == "all-gather"]
    assert [c for c in whole if c.bytes > (2 * LEAF if examples else 0)] == []
    if is_local and not examples:
        assert gathers(texts, LEAF // 2) == []


CASES = [(kind, layout, None) for kind in MESH_KINDS for layout in LAYOUTS]
CASES += [("Auto", layout, 5) for layout in ("data-parallel", "FSDP", "tensor", "data and tensor")]
CASES += [("Auto", "mixed", 4), ("Explicit", "mixed", 5)]


@pytest.mark.parametrize(("kind", "layout", "block_size"), CASES)
def test_inverse_fisher(kind, layout, block_size):
    """Applied, its diagonal, and with more gradients; blocks of 5 do not fit what devices hold."""
    grads, more, v = normal(0, NUM_GRADS), normal(1, NUM_GRADS), normal(2)
    mesh = mesh_of(kind)
    rows, others = (rows_on(mesh, layout, block) for block in (grads, more))
    vector = vector_on(mesh, layout, v)
    one = hj.inverse_fisher(grads, 0.1, block_size)
    with recorded() as texts:
        ours = hj.inverse_fisher(rows, 0.1, block_size)
        found = ours.apply(vector), ours.diagonal()
        both = ours.add(others).apply(vector)
    check_sent(texts, layout, block_size != 5)
    for mine, theirs in zip(found, (one.apply(v), one.diagonal()), strict=True):
        close(mine, theirs)
        assert all(mine[name].sharding.is_equivalent_to(x.sharding, x.ndim) for name, x in vector.items())
    close(both, one.add(more).apply(v))
    assert ours.accurate


@pytest.mark.parametrize("kind", MESH_KINDS)
@pytest.mark.parametrize("block_size", [None, 7, 24])
def test_blocks_and_streams(kind, block_size, x64):
    """Wherever the blocks lie, in float64."""
    grads, v = normal(0, 3 * NUM_GRADS, dtype=float), normal(2, dtype=float)
    mesh = mesh_of(kind)
    parts = [{name: x[i : i + NUM_GRADS] for name, x in grads.items()} for i in range(0, 24, NUM_GRADS)]
    for layout in ("data-parallel", "mixed"):
        ours = hj.inverse_fisher((rows_on(mesh, layout, part) for part in parts), 0.1, block_size)
        one = hj.inverse_fisher(grads, 0.1, block_size)
        close(ours.apply(vector_on(mesh, layout, v)), one.apply(v), 1e-10)
        close(ours.diagonal(), one.diagonal(), 1e-10)
        for index in range(3):
            np.testing.assert_allclose(ours.blocks(index), one.blocks(index), atol=1e-9)
        assert str(ours).splitlines()[:2] == str(one).splitlines()[:2]


def model_fn(params: dict, batch: jax.Array) -> jax.Array:
    return jnp.tanh(batch @ params["kernel"] + params["bias"][None]) @ params["out"]


def loss_fn(params: dict, batch: jax.Array) -> jax.Array:
    return jnp.mean(model_fn(params, batch) ** 2)


WEIGHTS = {"bias": (8,), "kernel": (4, 8), "out": (8, 2)}
# Under FSDP examples and layers share an axis of the mesh: explicit ones ask the loss what that is to mean.
MODEL_LAYOUTS = {"Auto": {"bias": P(), "kernel": P(DATA), "out": P(DATA)}}
MODEL_LAYOUTS["Explicit"] = {"bias": P(), "kernel": P(), "out": P(None, MODEL)}
ROWS = {
    "Auto": {"bias": P(DATA), "kernel": P(None, DATA), "out": P(None, DATA)},
    "Explicit": {"bias": P(DATA), "kernel": P(DATA), "out": P(DATA, None, MODEL)},
}


@pytest.mark.parametrize("kind", MESH_KINDS)
@pytest.mark.parametrize("microbatch", [None, 4])
def test_gradients_of_examples_lie_as_the_params_do(kind, microbatch):
    """A device holds of each gradient what it holds of the params; of shared ones, its own examples."""
    rng = np.random.default_rng(0)
    weights = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in WEIGHTS.items()}
    batch = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    mesh = mesh_of(kind)
    params, examples = placed(weights, mesh, MODEL_LAYOUTS[kind]), placed(batch, mesh, P(DATA))
    found = {
        "grads": hj.per_example_grads(loss_fn, params, examples, microbatch=microbatch),
        "roots": hj.ggn_roots(model_fn, params, examples, likelihood=hj.likelihoods.gaussian),
    }
    one = {
        "grads": hj.per_example_grads(loss_fn, weights, batch),
        "roots": hj.ggn_roots(model_fn, weights, batch, likelihood=hj.likelihoods.gaussian),
    }
    for name, rows in found.items():
        if name == "grads":
            close(rows, one[name])
        specs = ROWS[kind]
        if microbatch and name == "grads":
            specs = {leaf: P(None, *spec[1:]) for leaf, spec in specs.items()}
        laid = placed(one[name], mesh, specs)
        assert all(rows[leaf].sharding.is_equivalent_to(x.sharding, x.ndim) for leaf, x in laid.items())
        ours, theirs = hj.inverse_fisher(rows, 0.1), hj.inverse_fisher(one[name], 0.1)
        close(ours.apply(params), theirs.apply(weights))


SALIENCIES = {
    "joint": (hj.saliencies.obs("joint", 0.1), "unstructured"),
    "joint, blocks": (hj.saliencies.obs("joint", 0.1, 4), "unstructured"),
    "joint, blocks that do not fit": (hj.saliencies.obs("joint", 0.1, 5), "unstructured"),
    "greedy, blocks": (hj.saliencies.obs("greedy", 0.1, 4), "unstructured"),
    "summed": (hj.saliencies.wood_taylor("summed", 0.1), "unstructured"),
    "2:4": (hj.saliencies.obs("joint", 0.1, 4), hj.patterns.n_of_m(2, 4)),
    "filters": (hj.saliencies.obs("none", 0.1), hj.patterns.filters()),
    "diagonal": (hj.saliencies.obd(), "unstructured"),
}


@pytest.mark.parametrize("name", SALIENCIES)
def test_optimal_brain_surgeon(name):
    is_spread = name in ("joint", "joint, blocks that do not fit", "2:4", "filters")
    kind, layout = ("Explicit", "mixed") if is_spread else ("Auto", "data-parallel")
    saliency, pattern = SALIENCIES[name]
    grads, weights = normal(0, NUM_GRADS), normal(2)
    mesh = mesh_of(kind)
    rows, params = rows_on(mesh, layout, grads), vector_on(mesh, layout, weights)
    prune = functools.partial(hj.prune_once, saliency=saliency, sparsity=0.5)
    prune = prune if pattern == "unstructured" else functools.partial(prune, pattern=pattern)
    with recorded() as texts:
        ours = prune(params, grads_fn=lambda at: rows)
    one = prune(weights, grads_fn=lambda at: grads)
    close(ours.params, one.params)
    mine = [text for text in texts if text.split(",")[0].split("jit_")[-1] in ("_scored", "_moved")]
    if pattern == "unstructured":
        check_sent(mine, layout, "fit" not in name)
