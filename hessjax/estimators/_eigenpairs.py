"""Eigenpairs in one line, with residuals that were measured."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hessjax._core import _numbers, _tree
from hessjax._core._compiled import compiled
from hessjax._core._packing import Packing
from hessjax._core._results import Eigenpairs
from hessjax._core._sharding import Layouts
from hessjax._core._types import (
    Amount,
    BatchMatvec,
    Block,
    Forms,
    Key,
    Matvec,
    Params,
    Relative,
    Scalar,
    Tolerance,
    Vector,
)
from hessjax._run._arguments import RunOptions, checked_options
from hessjax._run._drivers import as_partial, run
from hessjax._run._estimator import begun, error
from hessjax.estimators._lanczos import Which, lanczos
from hessjax.estimators._samples import sampling_error


def eigenpairs(
    matvec: Matvec,
    key: Key,
    like: Params,
    k: int = 5,
    which: Which = "both",
    *,
    max_matvecs: int = 300,
    tol: Tolerance = Relative(1e-4),  # noqa: B008 - immutable
    basis_size: int | None = None,
    block_size: int = 1,
    start: Block | None = None,
    basis_dtype: Any = None,
    **options: Unpack[RunOptions],
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
        block_size: how many vectors a step multiplies: eigenvalues repeated that often are found as often.
        start: block of vectors to start near: the `vectors` found a few training steps ago save a third of
            the products, or more where little has changed. Ask for a pair or two more than you watch: one
            that is about to overtake the others is then among them.
        basis_dtype: see `lanczos`: `jnp.bfloat16` halves the memory of the basis.
        **options: `callbacks` and `on_device`, see `run`.

    Returns:
        `Eigenpairs`, largest value first. The residuals are recomputed: ‖Av − θv‖ from one more product
        each, for the vectors returned and the values that belong to them (Rayleigh quotients). For a matvec
        `over_batches`, `data_stderr` says how far the values would move on other data of this size.

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
    checked = checked_options("eigenpairs", options)
    estimator = lanczos(
        k,
        which,
        basis_size=basis_size,
        block_size=block_size,
        start=start,
        tol=tol,
        basis_dtype=basis_dtype,
    )
    pairs, state = run(estimator, matvec, key, like, max_matvecs=max_matvecs, tol=tol, **checked)
    # By the program that the run had already: each operation of its own would be compiled.
    _, limit = error(begun(estimator), Amount.of(tol), state)
    return measured(pairs, matvec, like, limit, options.get("on_device", False))


def measured(pairs: Eigenpairs, matvec: Matvec, like: Params, limit: Any, on_device: bool) -> Eigenpairs:
    """The pairs with Rayleigh quotients and residuals from one more product each."""
    # A pair that was not found is NaN, and meant to be.
    if on_device:
        quotients = _quotients(as_partial(matvec), pairs.vectors, like)
        with _numbers.meant():
            return _where_found(pairs, *quotients, limit)
    # One by one from the host: the matvec may stream data, and a CPU is fast only outside loops.
    quotients, errors = zip(*(_measure(matvec, v, like) for v in _rows(pairs.vectors)), strict=True)
    pairs = pairs._replace(data_stderr=None if errors[0] is None else jnp.stack(errors))
    with _numbers.meant():
        return _one_by_one(pairs, quotients, limit)


def _measure(matvec: Matvec, vector: Vector, like: Params) -> tuple[tuple[Scalar, Scalar], Scalar | None]:
    """Rayleigh quotient and residual, and the quotient's sampling error where there are batches."""
    if not isinstance(matvec, BatchMatvec):
        return _packed_quotient(Layouts.of(vector), vector, matvec(_tree.cast_like(vector, like))), None
    product, forms = matvec.by_batch(_tree.cast_like(vector, like))
    return _packed_quotient(Layouts.of(vector), vector, product), _sampling_error(forms)


_rows = jax.jit(_tree.rows)


@jax.jit
def _sampling_error(forms: Forms) -> Scalar:
    return sampling_error(jnp.sum(forms.parts, axis=1), forms.weights)


@functools.partial(jax.jit, static_argnums=0)
def _packed_quotient(layouts: Layouts, vector: Vector, product: Vector) -> tuple[Scalar, Scalar]:
    # Packed, for a program that does not grow with the number of leaves.
    with layouts.told(vector):
        packing = Packing.of(vector)
    return _quotient(packing.pack(vector), packing.pack(product))


def _quotient(vector: Vector, product: Vector) -> tuple[Scalar, Scalar]:
    """The Rayleigh quotient of a vector of norm 1, and its residual."""
    # bfloat16 products are summed in float32, as in the run.
    product = _tree.wide(product)
    value = _tree.inner(vector, product)
    return value, _tree.norm(_tree.add_scaled(product, -value, vector))


@compiled()
def _quotients(matvec: Matvec, vectors: Block, like: Params) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    # Not `vmap`: that would hold all products, and their activations, at once.
    return jax.lax.map(lambda v: _quotient(v, matvec(_tree.cast_like(v, like))), vectors)


@jax.jit
def _one_by_one(pairs: Eigenpairs, quotients: tuple[tuple[Scalar, Scalar], ...], limit: Any) -> Eigenpairs:
    values, residuals = zip(*quotients, strict=True)
    return _where_found(pairs, jnp.stack(values), jnp.stack(residuals), limit)


@jax.jit
def _where_found(
    pairs: Eigenpairs, values: Float[Array, " k"], residuals: Float[Array, " k"], limit: Any
) -> Eigenpairs:
    """The pairs with measured values and residuals, where there is a pair at all."""
    # The vector of a pair that was not found is zero, with a quotient of 0 that means nothing.
    found = jnp.isfinite(pairs.values)
    residuals = jnp.where(found, residuals, jnp.inf)
    return pairs._replace(
        values=_numbers.or_nan(found, values),
        residuals=residuals,
        converged=residuals <= limit,
        num_matvecs=pairs.num_matvecs + len(values),
    )
