import contextlib
import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.tree_util import Partial

import hessjax as hj

KEY = jax.random.key(0)
ESTIMATORS = {
    "lanczos": hj.estimators.lanczos(2, basis_size=8),
    "power_iteration": hj.estimators.power_iteration(3),
    "hutchinson": hj.estimators.hutchinson(),
    "hutchinson_by_leaf": hj.estimators.hutchinson_by_leaf(),
    "hutchinson_diagonal": hj.estimators.hutchinson_diagonal(),
    "hutchpp": hj.estimators.hutchpp(9),
    "xtrace": hj.estimators.xtrace(8),
    "slq": hj.estimators.slq(3, 7),
}


def problem(d=20, dtype=None):
    like = oracles.tree_like(d, dtype)
    matrix, _ = oracles.symmetric(np.linspace(-1, 3, d))
    return oracles.matvec_of(matrix.astype(jnp.result_type(float)), like), like


@pytest.mark.smoke
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_loop_on_the_device_and_inside_jit_gives_what_the_host_gives(x64, name):
    matvec, like = problem()
    host = hj.run(ESTIMATORS[name], matvec, KEY, like, max_matvecs=21)[0]
    device = hj.run(ESTIMATORS[name], matvec, KEY, like, max_matvecs=21, on_device=True)[0]
    inside = jax.jit(lambda a, k: hj.run(ESTIMATORS[name], a, k, like, max_matvecs=21, on_device=True)[0])(
        matvec, KEY
    )
    oracles.close(host, device)
    oracles.close(host, inside)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_loop_of_ones_own_and_a_run_in_two_halves(x64, name):
    matvec, like = problem()
    estimator = ESTIMATORS[name]
    whole = hj.run(estimator, matvec, KEY, like, max_matvecs=18)[0]

    query, update = jax.jit(estimator.query), jax.jit(estimator.update)
    state = estimator.init(KEY, like)
    for _ in range(18 // jax.tree.leaves(query(state))[0].shape[0]):
        state = update(state, jax.vmap(matvec)(query(state)))
    oracles.close(whole, estimator.result(state))

    _, half = hj.run(estimator, matvec, KEY, like, max_matvecs=9)
    kept = jax.tree.map(np.asarray, jax.tree.map(lambda x: x, estimator.result(half)))
    resumed = hj.run(estimator, matvec, KEY, like, max_matvecs=9, state=half)[0]
    oracles.close(whole, resumed, rtol=0, atol=0)
    oracles.close(kept, estimator.result(half), rtol=0, atol=0)  # the state given is still there


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_result_is_readable_before_the_first_product(name):
    _, like = problem()
    estimator = ESTIMATORS[name]
    state = estimator.init(KEY, like)
    jax.block_until_ready(estimator.result(state))
    assert estimator.error(state) == jnp.inf


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bfloat16_params_are_multiplied_as_such_and_summed_in_float32(name):
    matvec, like = problem()
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), like)
    seen = []

    def noting(vector):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(vector))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), matvec(jax.tree.map(jnp.float32, vector)))

    result = hj.run(ESTIMATORS[name], noting, KEY, like, max_matvecs=21)[0]
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} <= {
        jnp.dtype(t) for t in ("float32", "int32", "bool")
    }


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("container", oracles.CONTAINERS)
def test_every_container(name, container):
    params = oracles.CONTAINERS[container](oracles.leaves())
    matvec = hj.hessian(oracles.loss_fn, params, oracles.batch())
    estimator = hj.estimators.slq(2, 5) if name == "slq" else ESTIMATORS[name]
    reference = oracles.leaves()
    same = hj.hessian(oracles.loss_fn, reference, oracles.batch())
    got = hj.run(estimator, matvec, KEY, params, max_matvecs=9)[0]
    want = hj.run(estimator, same, KEY, reference, max_matvecs=9)[0]
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.smoke
def test_other_params_compile_nothing(compilations):
    vector_points = [oracles.leaves(i) for i in range(2)]
    batch, keys = oracles.batch(), [jax.random.key(i) for i in range(2)]

    def everything(params, key):
        matvec = hj.hessian(oracles.loss_fn, params, batch)
        results = (
            hj.eigenpairs(matvec, key, params, 1, max_matvecs=6),
            hj.trace_by_leaf(matvec, key, params, 4),
            hj.spectral_density(matvec, key, params, 1, 4),
            hj.run(hj.estimators.power_iteration(2), matvec, key, params, max_matvecs=6)[0],
        )
        jax.block_until_ready(results)

    everything(vector_points[0], keys[0])
    del compilations[:]
    everything(vector_points[1], keys[1])
    assert not compilations


def test_it_stops_at_the_tolerance_and_callbacks_hear_of_it():
    matvec, like = problem()
    heard = []
    result, _ = hj.run(
        hj.estimators.hutchinson(), matvec, KEY, like, max_matvecs=10_000, tol=0.5, callbacks=[heard.append]
    )
    assert float(result.stderr) <= 0.5
    assert heard[-1].done
    assert not any(progress.done for progress in heard[:-1])
    assert [p.num_matvecs for p in heard] == [5 * (i + 1) for i in range(len(heard))]
    assert heard[-1].error == pytest.approx(float(result.stderr))
    assert heard[-1].target == 0.5
    assert all(progress.error > 0.5 for progress in heard[:-1])
    onto = hj.run(hj.estimators.hutchinson(), matvec, KEY, like, max_matvecs=10_000, tol=0.5, on_device=True)[
        0
    ]
    assert int(onto.num_samples) == int(result.num_samples)


def test_a_relative_tolerance_follows_the_scale():
    matvec, like = problem()
    bigger = Partial(lambda a, v: jax.tree.map(lambda x: 1024 * x, a(v)), matvec)
    counts = [
        int(
            hj.run(hj.estimators.hutchinson(), a, KEY, like, max_matvecs=4000, tol=hj.relative(0.02))[
                0
            ].num_samples
        )
        for a in (matvec, bigger)
    ]
    assert counts[0] == counts[1] < 4000
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`factor` must be positive and finite"):
            hj.relative(factor)


def test_a_callback_that_is_a_context_manager_is_left_even_when_the_matvec_fails():
    log = []

    class Watcher:
        def __enter__(self):
            log.append("enter")

        def __exit__(self, *_):
            log.append("exit")

        def __call__(self, progress):
            log.append(progress.num_matvecs)

    def broken(vector):
        raise RuntimeError("disk on fire")

    _, like = problem()
    with pytest.raises(RuntimeError, match="disk on fire"):
        hj.run(hj.estimators.hutchinson(), broken, KEY, like, max_matvecs=4, callbacks=[Watcher()])
    assert log == ["enter", "exit"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_product_that_is_not_finite_ends_the_run_and_keeps_what_there_was(x64, name):
    matvec, like = problem()
    estimator = ESTIMATORS[name]
    count = [0]

    def fails_at_eight(vector):
        count[0] += 1
        product = matvec(vector)
        return {**product, "vector": product["vector"] * (jnp.nan if count[0] == 8 else 1)}

    with pytest.raises(hj.NonFiniteProductError, match="not finite.*leaf `vector`") as caught:
        hj.run(estimator, fails_at_eight, KEY, like, max_matvecs=18)
    error = caught.value
    assert error.num_matvecs == (6 if name == "power_iteration" else 7)
    assert ("product 8 " if name != "power_iteration" else "one of products 7 to 9 ") in str(error)
    want = hj.run(estimator, matvec, KEY, like, max_matvecs=error.num_matvecs)[0]
    oracles.close(error.result, want)
    rest = hj.run(estimator, matvec, KEY, like, max_matvecs=18 - error.num_matvecs, state=error.state)[0]
    oracles.close(rest, hj.run(estimator, matvec, KEY, like, max_matvecs=18)[0])


def test_not_finite_on_the_device():
    like = jnp.zeros(4)
    nan = Partial(lambda v: v * jnp.nan)
    with pytest.raises(hj.NonFiniteProductError, match=r"product 1 is not finite \(first in leaf `\.`\)"):
        hj.run(hj.estimators.hutchinson(), nan, KEY, like, max_matvecs=4, on_device=True)
    inside = jax.jit(
        lambda k: hj.run(hj.estimators.hutchinson(), nan, k, like, max_matvecs=4, on_device=True)[0]
    )(KEY)
    assert int(inside.num_samples) == 0
    assert jnp.isnan(inside.mean)


def test_an_error_about_a_product_names_the_causes_where_they_are():
    like = {"v": jnp.zeros(3), "w": jnp.ones(2)}
    A = hj.hessian(lambda p: jnp.linalg.norm(p["v"]) + jnp.sum(p["w"] ** 2), like)
    with pytest.raises(hj.NonFiniteProductError) as error:
        hj.trace(A, KEY, like, 3)
    text = str(error.value)
    assert "(first in leaf `v`): is the loss itself finite at these params?" in text
    assert "branch of `where` (under `mode='forward-over-reverse'`; another may pass), or a norm or" in text
    assert "float16" not in text
    short = jnp.full(3, 100.0, jnp.float16)
    with pytest.raises(
        hj.NonFiniteProductError, match="float16 ends at 65504, or an untaken branch of `where`,"
    ):
        hj.trace(lambda v: v * jnp.float16(60000) * jnp.float16(2), KEY, short, 3)


def test_bad_input_is_named_before_any_product():
    matvec, like = problem()

    def never(vector):
        raise AssertionError("multiplied")

    with pytest.raises(TypeError, match=r"(?s)`like` must have real floating-point.*steps: int32"):
        hj.run(hj.estimators.hutchinson(), never, KEY, {"steps": jnp.zeros((), int)}, max_matvecs=1)
    with pytest.raises(ValueError, match="`max_matvecs` must be at least 3, one step's need, got 2"):
        hj.run(hj.estimators.power_iteration(3), never, KEY, like, max_matvecs=2)
    with pytest.raises(ValueError, match="`callbacks` must be empty with `on_device=True`"):
        hj.run(hj.estimators.hutchinson(), never, KEY, like, max_matvecs=2, callbacks=[print], on_device=True)
    with pytest.raises(TypeError, match="pass `on_device=True`"):
        jax.jit(lambda k: hj.trace(matvec, k, like, 3))(KEY)
    with pytest.raises(
        ValueError, match=r"(?s)`matvec\(vector\)` must have the structure of `like`.*vector: missing"
    ):
        hj.run(hj.estimators.hutchinson(), lambda v: {"scalar": v["scalar"]}, KEY, like, max_matvecs=2)


def test_a_matvec_that_closes_over_traced_values():
    like = jnp.zeros(4)
    scaled = jax.jit(lambda c: hj.trace(lambda v: c * v, KEY, like, 3, on_device=True).mean)
    assert float(scaled(2.0)) == 8
    with pytest.raises(TypeError, match="pass `on_device=True`"):
        jax.jit(lambda c: hj.trace(lambda v: c * v, KEY, like, 3).mean)(2.0)


def test_a_second_call_on_the_device_compiles_nothing(compilations):
    points, batch = [oracles.leaves(i) for i in range(2)], oracles.batch()
    for i, params in enumerate(points):
        matvec = hj.hessian(oracles.loss_fn, params, batch)
        jax.block_until_ready(hj.eigenpairs(matvec, KEY, params, 1, max_matvecs=6, on_device=True))
        if i == 0:
            del compilations[:]
    assert not compilations


def test_tolerances_and_states_that_cannot_be():
    matvec, like = problem()
    for tol in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`tol` must be at least 0, or None, got"):
            hj.trace(matvec, KEY, like, 3, tol=tol)
    without_scale = WithoutScale()
    with pytest.raises(ValueError, match="`tol` must be absolute"):
        hj.run(without_scale, matvec, KEY, like, max_matvecs=3, tol=hj.relative(0.1))
    hj.run(without_scale, matvec, KEY, like, max_matvecs=3, tol=0.1)
    _, state = hj.run(hj.estimators.hutchinson(), lambda v: v, KEY, jnp.zeros(4), max_matvecs=3)
    with pytest.raises(ValueError, match=r"`state` must have the structure of `estimator.init"):
        hj.run(hj.estimators.hutchinson(), matvec, KEY, like, max_matvecs=3, state=state)
    with pytest.raises(ValueError, match="must have the structure of `like`"):
        hj.run(
            hj.estimators.power_iteration(2),
            lambda v: {"x": v["scalar"]},
            KEY,
            like,
            max_matvecs=4,
            on_device=True,
        )


@dataclasses.dataclass(frozen=True)
class WithoutScale(hj.estimators.Estimator):
    """As people write one: a frozen dataclass, no pytree, no `scale`."""

    power: int = 1
    method: hj.estimators.Estimator = ESTIMATORS["hutchinson"]

    def init(self, key, like):
        return self.method.init(key, like)

    def query(self, state):
        return self.method.query(state)

    def update(self, state, products):
        return self.method.update(state, products)

    def result(self, state):
        return self.method.result(state).mean ** self.power

    def error(self, state):
        return self.method.error(state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PowerFrom(WithoutScale):
    """What an estimator starts from is a leaf of it, as a pytree."""

    init_only = ("start",)

    start: jax.Array | None = None

    def init(self, key, like):
        return self.start, jnp.int32(0)

    def query(self, state):
        assert self.start is None  # loops are compiled without it
        return state[0][None]

    def update(self, state, products):
        return products[0], state[1] + 1

    def result(self, state):
        return jnp.linalg.norm(state[0])

    error = result


@pytest.mark.parametrize("on_device", [False, True])
def test_an_estimator_that_carries_arrays_compiles_nothing_anew(compilations, on_device):
    A = Partial(jnp.multiply, jnp.arange(1.0, 4.0))
    starts = [jnp.eye(3)[i] for i in range(3)]
    found = []
    for i, start in enumerate(starts):
        estimator = PowerFrom(start=start)
        found.append(float(hj.run(estimator, A, KEY, start, max_matvecs=2, on_device=on_device)[0]))
        if i == 1:
            del compilations[:]
    assert found == [1.0, 4.0, 9.0]
    assert not compilations


@pytest.mark.parametrize("on_device", [False, True])
def test_equal_settings_of_ones_own_estimator_share_compiled_code(compilations, on_device):
    A = Partial(jnp.multiply, jnp.arange(1.0, 4.0))
    found = []
    for power in (1, 1, 2):
        del compilations[:]
        estimator = WithoutScale(power)
        found.append(float(hj.run(estimator, A, KEY, jnp.zeros(3), max_matvecs=2, on_device=on_device)[0]))
        assert bool(compilations) == (len(found) != 2)
    assert found == [6.0, 6.0, 36.0]


def test_what_is_no_estimator_is_refused():
    matvec, like = problem()

    @dataclasses.dataclass(frozen=True)
    class Unhashable(WithoutScale):
        start: Any = dataclasses.field(default_factory=lambda: np.zeros(3))

    with pytest.raises(TypeError, match="`estimator` must hash, got a Unhashable that does not"):
        hj.run(Unhashable(), matvec, KEY, like, max_matvecs=3)
    with pytest.raises(TypeError, match="abstract"):
        hj.estimators.Estimator()


def test_options_of_a_run_reach_it_from_every_one_liner():
    class EnteredError(Exception):
        pass

    @contextlib.contextmanager
    def refusing():
        raise EnteredError
        yield

    A, like = Partial(jnp.multiply, jnp.ones(6)), jnp.zeros(6)
    calls = {
        "eigenpairs": lambda **o: hj.eigenpairs(A, KEY, like, 1, **o),
        "trace": lambda **o: hj.trace(A, KEY, like, **o),
        "trace_by_leaf": lambda **o: hj.trace_by_leaf(A, KEY, like, **o),
        "diagonal": lambda **o: hj.diagonal(A, KEY, like, **o),
        "frobenius_norm": lambda **o: hj.frobenius_norm(A, KEY, like, **o),
        "spectral_density": lambda **o: hj.spectral_density(A, KEY, like, 1, 2, **o),
        "spectral_density_by_leaf": lambda **o: hj.spectral_density_by_leaf(A, KEY, like, 1, 2, **o),
        "spectrum": lambda **o: hj.spectrum(A, KEY, like, 1, 3, **o),
        "solve": lambda **o: hj.solve(A, like, **o),
    }
    for name, call in calls.items():
        with pytest.raises(EnteredError):
            call(callbacks=[refusing()])
        for option in ("calbacks", "state", "max_steps"):
            message = rf"^{name}\(\) got an unexpected keyword argument '{option}'; options of a run are"
            with pytest.raises(TypeError, match=message):
                call(**{option: None})


@pytest.mark.parametrize("on_device", [False, True])
def test_another_tolerance_or_number_of_products_compiles_nothing_anew(compilations, on_device):
    matvec, like = problem(dtype=jnp.float32)
    for tol, most in ((1e-3, 10), (2e-3, 11)):
        del compilations[:]
        estimator = hj.estimators.lanczos(2, basis_size=8, tol=tol)
        hj.run(estimator, matvec, KEY, like, max_matvecs=most, tol=tol, on_device=on_device)
    assert not compilations


AGREEING = {
    "trace": lambda A, like, **k: hj.trace(A, KEY, like, 5, **k),
    "xtrace": lambda A, like, **k: hj.trace(A, KEY, like, 6, estimator=hj.estimators.xtrace, **k),
    "diagonal": lambda A, like, **k: hj.diagonal(A, KEY, like, 5, **k),
    "eigenpairs": lambda A, like, **k: hj.eigenpairs(A, KEY, like, 1, max_matvecs=6, **k).values,
    "solve": lambda A, like, **k: hj.solve(A, like, 1.0, max_matvecs=5, **k).x,
}


@pytest.mark.parametrize("method", AGREEING)
def test_host_and_device_agree_to_ten_units_in_the_last_place(method):
    like = {k: v for k, v in oracles.leaves(dtype=jnp.float32).items() if v.size}
    batch = jax.tree.map(jnp.float32, oracles.batch())
    A = hj.hessian(lambda p, b: oracles.loss_fn({"b_empty": jnp.zeros((0, 2)), **p}, b), like, batch)
    pairs = zip(
        *(jax.tree.leaves(AGREEING[method](A, like, on_device=d)) for d in (False, True)), strict=True
    )
    size = float(hj.frobenius_norm(A, KEY, like, 5).mean)  # what samples cancel from
    for host, device in pairs:
        unit = np.spacing(np.float32(max(size, np.max(np.abs(host)))))
        assert np.all(np.abs(np.float64(host) - np.float64(device)) <= 10 * unit)


@pytest.mark.parametrize("width", [1, 6])
def test_where_nobody_looks_the_host_runs_a_few_steps_ahead_and_no_further(width, monkeypatch):
    matvec, like = problem(20, jnp.float32)
    monkeypatch.setattr(hj._run._drivers._estimator, "error", None)  # nobody asks for it
    alive, most = set(), []

    def multiply(vector):
        product = matvec(vector)
        (first, *_) = jax.tree.leaves(product)
        alive.add(id(first))
        weakref.finalize(first, alive.discard, id(first))
        most.append(len(alive))
        return product

    hj.run(hj.estimators.power_iteration(width), multiply, KEY, like, max_matvecs=20 * width)
    assert len(most) == 20 * width
    assert max(most) <= 3 * width


def test_a_product_that_is_not_finite_ends_a_run_that_nobody_looks_at():
    matvec, like = problem(20, jnp.float32)
    asked = []

    def multiply(vector):
        asked.append(None)
        factor = jnp.nan if len(asked) == 4 else 1.0
        return jax.tree.map(lambda x: factor * x, matvec(vector))

    with pytest.raises(hj.NonFiniteProductError, match="product 4 is not finite") as caught:
        hj.run(hj.estimators.hutchinson(), multiply, KEY, like, max_matvecs=1000)
    assert caught.value.num_matvecs == 3
    assert len(asked) < 10
