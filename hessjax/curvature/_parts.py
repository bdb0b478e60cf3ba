"""Products of one batch, some of its examples at a time: the same product in a part of the memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from hessjax._core import _reshaping, _tree
from hessjax._core._compiled import compiled
from hessjax._core._messages import checked_count
from hessjax._core._sharding import Layouts
from hessjax._core._types import Matvec, Params, Vector
from hessjax.curvature._batches import add, divide, zero
from hessjax.curvature._weights import Weights, by_example, check_count, leading_axis, shares_of

ProductOf = Callable[[Any, Params, tuple[Any, ...], Vector], Vector]
"""`(functions, params, args, vector) -> product`, with the args' first a batch: settings, which hash."""


def in_parts(
    product: ProductOf,
    functions: Any,
    params: Params,
    args: tuple[Any, ...],
    microbatch: Any,
    weights: Weights | None,
    linearize: bool,
) -> Matvec:
    """The matvec that multiplies at most `microbatch` examples at a time, and takes the mean."""
    microbatch = checked_count("microbatch", microbatch)
    if linearize:
        raise ValueError(
            f"`microbatch` must be None with `linearize=True`, which keeps all activations, got {microbatch}."
        )
    if not args:
        raise ValueError("`args` must begin with the batch that `microbatch` cuts, got no arguments.")
    count = leading_axis(args[0], "What all examples share goes into the arguments after the batch.")
    shares = None if weights is None else shares_of(weights, args)
    if shares is not None:
        check_count(shares, count)
        shares = by_example(shares)
    return Partial(_InParts(product, _cuts(count, microbatch)), functions, params, args, shares)


def check_alone(weights: Any, microbatch: Any) -> None:
    """Raise a ValueError for weights that nothing would read."""
    if weights is not None and microbatch is None:
        raise ValueError(
            "`weights` must be None without `microbatch`: the loss itself says what counts, and only parts "
            "of a batch have to be told."
        )


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Parts of equal size of so many examples.

    Attributes:
        size: examples to a part.
        number: of parts.
        start: the first example.
    """

    size: int
    number: int
    start: int = 0

    def of(self, batch: Any, index: Int[Array, ""] | int) -> Any:
        """Part number `index`; arrays without axes are of all parts."""
        return jax.tree.map(lambda x: self._leaf(jnp.asarray(x), index) if jnp.ndim(x) else x, batch)

    def _leaf(self, x: Array, index: Int[Array, ""] | int) -> Array:
        if len(x) != self.size * self.number:
            return jax.lax.dynamic_slice_in_dim(x, self.start + index * self.size, self.size)
        # Every so manieth example: if devices share the batch, each has its share of every part.
        split = _reshaping.split_axes(x, [(self.size, self.number), *((n,) for n in x.shape[1:])])
        return jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)


def _cuts(count: int, microbatch: int) -> tuple[_Cut, ...]:
    """Equal parts if there are any of more than half the size asked for; else a smaller one is the last."""
    least = -(-count // microbatch)
    number = next(n for n in range(least, count + 1) if count % n == 0)
    if 2 * number <= 3 * least:
        return (_Cut(count // number, number),)
    full, rest = divmod(count, microbatch)
    return (_Cut(microbatch, full), *((_Cut(rest, 1, full * microbatch),) if rest else ()))


@dataclasses.dataclass(frozen=True)
class _InParts:
    """The settings of a product in parts."""

    product: ProductOf
    cuts: tuple[_Cut, ...]

    def __call__(
        self,
        functions: Any,
        params: Params,
        args: tuple[Any, ...],
        shares: Float[Array, " n"] | None,
        vector: Vector,
    ) -> Vector:
        _tree.check_arrays(vector, "vector")
        _tree.check_like(vector, params, "vector", "params")
        total, layouts = zero(params), Layouts.of(params)  # float32 at least, narrowed once at the end
        is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, args, vector)))
        for cut in self.cuts:
            step = _Step(self.product, cut, layouts)
            given = functions, params, args, shares, vector
            if is_traced:
                # In one program the parts must not be there at once, as they are where it is unrolled.
                total = jax.lax.fori_loop(
                    0, cut.number, lambda i, t, s=step, g=given: _add(s, t, i, *g), total
                )
                continue
            # On the host: XLA's CPU code for a convolution's gradient is 15 to 45 times slower in a loop.
            for index in range(cut.number):
                # Two programs: in one XLA's CPU code for the sum reads weights' products along their columns.
                total = _add_part(layouts, total, *_part(step, jnp.int32(index), *given))
        return divide(total, 1.0, params)


@dataclasses.dataclass(frozen=True)
class _Step:
    product: ProductOf
    cut: _Cut
    layouts: Layouts


def _add(step: _Step, total: Vector, index: Int[Array, ""], *given: Any) -> Vector:
    return _add_part(step.layouts, total, *_part(step, index, *given))


@compiled(static_argnums=0)
def _part(
    step: _Step,
    index: Int[Array, ""],
    functions: Any,
    params: Params,
    args: tuple[Any, ...],
    shares: Float[Array, " n"] | None,
    vector: Vector,
) -> tuple[Float[Array, ""], Vector]:
    """What a part of the examples counts, and its product."""
    batch, part = step.cut.of((args[0], shares), index)
    weight = step.cut.size / leading_axis(args[0]) if part is None else jnp.sum(part)
    product = step.product(functions, params, (batch, *args[1:]), vector)
    return jnp.asarray(weight, float), step.layouts.laid(product)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_part(layouts: Layouts, total: Vector, weight: Float[Array, ""], product: Vector) -> Vector:
    # A part of padding is not there: its own mean may be 0/0.
    product = jax.tree.map(lambda x: jnp.where(jnp.equal(weight, 0), 0, x), product)
    return layouts.laid(add(total, weight, product))
