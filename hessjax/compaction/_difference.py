"""How far two models' outputs are apart, and how far rounding alone can take them."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hessjax._core import _numbers, _tree
from hessjax._core._types import ModelFn, Params
from hessjax.program._program import Body

PRECISION = "highest"
"""Of products that are compared: in fast modes of accelerators (TF32) another order of sums changes far more
than float32 rounds."""


class Gaps(NamedTuple):
    """How far the outputs of two models are apart.

    Attributes:
        paths: the outputs.
        gap: (outputs,) max |y − y'| of each; the same infinity (a masked logit) or NaN on both sides is none.
        size: (outputs,) max |y| of each, of what is finite.
        share: (outputs,) the fraction of entries that differ at all.
        is_number: for each, whether it is of floating-point numbers.
    """

    paths: list[str]
    gap: Float[np.ndarray, " _outputs"]
    size: Float[np.ndarray, " _outputs"]
    share: Float[np.ndarray, " _outputs"]
    is_number: list[bool]

    @property
    def difference(self) -> float:
        """The largest max |y − y'| / max |y| of an output."""
        # Outputs may all be zero: 0 / 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.max(np.where(self.gap == 0, 0.0, self.gap / self.size), initial=0.0))

    def wrong(self, allowed: Float[np.ndarray, " _outputs"]) -> Bool[np.ndarray, " _outputs"]:
        """Which outputs differ by more than that."""
        # An argmax may jump where two numbers tie to rounding: some entries may differ, not many.
        return np.where(self.is_number, ~(self.gap <= allowed), self.share > _TIES)


def gaps(full: ModelFn, small: ModelFn, params: Params, fewer: Params, args: Any) -> Gaps:
    """Compare `full(params, *args)` with `small(fewer, *args)`.

    Raises:
        ValueError: if they differ in structure or shape.
    """
    with jax.default_matmul_precision(PRECISION):
        want, measured = jax.jit(functools.partial(_both, full, small))(params, fewer, args)
    numbers = np.asarray(jax.device_get(measured), float).reshape(-1, 3).T
    is_number = [bool(jnp.issubdtype(x.dtype, jnp.inexact)) for x in jax.tree.leaves(want)]
    return Gaps(list(_tree.leaf_paths(want)), numbers[0], numbers[1], numbers[2], is_number)


def _both(full: ModelFn, small: ModelFn, params: Params, fewer: Params, args: Any) -> tuple[Any, Any]:
    want, got = jax.tree.map(jnp.asarray, (full(params, *args), small(fewer, *args)))
    _tree.check_like(got, want, "model_fn(params, *args)", "the compact model's outputs")
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    return want, [_gap(a, b) for a, b in pairs]


def _gap(a: Array, b: Array) -> list[Array]:
    # Booleans cannot be subtracted, and unsigned integers wrap around.
    a, b = (x.astype(_numbers.common_dtype(jnp.float32, x.dtype)) for x in (a, b))
    same = (a == b) | (jnp.isnan(a) & jnp.isnan(b))
    gap = jnp.max(jnp.where(same, 0, jnp.abs(a - b)), initial=0)
    size = jnp.max(jnp.where(jnp.isfinite(b), jnp.abs(b), 0), initial=0)
    return [gap, size, 1 - jnp.mean(same) if same.size else jnp.zeros(())]


def check_same(
    found: Gaps, body: Body, kept: Iterable[str], model_fn: ModelFn, params: Params, args: Any
) -> None:
    """Refuse a compact model that computes something else.

    Raises:
        RuntimeError: it names the output that differs.
    """
    eps, everything = _rounding(body), float(np.max(found.size, initial=0.0))
    # Rounding grows with depth, so that ε itself is too strict; a misread channel shows at the order of 1.
    allowed = eps**0.5 * found.size
    if found.wrong(allowed).any():
        # A network may amplify: what a change of its weights by a few ε does, rounding may do as well. What
        # is left of much larger numbers that cancel is known to their ε only.
        noise = gaps(model_fn, model_fn, params, _shaken(params, eps), args).gap
        at_most = np.maximum(0.1 * found.size, 64 * eps * everything)
        allowed = np.maximum(allowed, np.minimum(32 * noise, at_most))
    for i in np.flatnonzero(found.wrong(allowed)):
        relative = found.gap[i] / found.size[i] if found.size[i] else np.inf
        name = "" if found.paths[i] == "." else f" in the output {found.paths[i]}"
        what = f"by {relative:.1e}" if found.is_number[i] else f"at {found.share[i]:.0%} of the entries"
        raise RuntimeError(
            f"The compact model's outputs must be those of the full one to rounding, {eps**0.5:.1e}, but on "
            f"the example they differ{name} {what}. An operation must have been misread: `where` can "
            f"leave out what was cut ({', '.join(kept)})."
        )


def _shaken(params: Params, eps: float) -> Params:
    """The params, every weight one way or the other by 2 ε."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (
            x * jnp.asarray(1 + 2 * eps * rng.choice((-1, 1), jnp.shape(x)), x.dtype)
            if jnp.issubdtype(getattr(x, "dtype", np.int32), jnp.floating)
            else x
        ),
        params,
    )


_TIES = 0.2
"""The largest fraction of entries of a discrete output that may differ."""


def _rounding(body: Body) -> float:
    """The ε of the coarsest floating dtype that the operations give: a bfloat16 inside sets the error."""
    dtypes = (getattr(v.aval, "dtype", np.int32) for operation in body.operations for v in operation.outputs)
    own = [float(jnp.finfo(x).eps) for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
    inner = [_rounding(each) for operation in body.operations for each in operation.bodies]
    return max([*own, *inner], default=0.0)
