import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax.training.train_state import TrainState

import hessjax as hj


def matrices(count=2, d=10):
    like = oracles.tree_like(d)
    dense = [oracles.symmetric(np.linspace(-1, 2 + i, d), seed=i)[0] for i in range(count)]
    return [oracles.matvec_of(matrix, like) for matrix in dense], dense, like


# -- sums ----------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_weighted_sum_is_that_of_the_matrices(x64):
    (A, B), (a, b), like = matrices()
    identity = np.eye(10)
    for matvec, want in [
        (hj.weighted_sum([A, B]), a + b),
        (hj.weighted_sum([A, B], [2.0, -0.5], shift=0.3), 2 * a - b / 2 + 0.3 * identity),
        (hj.weighted_sum((A,), np.array([3])), 3 * a),
        (hj.weighted_sum([A], shift=jnp.float32(1)), a + identity),
        (hj.weighted_sum([hj.weighted_sum([A, B]), B], [1, -1]), a),
    ]:
        np.testing.assert_allclose(oracles.matrix_of(matvec, like), want, rtol=1e-12, atol=1e-12)


def test_a_sum_with_parts_that_stream_from_the_host(x64):
    params, data = oracles.leaves(), oracles.batch(6)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 3], data) for i in (0, 3)]
    streamed = hj.over_batches(lambda b: hj.hessian(oracles.loss_fn, params, b), halves)
    damped = hj.weighted_sum([streamed, lambda v: v], [1.0, 0.2], shift=0.1)
    want = oracles.dense_hessian(oracles.loss_fn, params, data) + 0.3 * np.eye(10)
    np.testing.assert_allclose(oracles.matrix_of(damped, params), want, rtol=1e-10, atol=1e-12)
    values = hj.eigenpairs(damped, jax.random.key(0), params, k=1, which="largest").values
    np.testing.assert_allclose(values[0], np.linalg.eigvalsh(want)[-1], rtol=1e-8)
    with pytest.raises(TypeError, match="reads its data on the host"):
        jax.jit(damped)(params)


def test_weights_that_are_traced_and_differentiated(x64):
    (A, B), (a, b), like = matrices()
    vector = jax.tree.map(jnp.ones_like, like)

    @jax.jit
    def form(weights, shift, parts):
        product = hj.weighted_sum(parts, weights, shift)(vector)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(product))

    value, slopes = jax.value_and_grad(form, argnums=(0, 1))([2.0, 3.0], 0.5, [A, B])
    np.testing.assert_allclose(value, 2 * a.sum() + 3 * b.sum() + 5, rtol=1e-12)
    np.testing.assert_allclose(np.array([*slopes[0], slopes[1]]), [a.sum(), b.sum(), 10], rtol=1e-10)


def test_bfloat16_vectors_are_summed_in_float32():
    vector = jnp.ones(3, jnp.bfloat16)
    small = jax.tree_util.Partial(jnp.multiply, jnp.bfloat16(2.0**-9))  # in bfloat16, 1 + 2⁻⁹ is 1
    product = hj.weighted_sum([small] * 4, shift=1.0)(vector)
    assert product.dtype == jnp.bfloat16
    assert product.tolist() == [1.0078125] * 3


@pytest.mark.smoke
def test_other_weights_shifts_parts_and_diagonals_compile_nothing(compilations):
    apply = jax.jit(lambda matvec, vector: matvec(vector))
    vector, batches = oracles.leaves(5), [oracles.batch(seed=i) for i in range(2)]
    points, diagonals = [oracles.leaves(i) for i in range(2)], [oracles.leaves(i) for i in range(2)]
    diagonals = [jax.tree.map(jnp.exp, diagonal) for diagonal in diagonals]
    for i, (params, batch, diagonal) in enumerate(zip(points, batches, diagonals, strict=True)):
        del compilations[:]
        A = hj.hessian(oracles.loss_fn, params, batch)
        matvecs = [hj.weighted_sum([A, A], [1.0 + i, 2.0], shift=i), hj.preconditioned(A, diagonal)]
        jax.block_until_ready([(matvec(vector), apply(matvec, vector)) for matvec in matvecs])
    assert not compilations


def test_sums_that_make_no_sense():
    A = jax.tree_util.Partial(lambda v: v)
    with pytest.raises(ValueError, match="at least one matvec, got none"):
        hj.weighted_sum([])
    with pytest.raises(ValueError, match=r"one number for each of the 2 matvecs, got shape \(3,\)"):
        hj.weighted_sum([A, A], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        hj.weighted_sum([A], 2.0)
    with pytest.raises(TypeError, match="matvecs"):
        hj.weighted_sum(A)
    with pytest.raises(ValueError, match="`shift` must be one number, got shape"):
        hj.weighted_sum([A], shift=jnp.ones(2))
    with pytest.raises(ValueError, match=r"`matvec\(vector\)` must have the structure of `vector`"):
        hj.weighted_sum([lambda v: v[:2]])(jnp.ones(3))


# -- preconditioning -----------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_preconditioned_is_the_dense_one(x64, container):
    make = oracles.CONTAINERS[container]
    params, batch = make(oracles.leaves()), oracles.batch()
    diagonal = make(jax.tree.map(jnp.exp, oracles.leaves(4)))
    root = np.sqrt(jax.flatten_util.ravel_pytree(diagonal)[0])
    dense = oracles.dense_hessian(oracles.loss_fn, params, batch)
    A = hj.hessian(oracles.loss_fn, params, batch)
    for matvec in (A, hj.over_batches(lambda b: A, [batch])):
        got = hj.preconditioned(matvec, diagonal)
        assert jax.tree.structure(got(params)) == jax.tree.structure(params)
        np.testing.assert_allclose(
            oracles.matrix_of(got, params), dense / np.outer(root, root), rtol=1e-10, atol=1e-12
        )
    inside = jax.jit(lambda A, d, v: hj.preconditioned(A, d)(v))(A, diagonal, params)
    oracles.close(inside, hj.preconditioned(A, diagonal)(params), rtol=1e-12, atol=1e-13)


@pytest.mark.promotes  # the matvec
def test_short_vectors_are_scaled_in_float32():
    diagonal = jnp.array([1e-20, 1.0, 1e20])
    A = hj.preconditioned(jax.tree_util.Partial(jnp.multiply, diagonal), diagonal)
    product = A(jnp.ones(3, jnp.bfloat16))
    assert product.dtype == jnp.bfloat16
    np.testing.assert_allclose(product.astype(jnp.float32), 1, rtol=0.02)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_diagonal_that_is_not_positive_names_its_leaf(bad):
    diagonal = {"a": jnp.ones(3), "b": {"c": jnp.array([1.0, bad]), "empty": jnp.zeros((0, 2))}}
    with pytest.raises(ValueError, match="`diagonal` must be positive and finite, but leaf `b/c` is not"):
        hj.preconditioned(lambda v: v, diagonal)


def test_a_vector_unlike_the_diagonal():
    with pytest.raises(ValueError, match=r"(?s)`vector` must have the structure of `diagonal`.*b: missing"):
        hj.preconditioned(lambda v: v, {"a": jnp.ones(3), "b": jnp.ones(2)})({"a": jnp.ones(3)})
    with pytest.raises(TypeError, match="`diagonal` must have real floating-point leaves"):
        hj.preconditioned(lambda v: v, jnp.ones(2, int))


# -- Adam ----------------------------------------------------------------------------------------

NESTS = {
    "adam": lambda: optax.adam(0.1, b2=0.99, eps=1e-3, eps_root=1e-4),
    "adamw in a chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1, b2=0.99, eps=1e-3, eps_root=1e-4)
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(0.1, b2=0.99, eps=1e-3, eps_root=1e-4),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1, b2=0.99, eps=1e-3, eps_root=1e-4), 1),
    "pruned": lambda: hj.prune(
        optax.adam(0.1, b2=0.99, eps=1e-3, eps_root=1e-4),
        hj.saliencies.magnitude(),
        sparsity=0.5,
        where="d_*",
    ),
}


def trained(tx, steps=3):
    """Params, gradients and state after some updates, and the last update."""
    params, batch = oracles.leaves(), oracles.batch()
    state = tx.init(params)
    for _ in range(steps):
        grads = jax.grad(oracles.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


@pytest.mark.promotes  # optax, in a loop of its own
@pytest.mark.parametrize("nest", NESTS)
def test_adam_divides_its_momentum_by_it(x64, nest):
    """update = −lr · m̂ / D, with the D that the state after the update gives."""
    params, updates, state = trained(NESTS[nest]())
    D = hj.adam_preconditioner(state, b2=0.99, eps=1e-3, eps_root=1e-4)
    assert jax.tree.map(jnp.shape, D) == jax.tree.map(jnp.shape, params)
    (adam,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(x, optax.ScaleByAdamState)
    ]
    want = jax.tree.map(
        lambda nu: np.sqrt(nu / (1 - 0.99 ** int(adam.count)) + 1e-4) + 1e-3, jax.device_get(adam.nu)
    )
    oracles.close(D, want, rtol=1e-12)
    if nest in ("adam", "injected", "MultiSteps"):
        step = jax.tree.map(lambda m, d: -0.1 * m / (1 - 0.9 ** int(adam.count)) / d, adam.mu, D)
        oracles.close(updates, step, rtol=1e-6)  # with an injected rate of float32, not closer


@pytest.mark.promotes  # optax, in a loop of its own
def test_leaves_that_adam_does_not_train_are_left_out(x64):
    tx = optax.masked(optax.adam(0.1), {"a_bias": False, "b_empty": False, "c_scale": True, "d_kernel": True})
    params, _, state = trained(tx)
    part = hj.select(params, ["c_*", "d_*"])
    D = hj.adam_preconditioner(state)
    assert jax.tree.structure(D) == jax.tree.structure(part.part)
    A = hj.preconditioned(hj.hessian(part.restrict(oracles.loss_fn), part.part, oracles.batch()), D)
    A(part.part)


def test_above_its_threshold_adam_with_a_frozen_preconditioner_diverges(x64):
    """The top eigenvalue of D^-½ H D^-½ against (2 + 2 b1) / ((1 − b1) lr): 1 % below and 1 % above."""
    h, b1 = jnp.array([3.0, 1.0]), 0.9
    D = jnp.array([2.0, 0.1])
    A = hj.preconditioned(jax.tree_util.Partial(jnp.multiply, h), D)
    top = float(hj.eigenpairs(A, jax.random.key(0), h, k=1, which="largest").values[0])
    assert top == pytest.approx(10)
    for factor, grows in ((0.99, False), (1.01, True)):
        rate = factor * (2 + 2 * b1) / (1 - b1) / top
        w, m = np.ones(2), np.zeros(2)
        for _ in range(4000):
            m = b1 * m + (1 - b1) * np.asarray(h) * w
            w = w - rate * m / np.asarray(D)
        assert (np.abs(w).max() > 1e3) == grows


@pytest.mark.promotes  # optax, in a loop of its own
def test_what_was_injected_is_what_counts(x64):
    """Hyperparameters that the state records are read; those that are given come first."""
    _, _, state = trained(NESTS["injected"]())
    given = hj.adam_preconditioner(state, b2=0.99, eps=1e-3, eps_root=1e-4)
    oracles.close(hj.adam_preconditioner(state), given, rtol=1e-6)  # recorded in float32
    _, _, plain = trained(NESTS["adam"]())
    oracles.close(
        hj.adam_preconditioner(plain), hj.adam_preconditioner(plain, b2=0.999, eps=1e-8, eps_root=0.0)
    )


@pytest.mark.promotes  # optax, in a loop of its own
def test_a_state_from_a_train_state_or_a_checkpoint(x64):
    """As flax keeps it, and as it is read back without a target: in dicts."""
    params, _, state = trained(NESTS["adam"]())
    want = hj.adam_preconditioner(state, b2=0.99)
    held = TrainState(step=3, apply_fn=None, params=params, tx=NESTS["adam"](), opt_state=state)
    oracles.close(hj.adam_preconditioner(held, b2=0.99), want)
    read = flax.serialization.to_state_dict(state)
    oracles.close(hj.adam_preconditioner(read, b2=0.99), want)


def test_states_without_one_adam():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"exactly one Adam \(`optax.ScaleByAdamState`\), found 0 in tuple"):
        hj.adam_preconditioner(optax.sgd(0.1).init(params))
    two = optax.multi_transform({"x": optax.adam(0.1), "y": optax.adamw(0.1)}, {"a": "x", "b": "y"})
    with pytest.raises(
        ValueError, match=r"found 2 in .*: `.*x.*`, `.*y.*`: pass the part that belongs to one"
    ):
        hj.adam_preconditioner(two.init(params))
    with pytest.raises(ValueError, match="one after the first update, got one after 0 updates"):
        hj.adam_preconditioner(optax.adam(0.1).init(params))
    state = optax.ScaleByAdamState(jnp.ones((), int), params, params)
    for wrong in ({"b2": 1.0}, {"b2": -0.1}, {"eps": -1e-8}, {"eps_root": -1.0}):  # NaN in silence
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be "):
            hj.adam_preconditioner(state, **wrong)


def test_adam_is_read_under_strict_promotion():
    nu, count = {"a": jnp.float32(4.0), "b": jnp.bfloat16(1.0)}, jnp.int32(3)
    state = optax.ScaleByAdamState(count, nu, nu)
    D = hj.adam_preconditioner(state, b2=0.5, eps=1.0, eps_root=jnp.float32(0.5))
    for name, value in (("a", 4.0), ("b", 1.0)):
        assert D[name].dtype == jnp.float32
        np.testing.assert_allclose(D[name], np.sqrt(value / (1 - 0.125) + 0.5) + 1, rtol=1e-6)
