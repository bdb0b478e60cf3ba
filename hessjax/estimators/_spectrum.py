"""Several answers from few runs: eigenpairs, density and trace at once; the density of every leaf."""

import dataclasses
import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._core import _tree
from hessjax._core._layout import tree_axes
from hessjax._core._messages import checked_any_key, checked_count, checked_flag
from hessjax._core._results import (
    Eigenpairs,
    Estimate,
    by_shapes,
    counted,
    eigenvalue_table,
    is_known,
    with_error,
)
from hessjax._core._tables import Table, printable
from hessjax._core._types import Amount, Key, Matvec, Params, Relative, Tolerance, readable_defaults
from hessjax._core._words import AxisWords
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import run
from hessjax._run._estimator import begun, error
from hessjax.estimators._density import SpectralDensity
from hessjax.estimators._eigenpairs import measured
from hessjax.estimators._lanczos import LanczosState, lanczos
from hessjax.estimators._quadrature import quadrature_of_basis
from hessjax.estimators._slq import slq
from hessjax.estimators.probes import Probe, gaussian


@readable_defaults
def spectral_density_by_leaf(
    matvec: Matvec,
    key: Key,
    like: Params,
    num_probes: int = 1,
    num_matvecs: int = 80,
    *,
    probe: Probe = gaussian,
    reorthogonalise: bool = False,
    at_once: int = 1,
    axes: AxisWords | None = None,
    by_layer: bool = False,
    **options: Unpack[RunOptions],
) -> dict[str, SpectralDensity]:
    """The distribution of the eigenvalues of every leaf's diagonal block A_ll.

    The block is the whole matvec between two masks, v ↦ P_l A P_l v. Which leaf is let through is data, so
    that all leaves share what is compiled for one. A leaf smaller than `num_matvecs` has all its eigenvalues
    found before the end; the nodes that are too many have weight zero.

    Args:
        matvec: the symmetric linear map.
        key: random key; leaf (or layer) i uses `fold_in(key, i)`.
        like: pytree like the vectors; usually the params.
        num_probes: number of random start vectors for each leaf. Small leaves need more of them.
        num_matvecs: Lanczos steps for each: the resolution.
        probe: see `slq`.
        reorthogonalise: see `slq`. Off by default: a basis of vectors of full length is a lot of memory for
            one leaf's numbers.
        at_once: see `slq`.
        axes: what the axes of leaves mean, where names and shapes do not tell, as in `prune`.
        by_layer: one density for every layer that a leaf stacks, as under `nn.scan`, in place of one for all
            of them.
        **options: `callbacks` and `on_device`, see `run`. Callbacks hear of one run for each leaf, so
            `checkpoint` is refused.

    Returns:
        For the path of each leaf that is not empty, a `SpectralDensity` with `dimension` the leaf's size; by
        layer, for those of each: `blocks/Dense_0/kernel[0]`, ...

    Raises:
        ValueError: as `slq`; two leaves with one path; `axes` does not fit.
        NonFiniteProductError: see `run`.

    Cost:
        `num_probes · num_matvecs` products of the whole matvec for every leaf; memory as `slq`: 6·d, or
        (num_matvecs + 6)·d with reorthogonalisation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(lambda v: {"bias": 2 * v["bias"], "kernel": 3 * v["kernel"]})
        >>> like = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
        >>> densities = hj.spectral_density_by_leaf(A, jax.random.key(0), like, num_matvecs=2)
        >>> {path: round(float(density.moment()), 5) for path, density in densities.items()}
        {'bias': 2.0, 'kernel': 3.0}
    """
    _tree.check_floating(like, "like")
    checked, key = checked_options("spectral_density_by_leaf", options), checked_any_key(key)
    checked_flag("by_layer", by_layer)
    _tree.unique_paths(like, "like")
    if any(hasattr(callback, "restore") for callback in options.get("callbacks", ())):
        raise ValueError(
            "`callbacks` must not hold a `checkpoint`, which is of one run: this makes one for every leaf. "
            "For checkpoints take the densities of `hessjax.select(params, path)` one by one."
        )
    found = tree_axes(like, axes)
    stacks = tuple(tuple(axis - len(x.shape) for axis in x.stack) for x in found) if by_layer else ()
    parts = [
        (name, math.prod(x.shape)) for x in found for name in (x.layer_names() if by_layer else [x.path])
    ]
    # The leaf is an array: all of them share what is compiled for one.
    method = slq(num_probes, num_matvecs, probe=probe, reorthogonalise=reorthogonalise, at_once=at_once)
    method = dataclasses.replace(method, stacks=stacks if any(stacks) else ())
    return {
        name: run(
            dataclasses.replace(method, leaf=jnp.int32(index)),
            matvec,
            jax.random.fold_in(key, index),
            like,
            max_matvecs=num_probes * num_matvecs,
            **checked,
        )[0]
        for index, (name, size) in enumerate(parts)
        if size
    }


@printable
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

    def _table(self) -> Table | str:
        pairs, trace = self.eigenpairs._replace(vectors=None), self.trace
        if not is_known(pairs, trace) or np.ndim(pairs.values) != 1:
            return by_shapes(self)
        notes = (
            f"Trace {with_error(trace.mean, trace.stderr)}.",
            f"{counted(pairs.num_matvecs, 'product')}.",
        )
        return eigenvalue_table(pairs, notes=notes)


def spectrum(
    matvec: Matvec,
    key: Key,
    like: Params,
    k: int = 5,
    num_matvecs: int = 80,
    *,
    tol: Tolerance = Relative(1e-4),  # noqa: B008 - immutable
    **options: Unpack[RunOptions],
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
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `Spectrum(eigenpairs, density, trace)`.

    Raises:
        ValueError: `num_matvecs` below 2k + 1, or above the number of parameters.
        NonFiniteProductError: see `run`.

    Cost:
        `num_matvecs` products, and one for each of the 2k pairs to measure its residual; memory
        (num_matvecs + 6)·d, and the pairs' d at the end.

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
    _tree.check_floating(like, "like")
    checked = checked_options("spectrum", options)
    k = checked_count("k", k)
    num_matvecs = checked_count("num_matvecs", num_matvecs, 2 * k + 1, ", one more than the pairs wanted")
    if num_matvecs > (size := _tree.size(like)):
        raise ValueError(
            f"`num_matvecs` must be at most {size}, the number of parameters, got {num_matvecs}."
        )
    estimator = lanczos(k, basis_size=num_matvecs + 1, tol=tol)  # one more than it will fill: no restart
    pairs, state = run(estimator, matvec, key, like, max_matvecs=num_matvecs, **checked)
    _, limit = error(begun(estimator), Amount.of(tol), state)  # one program, not one for each operation
    # The residuals of the recurrence hold for a symmetric matvec only: products of the vectors tell.
    pairs = measured(pairs, matvec, like, limit, options.get("on_device", False))
    density = _density(state)
    return Spectrum(pairs, density, density.trace_of(_identity))


def _identity(values: Float[Array, "..."]) -> Float[Array, "..."]:
    return values


@jax.jit
def _density(state: LanczosState) -> SpectralDensity:
    # Valid because the run never restarted: the first row of the basis is still the random start.
    nodes, weights = quadrature_of_basis(state.space)
    dimension = jnp.asarray(state.packing.size, weights.dtype)
    return SpectralDensity(nodes, weights, jnp.minimum(state.num_matvecs, 1), state.num_matvecs, dimension)
