"""Eigenpairs, density and trace from one Lanczos run."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._numbers import checked_count
from hessjax._typing import Eigenpairs, Estimate, Key, Matvec, Params, Relative, Tolerance
from hessjax.estimator import run
from hessjax.spectral.density import SpectralDensity
from hessjax.spectral.eigenpairs import convergence_limit, measured
from hessjax.spectral.lanczos import LanczosState, lanczos
from hessjax.spectral.quadrature import quadrature_of_basis


class Spectrum(NamedTuple):
    """What one Lanczos run says of a matrix.

    Attributes:
        eigenpairs: the extreme ones, with measured residuals.
        density: of all eigenvalues, as the start vector sees it; `.bounds(grid)` says how sure that is.
        trace: from the density, with its standard error.
    """

    eigenpairs: Eigenpairs
    density: SpectralDensity
    trace: Estimate


def spectrum(
    matvec: Matvec,
    key: Key,
    like: Params,
    k: int = 5,
    num_matvecs: int = 80,
    *,
    tol: Tolerance = Relative(1e-4),  # noqa: B008 - immutable
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> Spectrum:
    """Both ends of the spectrum, the density between them and the trace, for the price of one of them.

    One Lanczos run from a random start, never restarted: its Ritz vectors are the eigenpairs, its Ritz values
    with the squared first components of T's eigenvectors the density.

    Args:
        matvec: the symmetric linear map.
        key: random key for the start vector.
        like: pytree like the vectors; usually the params.
        k: number of eigenpairs from each end.
        num_matvecs: Lanczos steps: the resolution of the density, and what the eigenpairs have to converge.
        tol: residual below which a pair counts as converged: absolute, or `relative` to the largest absolute
            eigenvalue. All products are made in any case; if `num_matvecs` were too few for a pair, it says
            so, and `eigenpairs` goes on for as long as it takes.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Spectrum(eigenpairs, density, trace)`.

    Raises:
        ValueError: `num_matvecs` below 2k + 1, or above the number of parameters.
        NonFiniteProductError: see `run`.

    Cost:
        `num_matvecs` products, and one for each of the 2k pairs to measure its residual; memory
        (num_matvecs + 6)·d, and three times the pairs' d at the end.

    References:
        Golub & Meurant (2010), Matrices, Moments and Quadrature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.append(jnp.linspace(0.0, 1.0, 999), 9.0))
        >>> pairs, density, trace = hj.spectrum(A, jax.random.key(0), jnp.zeros(1000), k=1, num_matvecs=40)
        >>> round(float(pairs.values[0]), 4), abs(float(trace.mean) - 508.5) < 3 * float(trace.stderr)
        (9.0, True)
    """
    k = checked_count("k", k)
    num_matvecs = checked_count("num_matvecs", num_matvecs, 2 * k + 1, ", one more than the pairs wanted")
    if num_matvecs > (size := _tree.size(like)):
        raise ValueError(
            f"`num_matvecs` must be at most {size}, the number of parameters, got {num_matvecs}."
        )
    estimator = lanczos(k, basis_size=num_matvecs + 1, tol=tol)  # one more than it will fill: no restart
    pairs, state = run(
        estimator, matvec, key, like, max_matvecs=num_matvecs, callbacks=callbacks, on_device=on_device
    )
    pairs = measured(pairs, matvec, like, convergence_limit(estimator, tol, state), on_device)
    density = _density(state)
    return Spectrum(pairs, density, density.trace_of(_identity))


def _identity(values: jax.Array) -> jax.Array:
    return values


@jax.jit
def _density(state: LanczosState) -> SpectralDensity:
    nodes, weights = quadrature_of_basis(state.space)
    dimension = jnp.asarray(state.packing.size, weights.dtype)
    return SpectralDensity(nodes, weights, jnp.minimum(state.num_matvecs, 1), state.num_matvecs, dimension)
