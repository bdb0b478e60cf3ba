import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import hessjax as hj
from hessjax.solvers._system import System

KEY = jax.random.key(0)
METHODS = {"conjugate_gradient": hj.estimators.conjugate_gradient, "minres": hj.estimators.minres}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def problem(eigenvalues, seed=0):
    """A matvec with these eigenvalues, a right-hand side, and both in full."""
    like = oracles.tree_like(len(eigenvalues))
    matrix, _ = oracles.symmetric(eigenvalues, seed)
    b = np.random.default_rng(seed + 1).normal(size=len(eigenvalues))
    dtype = jnp.result_type(float)
    return oracles.matvec_of(matrix.astype(dtype), like), vector(b, like), matrix, b


def vector(b, like):
    return ravel_pytree(like)[1](jnp.asarray(b, jnp.result_type(float)))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.smoke
@both
@pytest.mark.parametrize("damping", [0.0, 0.7, -0.5])
def test_it_solves_what_numpy_solves(x64, method, damping):
    A, rhs, matrix, b = problem(np.linspace(1, 30, 30))
    solution = hj.solve(A, rhs, damping, method=method, tol=hj.relative(1e-12))
    damped = matrix + damping * np.eye(30)
    np.testing.assert_allclose(flat(solution.x), np.linalg.solve(damped, b), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        solution.residual, np.linalg.norm(b - damped @ flat(solution.x)), rtol=1e-2, atol=1e-13
    )
    assert solution.converged
    assert not solution.negative_curvature
    low, high = np.linalg.eigvalsh(damped)[[0, -1]]
    assert low <= float(solution.curvature) <= high


@both
def test_it_ends_after_as_many_steps_as_there_are_eigenvalues(x64, method):
    A, rhs, matrix, b = problem(np.repeat([1.0, 2.0, 5.0, 9.0], 5))
    solution, _ = hj.run(method(rhs), A, KEY, rhs, max_matvecs=4)
    np.testing.assert_allclose(flat(solution.x), np.linalg.solve(matrix, b), rtol=1e-8)
    longer, _ = hj.run(method(rhs), A, KEY, rhs, max_matvecs=12)  # there is nothing more to do
    np.testing.assert_allclose(flat(longer.x), flat(solution.x), rtol=1e-12)
    assert not longer.negative_curvature


@both
def test_the_residual_is_that_of_the_iterate_after_every_product(x64, method):
    A, rhs, matrix, b = problem(np.geomspace(0.1, 9, 12))
    estimator = method(rhs, 0.3)
    state = estimator.init(KEY, rhs)
    residuals = []
    for count in range(9):
        solution = estimator.result(state)
        assert int(solution.num_matvecs) == count
        residuals.append(np.linalg.norm(b - (matrix + 0.3 * np.eye(12)) @ flat(solution.x)))
        np.testing.assert_allclose(solution.residual, residuals[-1], rtol=1e-9)
        np.testing.assert_allclose(estimator.error(state), residuals[-1], rtol=1e-9)
        state = jax.jit(estimator.update)(state, jax.vmap(A)(estimator.query(state)))
    if method is hj.estimators.minres:
        assert np.all(np.diff(residuals) <= 0)


def test_every_iterate_minimises_what_its_method_promises_over_the_krylov_space(x64):
    A, rhs, matrix, b = problem(np.linspace(0.5, 7, 9))
    krylov = np.stack([np.linalg.matrix_power(matrix, i) @ b for i in range(4)], axis=1)
    space, _ = np.linalg.qr(krylov)
    energy = space @ np.linalg.solve(space.T @ matrix @ space, space.T @ b)
    residual = space @ np.linalg.lstsq(matrix @ space, b)[0]
    for method, want in ((hj.estimators.conjugate_gradient, energy), (hj.estimators.minres, residual)):
        got = hj.run(method(rhs), A, KEY, rhs, max_matvecs=4)[0].x
        np.testing.assert_allclose(flat(got), want, rtol=1e-8)


@pytest.mark.smoke
@pytest.mark.parametrize("on_device", [False, True])
def test_an_indefinite_matrix_is_reported_by_cg_and_solved_by_minres(x64, on_device):
    A, rhs, matrix, b = problem(np.linspace(-1, 3, 30))
    found = hj.solve(A, rhs, on_device=on_device)
    assert found.negative_curvature
    assert not found.converged
    assert np.linalg.eigvalsh(matrix)[0] <= float(found.curvature) < 0
    assert np.isfinite(flat(found.x)).all()
    assert int(found.num_matvecs) <= 15 + 1  # it does not spend what is left of 100
    np.testing.assert_allclose(found.residual, np.linalg.norm(b - matrix @ flat(found.x)), rtol=1e-9)

    enough = hj.solve(A, rhs, 1.5, on_device=on_device)  # the other way out
    assert enough.converged
    solution = hj.solve(A, rhs, method=hj.estimators.minres, tol=1e-10, on_device=on_device)
    np.testing.assert_allclose(flat(solution.x), np.linalg.solve(matrix, b), rtol=1e-8, atol=1e-9)
    assert solution.converged
    assert solution.negative_curvature
    assert solution.curvature < 0


def test_cg_rests_at_the_iterate_before_the_negative_direction(x64):
    A, rhs, *_ = problem(np.linspace(-1, 3, 30))
    whole, state = hj.run(hj.estimators.conjugate_gradient(rhs), A, KEY, rhs, max_matvecs=60)
    count = next(
        n
        for n in range(1, 9)
        if hj.run(hj.estimators.conjugate_gradient(rhs), A, KEY, rhs, max_matvecs=n)[0][3]
    )
    before, _ = hj.run(hj.estimators.conjugate_gradient(rhs), A, KEY, rhs, max_matvecs=count - 1)
    oracles.close(whole.x, before.x)
    p = state.direction
    quotient = jnp.vdot(flat(p), flat(A(p))) / jnp.vdot(flat(p), flat(p))
    np.testing.assert_allclose(whole.curvature, quotient, rtol=1e-6)


def test_minres_on_a_singular_system_with_and_without_a_solution(x64):
    eigenvalues = np.r_[np.zeros(5), np.linspace(-1, 3, 25) + 0.01]
    A, rhs, matrix, b = problem(eigenvalues)
    inside = vector(matrix @ b, rhs)
    solution = hj.solve(A, inside, method=hj.estimators.minres, tol=hj.relative(1e-10))
    assert solution.converged
    np.testing.assert_allclose(matrix @ flat(solution.x), matrix @ b, rtol=1e-8, atol=1e-8)

    best = np.linalg.norm(b - matrix @ np.linalg.lstsq(matrix, b, rcond=1e-10)[0])
    stuck = hj.solve(A, rhs, method=hj.estimators.minres, max_matvecs=500)
    assert not stuck.converged
    assert int(stuck.num_matvecs) < 100
    np.testing.assert_allclose(stuck.residual, best, rtol=1e-8)


def test_a_vector_to_start_from(x64):
    A, rhs, matrix, b = problem(np.linspace(1, 9, 20))
    exact = np.linalg.solve(matrix, b)
    for start in (exact + 1e-3, np.zeros(20), 5 * b):
        method = functools.partial(hj.estimators.conjugate_gradient, start=vector(start, rhs))
        solution = hj.solve(A, rhs, method=method, tol=1e-10)
        np.testing.assert_allclose(flat(solution.x), exact, rtol=1e-8)
    near = functools.partial(hj.estimators.conjugate_gradient, start=vector(exact, rhs))
    assert int(hj.solve(A, rhs, method=near).num_matvecs) == 6  # one look, and the residual


@both
def test_nothing_to_solve_for(method):
    A, rhs, *_ = problem(np.linspace(1, 9, 20))
    solution = hj.solve(A, jax.tree.map(jnp.zeros_like, rhs), method=method)
    assert solution.converged
    assert not solution.negative_curvature
    assert float(solution.residual) == 0
    np.testing.assert_array_equal(flat(solution.x), 0)


@both
@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_right_hand_sides_of_any_size_in_float32(method, unit):
    A, rhs, matrix, b = problem(np.linspace(1, 9, 20))
    solution = hj.solve(A, jax.tree.map(lambda x: x * unit, rhs), method=method)
    assert solution.converged
    np.testing.assert_allclose(flat(solution.x) / unit, np.linalg.solve(matrix, b), rtol=1e-3, atol=1e-6)


def in_every_way(A, rhs, method):
    """On the host, on the device, and inside `jit`."""
    solve = functools.partial(hj.solve, method=method, on_device=True)
    return hj.solve(A, rhs, 0.5, method=method), solve(A, rhs, 0.5), jax.jit(solve)(A, rhs, 0.5)


@both
def test_host_device_and_jit_agree(x64, method):
    """In all that they return; in float64, where rounding has no say in the directions they search."""
    A, rhs, *_ = problem(np.geomspace(1, 30, 30))
    host, device, inside = in_every_way(A, rhs, method)
    oracles.close(host, device)
    oracles.close(device, inside)


@both
def test_float32_is_near_float64(method):
    """In the solution and its residual. The curvature is that of a direction that rounding has turned: host
    and device sum in another order, and it differs by up to a tenth."""
    A, rhs, matrix, b = problem(np.geomspace(1, 30, 30))
    damped = matrix + 0.5 * np.eye(30)
    want = np.linalg.solve(damped, b)
    host, device, inside = in_every_way(A, rhs, method)
    oracles.close(host.x, device.x, rtol=1e-4, atol=1e-5)
    oracles.close(device.x, inside.x, rtol=1e-4, atol=1e-5)
    for solution in (host, device, inside):
        np.testing.assert_allclose(flat(solution.x), want, rtol=1e-3, atol=1e-5)
        assert solution.converged
        assert not solution.negative_curvature
        assert 1.5 * (1 - 1e-5) <= float(solution.curvature) <= 30.5
        assert abs(int(solution.num_matvecs) - int(host.num_matvecs)) <= 1
        measured = np.linalg.norm(b - damped @ flat(solution.x).astype(float))
        np.testing.assert_allclose(solution.residual, measured, atol=2e-6)


def test_in_float32_the_residual_returned_is_the_one_that_x_has():
    """The recurrence goes on falling; what counts is the product of x."""
    A, rhs, matrix, b = problem(np.geomspace(1e-4, 1, 30))
    recurrence, _ = hj.run(hj.estimators.conjugate_gradient(rhs), A, KEY, rhs, max_matvecs=300, tol=1e-6)
    solution = hj.solve(A, rhs, max_matvecs=300, tol=1e-6)
    true = np.linalg.norm(b - matrix @ flat(solution.x).astype(float))
    assert float(recurrence.residual) < 1e-6 < true
    np.testing.assert_allclose(solution.residual, true, rtol=0.5)
    assert not solution.converged


@both
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_every_container_with_scalar_and_empty_leaves(method, container):
    params = oracles.CONTAINERS[container](oracles.leaves())
    rhs = oracles.CONTAINERS[container](oracles.leaves(1))
    A = hj.hessian(oracles.loss_fn, params, oracles.batch())
    matrix = oracles.dense_hessian(oracles.loss_fn, oracles.leaves(), oracles.batch())
    got = hj.solve(A, rhs, 10.0, method=method)
    assert jax.tree.structure(got.x) == jax.tree.structure(rhs)
    leaves = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(got.x)])
    want = np.linalg.solve(matrix + 10 * np.eye(10), flat(oracles.leaves(1)))
    np.testing.assert_allclose(leaves, want, rtol=1e-3, atol=1e-5)


@both
def test_mixed_dtypes_are_summed_in_float32(method):
    rhs = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2)}
    A = Partial(lambda v: jax.tree.map(lambda x: 4 * x, v))
    solution = hj.solve(A, rhs, method=method)
    assert {leaf.dtype for leaf in jax.tree.leaves(solution.x)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(flat(solution.x), 0.25, rtol=4e-3)


def test_over_batches_is_the_hessian_of_the_whole_set(x64):
    params, data = oracles.leaves(), oracles.batch(7)
    batches = [jax.tree.map(lambda x: x[:4], data), jax.tree.map(lambda x: x[4:], data)]
    A = hj.over_batches(lambda batch: hj.hessian(oracles.loss_fn, params, batch), batches)
    matrix = oracles.dense_hessian(oracles.loss_fn, params, data)
    solution = hj.solve(A, params, 10.0, tol=1e-10)
    want = np.linalg.solve(matrix + 10 * np.eye(10), flat(params))
    np.testing.assert_allclose(flat(solution.x), want, rtol=1e-8)


@both
@pytest.mark.parametrize("on_device", [False, True])
def test_another_rhs_damping_start_or_params_compiles_nothing(compilations, method, on_device):
    batch = oracles.batch()
    for i in range(3):
        params, rhs = oracles.leaves(i), oracles.leaves(9 + i)
        A = hj.hessian(oracles.loss_fn, params, batch)
        chosen = (
            functools.partial(method, start=oracles.leaves(20 + i))
            if method is hj.estimators.conjugate_gradient
            else method
        )
        solution = hj.solve(A, rhs, 10.0 + i, method=chosen, max_matvecs=7, on_device=on_device)
        jax.block_until_ready(solution)
        if i == 1:
            del compilations[:]
    assert not compilations


@both
def test_a_run_in_two_halves(x64, method):
    A, rhs, *_ = problem(np.geomspace(1, 30, 30))
    whole, _ = hj.run(method(rhs), A, KEY, rhs, max_matvecs=20)
    _, half = hj.run(method(rhs), A, KEY, rhs, max_matvecs=9)
    rest, _ = hj.run(method(rhs), A, KEY, rhs, max_matvecs=11, state=half)
    oracles.close(whole, rest, rtol=0, atol=0)


def test_a_progress_bar_shows_the_residual(capsys):
    A, rhs, *_ = problem(np.linspace(1, 9, 20))
    hj.solve(A, rhs, callbacks=[hj.progress_bar("solving")])
    assert "solving" in capsys.readouterr().out


def test_bad_input():
    A, rhs, *_ = problem(np.linspace(1, 9, 20))

    def never(vector):
        raise AssertionError("multiplied")

    with pytest.raises(ValueError, match="`rhs` must be finite, got NaN or infinity in scalar, vector"):
        hj.solve(never, {**rhs, "scalar": jnp.nan * 1.0, "vector": rhs["vector"] / 0})
    with pytest.raises(TypeError, match=r"(?s)`rhs` must have real floating-point.*n: int32"):
        hj.solve(never, {"n": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match="`damping` must be one finite number, got inf"):
        hj.solve(never, rhs, jnp.inf)
    with pytest.raises(TypeError, match="`damping` must be a number: a matvec alone has no scale"):
        hj.solve(never, rhs, hj.relative(0.1))
    with pytest.raises(ValueError, match="`tol` must be a number or `relative"):
        System(rhs, 0.0, None)
    with pytest.raises(ValueError, match=r"(?s)`start` must have the structure of `rhs`.*vector: missing"):
        hj.estimators.conjugate_gradient(rhs, start={"scalar": rhs["scalar"]})
    with pytest.raises(ValueError, match=r"(?s)`matvec\(vector\)` must have the structure.*vector: missing"):
        hj.solve(lambda v: {"scalar": v["scalar"]}, rhs)
    with pytest.raises(ValueError, match=r"(?s)`rhs` must have the structure of `like`"):
        hj.run(hj.estimators.minres(rhs), A, KEY, jnp.zeros(20), max_matvecs=3)
    with pytest.raises(hj.NonFiniteProductError, match="product 1 is not finite"):
        hj.solve(lambda v: jax.tree.map(lambda x: x * jnp.nan, v), rhs)


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("condition", [1e12, 1e7])
def test_a_curvature_below_rounding_is_not_negative(x64, method, dtype, condition):
    """Positive definite, with eigenvalues that are nothing beside the rounding errors of others."""
    A, rhs, *_ = problem(np.geomspace(1 / condition, 1, 30))
    A, rhs = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (A, rhs))
    solution = hj.solve(A, rhs, method=method, max_matvecs=300, tol=hj.relative(1e-12))
    assert not solution.negative_curvature
    assert np.isfinite(flat(solution.x)).all()
    assert not (solution.converged and solution.singular)


def test_a_singular_matrix_is_called_so(x64):
    A, rhs, *_ = problem(np.r_[np.zeros(5), np.linspace(1, 3, 25)])
    for method in (hj.estimators.conjugate_gradient, hj.estimators.minres):
        solution = hj.solve(A, rhs, method=method)
        assert solution.singular
        assert not solution.converged
        assert not solution.negative_curvature
        assert not hj.solve(A, rhs, 1.0, method=method).singular
