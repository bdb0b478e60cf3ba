"""How far an inverse Fisher is off, block by block, and the error where that is too much."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hessjax._core import _tree
from hessjax._core._types import Scalar
from hessjax._fisher._blocking import Blocking, signs
from hessjax._fisher._factored import Count, Factored, diagonals, images, solved
from hessjax._fisher._factors import Root, Whole

INACCURATE = 0.01
"""A block whose inverse is off by more than this fraction is not handed out."""

MARGIN = 8
"""Damping of this times eps·‖F‖ is suggested then."""

Residuals = tuple[Float[Array, " _"], ...]
"""How far every block is off; see `InverseFisher`."""


@functools.partial(jax.jit, donate_argnums=0)
def measured(parts: Factored, shift: Scalar, count: Count) -> tuple[Factored, Residuals]:
    """The factors, with NaN for what the residuals show to be no inverse, and the residuals."""
    Az = images(parts)
    z = [jnp.broadcast_to(signs(x.shape[-1], x.dtype), x.shape) for x in Az]
    products = [(x + shift.astype(x.dtype) * s) / count for x, s in zip(Az, z, strict=True)]
    misses = [x - s for x, s in zip(solved(parts, tuple(products), shift, count), z, strict=True)]
    if isinstance(parts, Whole):
        residual = shift / count * _tree.norm(misses) / _tree.norm(products)
        return parts._replace(cholesky=_kept(parts.cholesky, residual)), (residual[None],)
    units = map(jnp.sqrt, diagonals(parts, shift, count))
    residuals = tuple(map(_relative_miss, misses, products, units))
    kept = tuple(
        part._replace(**{name: _kept(getattr(part, name), residual)})
        for part, residual in zip(parts, residuals, strict=True)
        for name in ("root" if isinstance(part, Root) else "cholesky",)
    )
    return kept, residuals


def all_accurate(residuals: Residuals) -> Bool[Array, ""]:
    """Whether every block is."""
    return jnp.all(jnp.concatenate(residuals) <= INACCURATE)


def _relative_miss(miss: Array, product: Array, units: Array) -> Array:
    return jnp.sqrt(jnp.mean((miss / units) ** 2, axis=-1) / jnp.mean((product * units) ** 2, axis=-1))


def _kept(factor: Array, residual: Array) -> Array:
    return jnp.where((residual <= INACCURATE)[..., None, None], factor, jnp.nan)


# -- the error -----------------------------------------------------------------------------------


def check(parts: Factored, residuals: Residuals, blocking: Blocking, shift: Scalar, count: Count) -> None:
    """Nothing, if all is traced or good; else an error that names the first bad block."""
    if any(isinstance(x, jax.core.Tracer) for x in residuals) or bool(all_accurate(residuals)):
        return
    paths = _tree.leaf_paths(blocking.like)
    sizes = dict(sorted(blocking.by_leaf(_sizes(parts, count)).items()))
    bad = [paths[i] for i, x in sizes.items() if not jnp.all(jnp.isfinite(x))]
    if bad:
        raise ValueError(
            f"`grads` must be finite, got NaN, infinity or numbers with squares beyond the dtype's range in "
            f"{', '.join(bad)}."
        )
    if not shift > 0:
        raise ValueError(
            "`damping` must be absolute here, a positive number: it is relative to gradients that are all "
            "zero, or too small to be squared."
        )
    damping = float(shift / count)
    enough = max(MARGIN * float(jnp.finfo(x.dtype).eps * jnp.linalg.norm(x)) for x in sizes.values())
    raise ValueError(
        f"`damping` must be about {max(enough, 4 * damping):.1e} or larger in this precision, got "
        f"{damping:.1e}: the inverse would not be accurate for {_where(residuals, blocking, paths)}. Smaller "
        f"`chunk_size` or `block_size` help a little, gradients in float64 help for good."
    )


def _where(residuals: Residuals, blocking: Blocking, paths: list[str]) -> str:
    """The first block that is not accurate, and how many are not."""
    if not blocking.block_size:
        return "the whole network"
    bad = {i: ~(x <= INACCURATE) for i, x in sorted(blocking.by_leaf(residuals).items())}
    first = next(i for i in bad if bad[i].any())
    total, blocks = sum(int(x.sum()) for x in bad.values()), sum(x.size for x in bad.values())
    return f"block {int(bad[first].argmax())} of {paths[first]} ({total} of all {blocks} blocks)"


@jax.jit
def _sizes(parts: Factored, count: Count) -> tuple[Array, ...]:
    """‖Fz‖ of every block, about the Frobenius norm of F; the trace of every leaf with one block in all."""
    if isinstance(parts, Whole):
        return tuple(jnp.sum(rows**2)[None] / count for rows in parts.rows)
    return tuple(jnp.linalg.norm(part.image, axis=-1) / count for part in parts)
