"""Eigenpairs in one line, with residuals that were measured."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax import _tree
from hessjax._drive import Callback
from hessjax._typing import Eigenpairs, Key, Matvec, Params, Relative, Tolerance, Vector
from hessjax.estimator import run
from hessjax.spectral.lanczos import lanczos


def eigenpairs(
    matvec: Matvec,
    key: Key,
    like: Params,
    k: int = 5,
    which: str = "both",
    *,
    max_matvecs: int = 300,
    tol: Tolerance = Relative(1e-4),  # noqa: B008 - immutable
    basis_size: int | None = None,
    callbacks: Sequence[Callback] = (),
    on_device: bool = False,
) -> Eigenpairs:
    """The extreme eigenpairs of a symmetric matvec, by thick-restart Lanczos.

    Args:
        matvec: the symmetric linear map.
        key: random key for the start vector.
        like: pytree like the vectors; usually the params.
        k: number of pairs; with `which="both"`, from each end of the spectrum, 2k in all.
        which: `"both"`, `"largest"`, `"smallest"` (algebraically) or `"magnitude"`. The last may not
            settle when a negative eigenvalue is about as large as a positive one; `"both"` does.
        max_matvecs: the most products to spend on the search.
        tol: stop when all residuals are within this; absolute, or `relative` to the largest absolute
            eigenvalue of the matrix, at whichever end (small eigenvalues need an absolute one to be
            known to many digits).
        basis_size: the most vectors kept, see `lanczos`.
        callbacks: see `run`.
        on_device: see `run`.

    Returns:
        `Eigenpairs`, largest value first. The residuals are recomputed: ‖Av − θv‖ from one more product
        each, for the vectors returned and the values that belong to them (Rayleigh quotients).

    Raises:
        ValueError: `k` or `basis_size` do not fit the number of parameters, unknown `which`.
        NonFiniteProductError: see `run`.

    Cost:
        At most `max_matvecs` products plus one for each pair; memory as `lanczos`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import hessjax as hj
        >>> A = jax.tree_util.Partial(jnp.multiply, jnp.linspace(-1.0, 4.0, 50))
        >>> pairs = hj.eigenpairs(A, jax.random.key(0), jnp.zeros(50), k=1)
        >>> pairs.values.round(3).tolist(), pairs.converged.tolist()
        ([4.0, -1.0], [True, True])
    """
    estimator = lanczos(k, which, basis_size=basis_size, tol=tol)
    pairs, state = run(
        estimator,
        matvec,
        key,
        like,
        max_matvecs=max_matvecs,
        tol=tol,
        callbacks=callbacks,
        on_device=on_device,
    )
    limit = tol.factor * estimator.scale(state) if isinstance(tol, Relative) else tol
    found, vectors = jnp.isfinite(pairs.values), pairs.vectors
    if on_device:
        values, residuals = jax.lax.map(lambda vector: _rayleigh(matvec, vector, like), vectors)
    else:
        measured = [_rayleigh(matvec, _tree.row(vectors, i), like) for i in range(len(pairs.values))]
        values, residuals = (jnp.stack(column) for column in zip(*measured, strict=True))
    residuals = jnp.where(found, residuals, jnp.inf)
    return Eigenpairs(
        jnp.where(found, values, jnp.nan),
        vectors,
        residuals,
        residuals <= limit,
        pairs.num_matvecs + len(values),
    )


def _rayleigh(matvec: Matvec, vector: Vector, like: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The Rayleigh quotient of a vector of norm 1, and its residual."""
    return _quotient(vector, matvec(_tree.cast_like(vector, like)))


@jax.jit
def _quotient(vector: Vector, product: Vector) -> tuple[Float[Array, ""], Float[Array, ""]]:
    product = _tree.wide(product)
    value = _tree.inner(vector, product)
    return value, _tree.norm(_tree.add_scaled(product, -value, vector))
