"""Patterns: n of m, blocks, whole channels, filters, rows and attention heads."""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from hessjax._core._axes import axes_of, heads_axis
from hessjax._core._messages import checked_count, checked_int
from hessjax._core._types import assign, settings
from hessjax.pruning.patterns._pattern import Pattern, check_divides, place_of


def _axis(axis: Any) -> int | None:
    return None if axis is None else checked_int("axis", axis)


class _ByAxis(Pattern):
    """A pattern whose axis depends on the leaf: alone, it takes the leaf for one of Flax's layout."""

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """As for a leaf without a path."""
        return self("", leaf).group(leaf)

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """As for a leaf without a path."""
        return self("", jax.ShapeDtypeStruct(shape, rows.dtype)).ungroup(rows, shape)


@settings()
class NOfM(_ByAxis):
    """At least n of every m consecutive weights along an axis stay: 2:4 and its relatives.

    A ranking takes the lowest scores as always, but never more than m − n out of a group; at the sparsity
    1 − n/m every group has exactly n weights left.

    Args:
        n: how many stay.
        m: the size of a group.
        axis: along which they lie. None: the axis that is summed over, as hardware wants it, which is 0 for
            a Dense kernel.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: unless 0 < n < m; by `prune`, if m does not divide the axis, or if the sparsity is above
            1 − n/m.

    References:
        Mishra et al., Accelerating sparse deep neural networks (2021), arXiv 2104.08378: 2:4.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.n_of_m(2, 4,
        ...     axis=1)).params["kernel"]
        Array([[9., 8., 0., 0., 0., 0., 3., 4.]], dtype=float32)
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        assign(self, n=checked_int("n", self.n), m=checked_int("m", self.m), axis=_axis(self.axis))
        if not 0 < self.n < self.m:
            raise ValueError(
                f"`n` must be between 1 and m - 1, how many of `m` stay, got {self.n} of {self.m}."
            )

    def __repr__(self) -> str:
        return f"n_of_m({self.n}, {self.m}{'' if self.axis is None else f', axis={self.axis}'})"

    @property
    def at_most(self) -> int:
        """M − n."""
        return self.m - self.n

    def __call__(self, path: str, leaf: Any) -> Pattern:
        """Along the axis that is summed over, if none is given."""
        return self if self.axis is not None else NOfM(self.n, self.m, axes_of(path, jnp.shape(leaf)).summed)

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups m"]:
        """Consecutive weights along the axis in a row."""
        if self.axis is None:
            return super().group(leaf)
        last = jnp.moveaxis(leaf, place_of(self.axis, leaf.shape), -1)
        check_divides(self.m, last.shape[-1], f"axis {self.axis}")
        return last.reshape(-1, self.m)

    def ungroup(self, rows: Shaped[Array, "groups m"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Back along the axis."""
        if self.axis is None:
            return super().ungroup(rows, shape)
        place = place_of(self.axis, shape)
        last = (*shape[:place], *shape[place + 1 :], shape[place])
        return jnp.moveaxis(rows.reshape(last), -1, place)


@settings()
class Blocks(Pattern):
    """Rectangular blocks over the last axes of a leaf go as a whole.

    Args:
        shape: of one block, `(32, 32)`; axes before the last `len(shape)` are cut into single indices.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is below 1; by `prune`, for a leaf with fewer axes, or axes it does not divide.

    References:
        Narang et al., Block-sparse recurrent neural networks (2017), arXiv 1711.02782.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 1.0, 5.0, 0.5], [1.0, 1.0, 0.1, 0.1]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.blocks((2,
        ...     2))).params["kernel"]
        Array([[0. , 0. , 5. , 0.5],
               [0. , 0. , 0.1, 0.1]], dtype=float32)
    """

    shape: Sequence[int]

    def __post_init__(self) -> None:
        sizes = [self.shape] if isinstance(self.shape, str) or not np.ndim(self.shape) else self.shape
        sizes = tuple(checked_int("shape", size) for size in sizes)  # a list does not hash
        if not sizes or not np.ndim(self.shape) or min(sizes) < 1:
            raise ValueError(f"`shape` must be sizes of at least 1, of one block, got {self.shape}.")
        assign(self, shape=sizes)

    def __repr__(self) -> str:
        return f"blocks({self.shape})"

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each block in a row."""
        fine, order = self._cut(leaf.shape)
        return leaf.reshape(fine).transpose(order).reshape(-1, math.prod(self.shape))

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """The blocks in their places."""
        fine, order = self._cut(shape)
        moved = rows.reshape([fine[i] for i in order])
        # The inverse permutation: where each axis of the blocks came from.
        return moved.transpose([order.index(i) for i in range(len(order))]).reshape(shape)

    def _cut(self, full: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leaf's shape with each of its last axes in two, and the order that brings blocks together."""
        k, lead = len(self.shape), len(full) - len(self.shape)
        if lead < 0:
            raise ValueError(f"it needs {k} axes, and there are {len(full)}")
        for place, size in enumerate(self.shape, start=lead):
            check_divides(size, full[place], f"axis {place}")
        pairs = [part for n, size in zip(full[lead:], self.shape, strict=True) for part in (n // size, size)]
        outer, inner = range(lead, lead + 2 * k, 2), range(lead + 1, lead + 2 * k, 2)
        return (*full[:lead], *pairs), (*range(lead), *outer, *inner)


@settings()
class Along(Pattern):
    """All weights with the same index along one axis go as a whole.

    Args:
        axis: from either end.
        called: its name in messages.
        tie: as in `Pattern`.
        parts: into how many equal runs of indices the axis is cut; None: every index on its own.
    """

    axis: int
    called: str
    tie: str | None = None
    parts: int | None = None

    def __repr__(self) -> str:
        return self.called

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each index, or run of indices, in a row."""
        place = place_of(self.axis, leaf.shape)
        first = jnp.moveaxis(leaf.reshape(self._split(leaf.shape)), place, 0)
        # Not by −1, which is undefined for a leaf without entries.
        return first.reshape(first.shape[0], math.prod(first.shape[1:]))

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Back along the axis."""
        place, split = place_of(self.axis, shape), self._split(shape)
        # The runs of indices stand at the axis' own place once it is cut in two.
        rest = (*split[:place], *split[place + 1 :])
        return jnp.moveaxis(rows.reshape(split[place], *rest), 0, place).reshape(shape)

    def _split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with runs of indices on an axis of their own."""
        if self.parts is None:
            return shape
        place = place_of(self.axis, shape)
        check_divides(self.parts, shape[place], f"axis {self.axis}")
        return (*shape[:place], self.parts, shape[place] // self.parts, *shape[place + 1 :])


@settings()
class Channels(_ByAxis):
    """All weights with the same index along an axis go as a whole.

    Args:
        axis: None for the input channels, which are -2 for a Flax kernel; -1 for the output channels
            (`filters()`).

    Raises:
        TypeError: if `axis` is not an integer.
        ValueError: by `prune`, for a leaf without that axis.

    References:
        Li et al., Pruning filters for efficient ConvNets (2016), arXiv 1608.08710.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0, 0.5], [1.0, 3.0, 2.0]])}
        >>> hj.prune_once(params, hj.saliencies.magnitude(), 1 / 3,
        ...                                               pattern=hj.patterns.channels(-1)).params["kernel"]
        Array([[0. , 2. , 0.5],
               [0. , 3. , 2. ]], dtype=float32)
    """

    axis: int | None = None

    def __post_init__(self) -> None:
        assign(self, axis=_axis(self.axis))

    def __repr__(self) -> str:
        return f"channels({'' if self.axis is None else self.axis})"

    def __call__(self, path: str, leaf: Any) -> Pattern:
        """Along the input channels, if no axis is given."""
        axis = axes_of(path, jnp.shape(leaf)).input if self.axis is None else self.axis
        return Along(axis, f"channels({axis})")


@settings()
class Filters(_ByAxis):
    """The output channels of a kernel go as a whole: `channels(-1)` for Flax's."""

    def __repr__(self) -> str:
        return "filters()"

    def __call__(self, path: str, leaf: Any) -> Pattern:
        """Along the output channels."""
        return Along(axes_of(path, jnp.shape(leaf)).output, "filters()")


@settings()
class Rows(_ByAxis):
    """The rows of a matrix, its first axis, go as a whole: `channels(0)`."""

    def __repr__(self) -> str:
        return "rows()"

    def __call__(self, path: str, leaf: Any) -> Pattern:
        """Along the first axis."""
        return Along(axes_of(path, jnp.shape(leaf)).rows, "rows()")


@settings()
class Heads:
    """Attention heads go as a whole: the same ones from query, key, value and output.

    Leaves with the same parent's parent belong to one attention: `layer_0/attention/{query,key,value,out}
    /kernel`. Restrict `where` to them.

    Args:
        num_heads: None for kernels with an axis of heads, as Flax's attention has them: second to last, and
            the first of the output's. A number, for kernels that have heads and their entries in one axis:
            the last, and the output's first.
        out: a glob over paths, for the output projection.

    Raises:
        TypeError: if `num_heads` is not an integer.
        ValueError: if `num_heads` is below 1; by `prune`, for a leaf that has no such heads.

    References:
        Michel et al., Are sixteen heads really better than one? (2019), arXiv 1905.10650.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> rule = hj.patterns.heads()
        >>> rule("attention/query/kernel", jnp.ones((8, 4, 2))).group(jnp.ones((8, 4, 2))).shape
        (4, 16)
        >>> rule("attention/out/kernel", jnp.ones((4, 2, 8))).tie
        'attention'
    """

    num_heads: int | None = None
    out: str = "*out*"

    def __post_init__(self) -> None:
        if self.num_heads is not None:
            assign(self, num_heads=checked_count("num_heads", self.num_heads))

    def __repr__(self) -> str:
        return f"heads({'' if self.num_heads is None else self.num_heads})"

    def __call__(self, path: str, leaf: Any) -> Pattern:
        """The heads of one leaf, tied to those of its attention."""
        axis = heads_axis(path, fnmatch.fnmatchcase(path, self.out), fused=self.num_heads is not None)
        # "" for an attention at the root, and a tie all the same: None alone is none.
        return Along(axis, repr(self), tie="/".join(path.split("/")[:-2]), parts=self.num_heads)


n_of_m, blocks, channels, filters, rows, heads = NOfM, Blocks, Channels, Filters, Rows, Heads
