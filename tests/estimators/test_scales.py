"""Every power of two that a loss is multiplied by comes out of the results again, and changes no digit."""

import jax
import numpy as np
import oracles
import pytest

import hessjax as hj

KEY = jax.random.key(0)
POWERS = range(-80, 81, 20)
MATRIX = oracles.symmetric(np.r_[4.0, -2.0, 1.0, np.linspace(-0.1, 0.2, 9)])[0].astype(np.float32)
LIKE = oracles.tree_like(12, np.float32)
FIELDS = {"mean", "stderr", "data_stderr", "values", "residuals", "vectors", "asymmetry", "nodes"}

METHODS = {
    "trace": lambda A: hj.trace(A, KEY, LIKE, 8),
    "trace_by_leaf": lambda A: hj.trace_by_leaf(A, KEY, LIKE, 5, groups={"two": ["matrix", "scalar"]}),
    "hutchpp": lambda A: hj.trace(A, KEY, LIKE, 10, estimator=hj.estimators.hutchpp),
    "xtrace": lambda A: hj.trace(A, KEY, LIKE, 10, estimator=hj.estimators.xtrace),
    "diagonal": lambda A: hj.diagonal(A, KEY, LIKE, 6),
    "diagonal, gaussian": lambda A: hj.diagonal(A, KEY, LIKE, 6, probe=hj.probes.gaussian),
    "frobenius": lambda A: hj.frobenius_norm(A, KEY, LIKE, 6),
    "density": lambda A: hj.spectral_density(A, KEY, LIKE, 2, 5),
    "density without a basis": lambda A: hj.spectral_density(A, KEY, LIKE, 2, 5, reorthogonalise=False),
    "eigenpairs": lambda A: hj.eigenpairs(A, KEY, LIKE, 1, max_matvecs=8),
    "power iteration": lambda A: hj.run(hj.estimators.power_iteration(2), A, KEY, LIKE, max_matvecs=8)[0],
    "spectrum": lambda A: hj.spectrum(A, KEY, LIKE, 1, 6),
}


def numbers(result, factor):
    """All that is in units of the matrix, over the factor; all else as it is."""
    plain = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        name = jax.tree_util.keystr(path)
        in_units = any(f".{field}" in name for field in FIELDS - {"vectors"})
        plain[name] = np.asarray(leaf) / (np.float64(factor) if in_units else 1)
    return plain


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
def test_a_power_of_two_changes_no_digit(method):
    compute = METHODS[method]
    want = numbers(compute(oracles.matvec_of(MATRIX, LIKE)), 1.0)
    for power in POWERS:
        factor = np.float32(2.0**power)
        got = numbers(compute(oracles.matvec_of(MATRIX * factor, LIKE)), factor)
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{name} at 2^{power}")
