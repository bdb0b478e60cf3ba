"""Results in print: numbers with their uncertainty, and shapes where there are no numbers to show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

KEY = jax.random.key(0)
PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda x: jnp.stack([x, 2 * x + 1]), PARAMS)
A = jax.tree_util.Partial(lambda v: jax.tree.map(lambda x, p: x * p, v, PARAMS))
RUN = {"on_device": True}


def loss_fn(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


RESULTS = {
    "Estimate": (lambda: hj.trace(A, KEY, PARAMS, 4, **RUN), "18 ± 0 (4 samples)"),
    "Estimate of a tree": (lambda: hj.diagonal(A, KEY, PARAMS, 4, **RUN), "a/kernel  2×3     2.5      0"),
    "Eigenpairs": (lambda: hj.eigenpairs(A, KEY, PARAMS, k=2, **RUN), "Eigenvalue  Residual  Converged"),
    "SpectralDensity": (
        lambda: hj.spectral_density(A, KEY, PARAMS, 2, 3, **RUN),
        "2         6\n9 parameters.",
    ),
    "Spectrum": (lambda: hj.spectrum(A, KEY, PARAMS, 2, 5, **RUN), "\nTrace "),
    "Solution": (lambda: hj.solve(A, PARAMS, 0.5, **RUN), "Residual  Converged  Products"),
    "InverseFisher": (lambda: hj.inverse_fisher(GRADS, 0.1), "      9       1          2    0.100"),
    "Pruned": (
        lambda: hj.prune_once(PARAMS, hj.saliencies.magnitude(), 0.5),
        "total           6      3    50.00\nNot pruned: 1 of 2 leaves.",
    ),
}


@pytest.mark.parametrize(("call", "text"), RESULTS.values(), ids=RESULTS)
def test_results_are_read_and_inside_jit_show_their_shapes(call, text):
    shown = str(call())
    assert text in shown
    assert "Array(" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    inside = []
    jax.jit(lambda: inside.append(repr(call())))()
    assert inside[0].startswith(type(call()).__name__ + "(")
    assert "Traced" not in inside[0]
    if isinstance(call(), hj.InverseFisher):
        return  # checks its types where it is made, in tests
    for leaf in (None, "text", object()):  # as jax itself fills trees
        str(jax.tree.map(lambda _: leaf, call()))  # noqa: B023


def test_results_on_the_host():
    parts = hj.trace_by_leaf(A, KEY, PARAMS, 4, groups={"all": "*"})
    assert [line.split() for line in str(parts).splitlines()] == [
        ["Leaf", "Trace", "±", "probes", "Share", "%"],
        ["a/kernel", "15", "0.0", "83.3"],
        ["b", "3", "0.0", "16.7"],
        ["all", "18", "0.0", "100.0"],
        ["total", "18", "0.0", "100.0"],
        ["4", "samples."],
    ]
    around = hj.landscape(loss_fn, PARAMS, directions=PARAMS, distances=[-1.0, 0.0, 2.0])
    assert str(around).endswith("Least loss 0 ± inf at -1; largest 522; 1 batch.")
    assert "±" in around._repr_html_()


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (55.2449, 0.41, "55.24 ± 0.41"),
        (1422.6, 517, "1423 ± 517"),
        (1e-20, 1e-22, "1e-20 ± 1e-22"),
        (3e8, 1e3, "3e+08 ± 1e+03"),
        (1.0, np.inf, "1 ± inf"),
        (np.nan, 1.0, "nan ± 1"),
        (0.0, 0.0, "0 ± 0"),
        (-0.5, 1e-9, "-0.5 ± 1e-09"),
    ],
)
def test_the_error_says_how_many_digits_of_the_mean_are_shown(mean, stderr, text):
    for number in (float, np.float64):
        assert str(hj.Estimate(number(mean), number(stderr), 1)) == f"{text} (1 sample)"
    assert (
        str(hj.Estimate(mean, stderr, np.int32(2000), 0.125)) == f"{text}, ± 0.12 of the data (2,000 samples)"
    )


def test_several_results_at_once_and_empty_leaves():
    several = jax.vmap(lambda key: hj.trace(A, key, PARAMS, 4, **RUN))(jax.random.split(KEY, 3))
    assert str(several).startswith("Estimate(mean=float32[3], stderr=float32[3], num_samples=int32[3]")
    empty = hj.Estimate({"a": jnp.zeros((0, 2))}, {"a": jnp.zeros((0, 2))}, 1)
    assert str(empty).splitlines()[1].split() == ["a", "0×2"]
    large = hj.Estimate(jnp.ones(2), jnp.array([3e30, 4e30]), 5)
    assert "3.5e+30" in str(large)
