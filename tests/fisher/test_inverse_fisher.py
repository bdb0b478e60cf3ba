"""The inverse empirical Fisher against explicit inverses, its identities, streams, updates, bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg

import hessjax as hj


def grads(count: int, seed: int = 0, dtype=None, like: dict | None = None) -> dict:
    """Gradients of 10 weights in a vector, an empty, a scalar and a matrix leaf."""
    rng = np.random.default_rng(seed)
    shapes = {k: v.shape for k, v in oracles.leaves().items()}
    return {k: jnp.asarray(rng.normal(size=(count, *shape)), dtype) for k, shape in shapes.items()}


def cut(block, start, stop):
    return jax.tree.map(lambda x: x[start:stop], block)


def fisher_blocks(block, block_size, batch_size=1) -> list[np.ndarray]:
    count = len(oracles.rows(block))
    leaves = [np.asarray(x, np.float64).reshape(count, -1) for x in jax.tree.leaves(block)]
    if block_size is None:
        leaves, block_size = [np.concatenate(leaves, axis=1)], 10**6
    parts = [x[:, i : i + block_size] for x in leaves for i in range(0, x.shape[1], block_size)]
    return [batch_size / count * part.T @ part for part in parts]


def dense_inverse(block, damping, block_size, batch_size=1) -> np.ndarray:
    F = scipy.linalg.block_diag(*fisher_blocks(block, block_size, batch_size))
    return np.linalg.inv(F + float(damping) * np.eye(len(F)))


def check(inverse, block, block_size, batch_size=1, rtol=1e-8) -> None:
    """`apply`, `diagonal` and `blocks` are those of the explicit inverse."""
    expected = dense_inverse(block, inverse.damping, block_size, batch_size)
    scale = np.abs(expected).max()
    matrix = jax.vmap(lambda e: inverse.apply(unravel(e)))(jnp.eye(10))
    np.testing.assert_allclose(oracles.rows(matrix), expected, rtol=rtol, atol=rtol * scale)
    diagonal = oracles.rows(jax.tree.map(lambda x: x[None], inverse.diagonal()))[0]
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=rtol)
    for index, (start, size) in enumerate(zip((0, 3, 3, 4), (3, 0, 1, 6), strict=True)):
        blocks = np.asarray(inverse.blocks(index))
        assert blocks.shape[1:] == 2 * (min(size, block_size or size),)
        padding = blocks.shape[0] * blocks.shape[1] - size
        part = scipy.linalg.block_diag(
            expected[start : start + size, start : start + size], np.eye(padding) / float(inverse.damping)
        )
        joined = scipy.linalg.block_diag(*blocks) if size else np.zeros((0, 0))
        np.testing.assert_allclose(joined, part, rtol=rtol, atol=rtol * scale)


def unravel(flat) -> dict:
    return jax.flatten_util.ravel_pytree(oracles.leaves(dtype=flat.dtype))[1](flat)


@pytest.mark.parametrize("block_size", [None, 1, 4, 99])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_is_the_explicit_inverse(x64, block_size, count):
    """Root and dual, whole and in blocks, ragged ones included."""
    block = grads(count)
    check(hj.inverse_fisher(block, 0.1, block_size, chunk_size=5, batch_size=3), block, block_size, 3)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("damping", [0.1, hj.relative(0.05)])
def test_stream_and_add_are_as_all_at_once(x64, block_size, damping):
    block = grads(20)
    at_once = hj.inverse_fisher(block, damping, block_size)
    stream = hj.inverse_fisher((cut(block, i, i + 3) for i in range(0, 20, 3)), damping, block_size)
    updated = hj.inverse_fisher(cut(block, 0, 3), damping, block_size).add(cut(block, 3, 11))
    updated = updated.add(cut(block, i, i + 3) for i in range(11, 20, 3))
    for inverse in (at_once, stream, updated):
        assert int(inverse.num_grads) == 20
        np.testing.assert_allclose(inverse.damping, at_once.damping, rtol=1e-12)
        check(inverse, block, block_size)


def test_add_leaves_what_it_was_called_on_alone(x64):
    block = grads(12)
    inverse = hj.inverse_fisher(block, 0.1, 4)
    inverse.add(cut(block, 0, 5))
    check(inverse, block, 4)


def test_relative_damping_refers_to_the_mean_of_the_whole_diagonal(x64):
    block = grads(7)
    inverse = hj.inverse_fisher(block, hj.relative(0.1), 4, batch_size=2)
    diagonal = np.concatenate([np.diag(F) for F in fisher_blocks(block, 4, 2)])
    np.testing.assert_allclose(inverse.damping, 0.1 * diagonal.mean(), rtol=1e-12)
    assert inverse.block_size == 4


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("count", [3, 12])
def test_undoes_the_fisher(x64, block_size, count):
    """F⁻¹(F + λI)v = v, blocks symmetric with positive diagonals, diagonal that of the blocks."""
    block = grads(count)
    inverse = hj.inverse_fisher(block, 1e-3, block_size)
    F = scipy.linalg.block_diag(*fisher_blocks(block, block_size)) + 1e-3 * np.eye(10)
    v = np.random.default_rng(1).normal(size=10)
    back = inverse.apply(unravel(jnp.asarray(F @ v)))
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(back)[0], v, rtol=1e-9)
    blocks = np.asarray(inverse.blocks(-1))
    np.testing.assert_allclose(blocks, blocks.swapaxes(1, 2), rtol=1e-12, atol=1e-12)
    diagonal = np.diagonal(blocks, axis1=1, axis2=2).reshape(-1)[:6]
    np.testing.assert_allclose(np.asarray(inverse.diagonal()["d_kernel"]).reshape(-1), diagonal, rtol=1e-12)


@pytest.mark.parametrize("block_size", [None, 4])
def test_works_inside_jit(x64, block_size):
    block, v = grads(12), oracles.leaves()

    @jax.jit
    def traced(block, more, damping, v):
        inverse = hj.inverse_fisher(block, damping, block_size).add(more)
        return inverse.apply(v), inverse.diagonal(), inverse.blocks(3), inverse.accurate

    *results, accurate = traced(cut(block, 0, 3), cut(block, 3, 12), 0.1, v)
    inverse = hj.inverse_fisher(cut(block, 0, 3), 0.1, block_size).add(cut(block, 3, 12))
    oracles.close(results, [inverse.apply(v), inverse.diagonal(), inverse.blocks(3)])
    assert accurate


def test_streams_work_inside_jit(x64):
    block = grads(20)
    parts = [cut(block, i, i + 4) for i in range(0, 20, 4)]

    @jax.jit
    def traced(parts):
        stream = hj.inverse_fisher(iter(parts), 0.1, 4)
        return stream, hj.inverse_fisher(parts[0], 0.1, 4).add(iter(parts[1:]))

    for inverse in traced(parts):
        check(inverse, block, 4)


@pytest.mark.parametrize("block_size", [None, 8])
def test_few_gradients_of_any_size_have_an_inverse(block_size):
    """A power of two changes no digit, and what the residuals are made of stays within float32."""
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    plain = hj.inverse_fisher(grads, block_size=block_size)
    for scale in (2.0**-53, 2.0**-40, 2.0**40, 2.0**58):
        found = hj.inverse_fisher(scale * grads, block_size=block_size)
        np.testing.assert_allclose(found.diagonal() * scale**2, plain.diagonal(), rtol=1e-6)
        np.testing.assert_allclose(jnp.stack(found.residuals), jnp.stack(plain.residuals), rtol=1e-3)
    with pytest.raises(ValueError, match=r"`damping` must be about [\d.]+e\+\d+ or larger"):
        hj.inverse_fisher(2.0**50 * grads, 1e-6, block_size)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e-12])
def test_streams_that_begin_small_are_as_accurate_as_all_at_once(scale):
    """Under relative damping κ then grows by far."""
    rows = np.random.default_rng(0).normal(size=(96, 64))
    rows[:32] *= scale
    blocks = [jnp.asarray(rows[i : i + 32], jnp.float32) for i in (0, 32, 64)]
    inverse = hj.inverse_fisher(iter(blocks), hj.relative(0.01), 16)
    expected = dense_inverse({"w": jnp.concatenate(blocks)}, inverse.damping, 16)
    matrix = np.asarray(jax.vmap(inverse.apply)(jnp.eye(64)))
    assert np.linalg.norm(matrix - expected) <= 1e-5 * np.linalg.norm(expected)
    if scale:
        updated = hj.inverse_fisher(blocks[0], hj.relative(0.01), 16).add(iter(blocks[1:]))
        assert max(map(jnp.max, updated.residuals)) < 1e-5


def test_streams_may_begin_with_gradients_that_have_no_accurate_inverse():
    """Only the inverse of all of them counts."""
    rows = np.random.default_rng(0).normal(size=(96, 64))
    rows[:32] *= 1e-3
    rows[:32, 1:] = 0
    blocks = [jnp.asarray(rows[i : i + 32], jnp.float32) for i in (0, 32, 64)]
    with pytest.raises(ValueError, match="`damping` must be about"):
        hj.inverse_fisher(blocks[0], hj.relative(1e-5), 16)
    assert bool(hj.inverse_fisher(iter(blocks), hj.relative(1e-5), 16).accurate)


@pytest.mark.parametrize("container", oracles.CONTAINERS.values(), ids=oracles.CONTAINERS)
def test_any_container(container):
    block = grads(3)
    inverse = hj.inverse_fisher(container(block), 0.1, 4)
    result = inverse.apply(container(oracles.leaves()))
    assert jax.tree.structure(result) == jax.tree.structure(container(oracles.leaves()))
    assert jax.tree.structure(inverse.diagonal()) == jax.tree.structure(result)


def test_other_gradients_and_dampings_compile_nothing(compilations):
    hj.inverse_fisher(grads(12), 0.1, 4).add(grads(5)).diagonal()
    more, some = grads(12, seed=1), grads(5, seed=1)
    before = len(compilations)
    hj.inverse_fisher(more, 0.2, 4).add(some).diagonal()
    assert len(compilations) == before


@pytest.mark.parametrize("block_size", [None, 4])
def test_mixed_dtypes_are_summed_in_float32_at_least(block_size):
    """Float32 beside bfloat16; λ = 1e-3 of the largest eigenvalue."""
    block = grads(12, dtype=jnp.float32)
    block["a_bias"] = block["a_bias"].astype(jnp.bfloat16)
    inverse = hj.inverse_fisher(block, 1e-3, block_size)
    assert {x.dtype for x in jax.tree.leaves(inverse.apply(oracles.leaves()))} == {jnp.dtype(jnp.float32)}
    check(inverse, block, block_size, rtol=1e-3 if block_size is None else 3e-5)


@pytest.mark.parametrize(("block_size", "count"), [(64, 256), (64, 48), (None, 48)])
def test_float32_is_near_float64(block_size, count):
    """The bar is 1e-5 at λ = 0.1·mean diag; also for gradients that have a null space, at 1e-5 of it."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(count, 128))
    null = plain - plain.reshape(count, -1, 8).mean(-1).repeat(8, axis=1)
    for rows, damping in ((plain, 0.1), (null, 1e-5)):
        rows = jnp.asarray(rows, jnp.float32)
        inverse = hj.inverse_fisher(rows, damping, block_size)
        expected = dense_inverse({"w": rows}, inverse.damping, block_size)
        matrix = np.asarray(jax.vmap(inverse.apply)(jnp.eye(128)))
        assert np.linalg.norm(matrix - expected) <= 1e-5 * np.linalg.norm(expected)
        assert bool(inverse.accurate)


@pytest.mark.parametrize(("block_size", "count"), [(4, 12), (4, 3), (None, 3)])
def test_damping_too_small_for_the_precision(block_size, count):
    """An error names the block and a damping that does; inside `jit`, NaN and a flag."""
    block = grads(count, dtype=jnp.float32)
    block["d_kernel"] = 1e3 * jnp.ones_like(block["d_kernel"])  # one gradient, again and again
    if block_size is None:
        block = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), block)
    with pytest.raises(ValueError, match="`damping` must be about") as error:
        hj.inverse_fisher(block, 1e-7, block_size)
    assert block_size is None or "of d_kernel" in str(error.value)
    enough = float(re.search(r"about (\S+) or", str(error.value)).group(1))
    assert enough < 1e-6 * 6e6  # eps and ‖F‖, about
    assert bool(hj.inverse_fisher(block, enough, block_size).accurate)
    inverse = jax.jit(lambda block: hj.inverse_fisher(block, 1e-7, block_size))(block)
    assert not inverse.accurate
    assert np.isnan(inverse.diagonal()["d_kernel"]).any()
    assert block_size is None or np.isfinite(inverse.diagonal()["a_bias"]).all()


def test_gradients_all_zero_in_a_block(x64):
    block = grads(12) | {"a_bias": jnp.zeros((12, 3))}
    inverse = hj.inverse_fisher(block, 0.1, 4)
    check(inverse, block, 4)
    np.testing.assert_allclose(inverse.diagonal()["a_bias"], 10.0)
    with pytest.raises(ValueError, match="all zero"):
        hj.inverse_fisher(jax.tree.map(jnp.zeros_like, block), block_size=4)


@pytest.mark.parametrize("block_size", [None, 4])
def test_nan_gradients_name_the_leaf(block_size):
    block = grads(5)
    block["c_scale"] = block["c_scale"].at[2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"in c_scale\."):
        hj.inverse_fisher(block, block_size=block_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "`damping` must be a positive"),
        ({"damping": -1.0}, "`damping` must be a positive"),
        ({"damping": None}, "`damping` must be a positive"),
        ({"damping": float("nan")}, "`damping` must be a positive"),
        ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"grads": iter([])}, "at least one gradient"),
        ({"grads": {"w": jnp.zeros((0, 3))}}, "at least one gradient"),
        ({"grads": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}, "one common leading axis"),
        ({"grads": {"w": jnp.ones(())}}, "one common leading axis"),
        ({"grads": iter([jnp.ones((1, 3)), jnp.ones((1, 4))])}, r"`grads\[1\]` must have the structure"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        hj.inverse_fisher(**({"grads": grads(2)} | arguments))


@pytest.mark.parametrize("name", ["block_size", "chunk_size"])
def test_sizes_are_integers(name):
    with pytest.raises(TypeError, match=name):
        hj.inverse_fisher(grads(2), 0.1, **{name: 2.5})


def test_bad_input_of_the_methods():
    inverse = hj.inverse_fisher(grads(2), 0.1, 4)
    with pytest.raises(TypeError, match="floating-point"):
        hj.inverse_fisher(jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="`vector` must have the structure"):
        inverse.apply({"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match="`grads` must have the structure"):
        inverse.add({"w": jnp.zeros((1, 3))})
    with pytest.raises(IndexError, match="one of 4 leaves, got 4"):
        inverse.blocks(4)


# -- weights ---------------------------------------------------------------------------------------


def _weighted(weights, num=6, d=7):
    """Rows of one leaf, the third not a number where it does not count, and F."""
    rows = np.random.default_rng(3).normal(size=(num, d))
    w = np.asarray(weights, float)
    F = np.einsum("i,ij,ik->jk", w, rows, rows) / w.sum()
    rows[w == 0] = np.nan
    return jnp.asarray(rows), F


@pytest.mark.parametrize("block_size", [None, 7], ids=["whole", "blocks"])
@pytest.mark.parametrize("damping", [0.3, hj.relative(0.1)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e12])
def test_gradients_with_weights(x64, block_size, damping, scale):
    """One block, a stream of unequal blocks with a generator of weights, and one added later."""
    w = np.array([2.0, 1.0, 0.0, 0.0, 5.0, 0.5]) * scale
    rows, F = _weighted(w)
    lam = damping.factor * np.trace(F) / 7 if isinstance(damping, hj.relative(0.1).__class__) else damping
    want = np.linalg.inv(F + lam * np.eye(7))
    options = {"damping": damping, "block_size": block_size}
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    streamed = hj.inverse_fisher((rows[c] for c in cuts), **options, weights=(w[c] for c in cuts))
    added = hj.inverse_fisher(rows[:1], **options, weights=w[:1]).add(rows[1:], weights=jnp.asarray(w[1:]))
    whole = hj.inverse_fisher(rows, **options, weights=w)
    jitted = jax.jit(lambda rows, w: hj.inverse_fisher(rows, **options, weights=w))(rows, jnp.asarray(w))
    for inverse in (whole, streamed, added, jitted):
        np.testing.assert_allclose(inverse.diagonal(), np.diag(want), rtol=1e-9)
        np.testing.assert_allclose(inverse.apply(jnp.arange(7.0)), want @ np.arange(7.0), rtol=1e-9)
        np.testing.assert_allclose(inverse.num_grads, w.sum(), rtol=1e-12)


def test_a_weight_for_a_whole_block(x64):
    """Blocks whose rows count alike, as `ggn_roots` of batches of unequal weight."""
    rows, _ = _weighted(np.ones(6))
    blocks, weights = [rows[:2], rows[2:]], [3.0, 9]
    F = sum(w * b.T @ b / len(b) for b, w in zip(blocks, weights, strict=True)) / 12
    for given in (weights, jnp.array(weights)):
        inverse = hj.inverse_fisher(iter(blocks), 0.1, weights=given)
        np.testing.assert_allclose(
            inverse.apply(jnp.ones(7)), np.linalg.solve(F + 0.1 * np.eye(7), np.ones(7)), rtol=1e-9
        )
    # Of one block alone the total says nothing; and with gradients that count once each it goes on.
    one, other = (hj.inverse_fisher(rows, 0.1, weights=w) for w in (None, 5.0))
    np.testing.assert_allclose(one.diagonal(), other.diagonal(), rtol=1e-9)
    one, other = hj.inverse_fisher(rows, 0.1).add(rows[:2], weights=np.ones(2)), hj.inverse_fisher(rows, 0.1)
    np.testing.assert_allclose(one.diagonal(), other.add(rows[:2]).diagonal(), rtol=1e-9)


def test_wrong_weights():
    rows = jnp.ones((3, 2))
    for weights, words in [
        (np.ones(2), r"`weights` must be one number for each of the 3 gradients, \(3,\), or one for all"),
        ([1, -1, 1], "`weights` must be finite and at least 0"),
        (np.array([1, np.nan, 1]), "`weights` must be finite and at least 0"),
        (np.zeros(3), "at least one gradient that counts, got none"),
    ]:
        with pytest.raises(ValueError, match=words):
            hj.inverse_fisher(rows, 0.1, weights=weights)
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be one number for each of the 3"):
        hj.inverse_fisher(iter([rows, rows]), 0.1, weights=[np.ones(3), np.ones(2)])
    with pytest.raises(ValueError, match="`weights` must have one entry for each block"):
        hj.inverse_fisher(iter([rows, rows]), 0.1, weights=[np.ones(3)])
    with pytest.raises(TypeError, match="`weights` must be an iterable like the stream of blocks"):
        hj.inverse_fisher(iter([rows, rows]), 0.1, weights=2.0)
