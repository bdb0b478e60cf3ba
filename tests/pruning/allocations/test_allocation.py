"""Exact counts, ties by index, floors."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax.pruning._ranking import num_zeros

GLOBAL, UNIFORM = hj.allocations.global_threshold(), hj.allocations.uniform()
JITTED = {f: jax.jit(f) for f in (GLOBAL, UNIFORM)}


def zeros(mask):
    return [int((~np.asarray(m)).sum()) for m in jax.tree.leaves(mask)]


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    shapes = {"a": (7, 9), "b": (5, 4), "c": (3, 3, 2, 4)}
    return {k: jnp.asarray(np.abs(rng.normal(size=s)), jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("traced", [False, True])
def test_counts_are_exact(scores, sparsity, traced):
    s = jnp.float32(sparsity) if traced else sparsity
    call = (lambda f: JITTED[f](scores, s)) if traced else (lambda f: f(scores, s))
    sizes, sparsity = [x.size for x in jax.tree.leaves(scores)], float(s)
    assert sum(zeros(call(GLOBAL))) == round(sparsity * sum(sizes))
    assert zeros(call(UNIFORM)) == [round(sparsity * n) for n in sizes]


def test_global_threshold_is_a_stable_argsort_over_all_leaves():
    tied = {"a": jnp.array([3.0, 1.0, 1.0]), "b": jnp.array([[1.0, 2.0], [2.0, 0.0]])}
    mask = hj.allocations.global_threshold(floor=0)(tied, 3 / 7)
    np.testing.assert_array_equal(mask["a"], [True, False, False])
    np.testing.assert_array_equal(mask["b"], [[True, True], [True, False]])


@pytest.mark.parametrize("size", [1, 5, 10, 2**24 + 3, 25_000_001, 2**31 - 1])
@pytest.mark.parametrize("sparsity", [0.0, 1e-3, 0.1, 0.25, 0.5, 0.9, 0.97, np.nextafter(np.float32(1), 0)])
def test_traced_counts_are_those_of_exact_arithmetic(size, sparsity):
    s = np.float32(sparsity)
    exact = round(Fraction(float(s)) * size)
    assert abs(int(num_zeros(jnp.asarray(s), size)) - exact) <= (0 if s == 0 or s >= 2**-7 else 1)
    assert num_zeros(0.9, 25_000_000) == 22_500_000


def test_half_rounds_to_even_traced_or_not():
    for size, want in [(1, 0), (3, 2), (5, 2), (7, 4)]:
        assert num_zeros(0.5, size) == want == int(num_zeros(jnp.float32(0.5), size))


def test_traced_float64(x64):
    assert int(num_zeros(jnp.asarray(0.9), 25_000_000)) == 22_500_000


@pytest.mark.parametrize("traced", [False, True])
def test_floors_keep_every_leaf_alive_and_the_total_exact(traced):
    scores = {"weak": jnp.arange(100.0) / 1e6, "strong": 1 + jnp.arange(100.0)}
    s = jnp.float32(0.6) if traced else 0.6

    def call(allocation):
        return jax.jit(allocation)(scores, s) if traced else allocation(scores, s)

    assert zeros(hj.allocations.global_threshold(floor=0)(scores, s)) == [
        20,
        100,
    ]  # leaves in the order strong, weak
    assert zeros(call(hj.allocations.global_threshold(floor=0.25))) == [30, 90]
    assert zeros(call(hj.allocations.global_threshold(floor=0.001))) == [21, 99]
    np.testing.assert_array_equal(
        np.flatnonzero(call(hj.allocations.global_threshold(floor=0.25))["weak"]), range(90, 100)
    )


def test_floor_one_is_uniform_on_equal_leaves(scores):
    scores = {"a": scores["a"], "b": scores["a"] * 100}
    got, want = (
        hj.allocations.global_threshold(floor=1.0)(scores, 2 / 3),
        hj.allocations.uniform()(scores, 2 / 3),
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_uniform_never_takes_the_last_weight():
    small = {"a": jnp.ones((1, 3)), "b": jnp.ones((1, 1)), "c": jnp.ones((0, 2))}
    assert zeros(hj.allocations.uniform()(small, 0.9)) == [2, 0, 0]


def test_mixed_dtypes_are_ranked_together():
    scores = {"a": jnp.array([1.0, 4.0], jnp.bfloat16), "b": jnp.array([2.0, 3.0], jnp.float32)}
    mask = hj.allocations.global_threshold()(scores, 0.5)
    assert mask["a"].tolist() == [False, True]
    assert mask["b"].tolist() == [False, True]


@pytest.mark.parametrize("allocation", [hj.allocations.global_threshold(), hj.allocations.uniform()])
@pytest.mark.parametrize(("value", "hint"), [(1.2, ""), (-0.1, ""), (1.0, ""), (90, "write 0.9")])
def test_sparsity_outside_its_range(scores, allocation, value, hint):
    with pytest.raises(ValueError, match=rf"`sparsity` must be in \[0, 1\), .* got {value}.*{hint}"):
        allocation(scores, value)


def test_bad_floors(scores):
    with pytest.raises(ValueError, match=r"`floor` must be in \[0, 1\].* got 1.5"):
        hj.allocations.global_threshold(floor=1.5)
    with pytest.raises(ValueError, match=r"floors of 3 leaves need, but 0.99 leaves 2 of 155"):
        hj.allocations.global_threshold()(scores, 0.99)


def test_an_unreachable_traced_sparsity_stops_at_the_floors(scores):
    for asked, got in [(0.99, 155 - 3), (-1.0, 0), (jnp.nan, 0)]:
        assert sum(zeros(JITTED[GLOBAL](scores, jnp.float32(asked)))) == got


MAKERS = {
    "global_threshold(floor=0.05)": hj.allocations.global_threshold,
    "global_threshold(floor=0.1)": lambda: hj.allocations.global_threshold(floor=0.1),
    "uniform()": hj.allocations.uniform,
    "erdos_renyi()": hj.allocations.erdos_renyi,
    "explicit(sparsities={'a': 0.5})": lambda: hj.allocations.explicit({"a": 0.5}),
    "by_curvature(curvature={'a': 0.5}, floor=0.05)": lambda: hj.allocations.by_curvature({"a": 0.5}),
    "threshold(level=0.1, least=0.005)": lambda: hj.allocations.threshold(0.1),
}


@pytest.mark.parametrize("text", MAKERS)
def test_equal_settings_are_equal_and_can_be_read(text):
    first, same = MAKERS[text](), MAKERS[text]()
    assert first == same
    assert hash(first) == hash(same)
    assert repr(first) == text
    assert sum(first == make() for make in MAKERS.values()) == 1


def test_curvatures_are_arrays_and_compile_nothing_anew(compilations):
    scores = {"a": jnp.arange(4.0), "b": jnp.arange(4.0)}
    mask = jax.jit(lambda allocation, scores: allocation(scores, 0.5))
    for number in (1.0, 0.01):
        if number < 1:
            del compilations[:]
        found = mask(hj.allocations.by_curvature({"a": jnp.float32(number), "b": jnp.float32(1.0)}), scores)
    assert not compilations
    assert found["a"].tolist() == [False, False, False, True]
