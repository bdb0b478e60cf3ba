"""Patterns: n of m, blocks, whole channels, filters and rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hessjax._core._axes import Axes
from hessjax._core._layout import tree_axes
from hessjax._core._messages import checked_int
from hessjax._core._types import assign, settings
from hessjax.pruning.patterns._pattern import Grid, Gridded, check_divides, cut_axes, place_of


def _axis(axis: Any) -> int | None:
    return None if axis is None else checked_int("axis", axis)


class _ByAxis(Gridded):
    """A pattern whose axes depend on the leaf: alone, it takes the leaf for the kernel of one layer."""

    def along(self, axes: Axes) -> Gridded:
        """The pattern along the axes of one leaf."""
        raise NotImplementedError

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """As for a kernel that is all there is."""
        return self.along(_alone(shape)).grid(shape)


def _alone(shape: tuple[int, ...]) -> Axes:
    return tree_axes({"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)})[0]


@settings()
class NOfM(_ByAxis):
    """At least n of every m consecutive weights along an axis stay: 2:4 and its relatives.

    A ranking takes the lowest scores as always, but never more than m − n out of a group; at the sparsity
    1 − n/m every group has exactly n weights left.

    Args:
        n: how many stay.
        m: the size of a group.
        axis: along which they lie, an axis of the leaf that does not count layers. None: the axis that a
            product sums over, as hardware wants it: the inputs of a Dense kernel, the input channels of a
            convolution, in the output of an attention the entries of a head.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: unless 0 < n < m; by `prune`, if m does not divide the axis, or if the sparsity is above
            1 − n/m, and for a depthwise convolution, which sums over one input channel.

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

    def along(self, axes: Axes) -> Gridded:
        """Along the axis that is summed over, if none is given."""
        if self.axis is not None:
            return NOfM(self.n, self.m, axes.in_layer(self.axis))
        depthwise = "depthwise" in "/".join(axes.path.split("/")[-2:]).lower()
        if axes.spatial and (depthwise or axes.layer[axes.input[-1]] == 1):
            raise ValueError(
                "it has one input channel for each output, as depthwise convolutions have, and nothing to "
                "sum over in groups"
            )
        # A vector has one axis at most, which is then the one meant.
        return NOfM(self.n, self.m, (axes.input or axes.output or (0,))[-1])

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """Consecutive weights along the axis."""
        if self.axis is None:
            return super().grid(shape)
        place = place_of(self.axis, shape)
        check_divides(self.m, shape[place], f"axis {self.axis}")
        return cut_axes(shape, {place: (shape[place] // self.m, self.m)}, [place])


@settings()
class Blocks(Gridded):
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

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """Each of the last axes in two."""
        k, lead = len(self.shape), len(shape) - len(self.shape)
        if lead < 0:
            raise ValueError(f"it needs {k} axes, and there are {len(shape)}")
        for place, size in enumerate(self.shape, start=lead):
            check_divides(size, shape[place], f"axis {place}")
        cuts = {place: (shape[place] // size, size) for place, size in enumerate(self.shape, start=lead)}
        return cut_axes(shape, cuts, list(cuts))


@settings()
class Along(Gridded):
    """All weights with the same index along one axis, or along several together, go as a whole.

    Args:
        axis: from either end; several: of which each combination of indices is a group.
        called: its name in messages.
        tie: as in `Pattern`.
    """

    axis: int | tuple[int, ...]
    called: str
    tie: str | None = None

    def __repr__(self) -> str:
        return self.called

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """No cuts: a group runs over all other axes."""
        places = self._places(shape)
        rest = tuple(axis for axis in range(len(shape)) if axis not in places)
        return Grid(tuple((n,) for n in shape), rest)

    def _places(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            place_of(axis, shape) for axis in (self.axis if isinstance(self.axis, tuple) else (self.axis,))
        )


@settings()
class Channels(_ByAxis):
    """All weights with the same index along an axis go as a whole.

    Args:
        axis: of the leaf, one that does not count layers. None for the input channels, which are -2 for a
            Flax kernel; -1 for its output channels (`filters()`).

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

    def along(self, axes: Axes) -> Gridded:
        """Along the input channels, if no axis is given."""
        if self.axis is not None:
            return Along(axes.in_layer(self.axis), repr(self))
        if not axes.input:
            raise ValueError("it has no inputs")
        return Along(axes.input, repr(self))


@settings()
class Filters(_ByAxis):
    """The output channels of a kernel go as a whole: `channels(-1)` for Flax's."""

    def __repr__(self) -> str:
        return "filters()"

    def along(self, axes: Axes) -> Gridded:
        """Along the output channels."""
        return Along(axes.output, "filters()")


@settings()
class Rows(_ByAxis):
    """The rows of a matrix, the weights of one input, go as a whole: `channels(0)` for Flax's.

    Raises:
        ValueError: by `prune`, for the kernel of a convolution, which has channels.
    """

    def __repr__(self) -> str:
        return "rows()"

    def along(self, axes: Axes) -> Gridded:
        """Along the inputs."""
        if axes.spatial:
            raise ValueError("a convolution has no rows, but input channels: `channels()`")
        return Along(axes.input or axes.output, "rows()")


n_of_m, blocks, channels, filters, rows = NOfM, Blocks, Channels, Filters, Rows
