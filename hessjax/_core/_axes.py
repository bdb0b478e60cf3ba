"""What the axes of one leaf mean, and its layers where it stacks several."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from hessjax._core import _sharding
from hessjax._core._attention import Role

Kind: TypeAlias = Literal["kernel", "embedding", "vector"]


class Attention(NamedTuple):
    """What a leaf is in an attention.

    Attributes:
        root: the path of the module.
        role: which projection it belongs to.
        head: the axis of one layer that counts heads, or heads and their entries; None for the bias of the
            output, which has none.
        is_split: whether heads have an axis of their own.
        has_output: whether the module has an output that is known.
        interleaved: whether query, key and value lie side by side head by head, in one axis.
    """

    root: str
    role: Role
    head: int | None
    is_split: bool
    has_output: bool
    interleaved: bool = False


class Axes(NamedTuple):
    """What the axes of a leaf mean.

    A leaf may stack layers, as `nn.scan` and a vmapped `init` make them. All axes but `stack` are counted in
    the shape of one layer, from the front.

    Attributes:
        path: of the leaf.
        shape: of the leaf, stack and all.
        stack: the axes of the leaf along which layers lie side by side.
        spatial: those of a convolution's window.
        input: the input features, which a product sums over.
        output: the output features, of which each is a filter.
        kind: a kernel, a table of embeddings, or a vector: a bias, a scale, whatever has no inputs.
        attention: what it is in an attention, or None.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    spatial: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    kind: Kind
    attention: Attention | None = None

    @property
    def layer(self) -> tuple[int, ...]:
        """The shape of one layer."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.stack)

    @property
    def num_layers(self) -> int:
        """How many layers there are, 1 for a leaf that stacks none."""
        return math.prod(self.shape[axis] for axis in self.stack)

    @property
    def fan(self) -> tuple[int, ...]:
        """What takes part in one product, whose sum and product count neurons and pairs of them."""
        if self.kind == "vector":
            return self.layer
        both = (math.prod(self.layer[i] for i in axes) for axes in (self.input, self.output))
        return (*(self.layer[i] for i in self.spatial), *both)

    @property
    def within_filters(self) -> tuple[int, ...]:
        """The axes of the whole leaf that a filter extends over."""
        rest = self.unstacked
        return tuple(axis for i, axis in enumerate(rest) if i not in self.output)

    @property
    def unstacked(self) -> tuple[int, ...]:
        """The axes of the whole leaf that are those of a layer."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    def layer_names(self) -> list[str]:
        """The path of every layer: `blocks/Dense_0/kernel[0]`, ...; of the leaf, if it stacks none."""
        if not self.stack:
            return [self.path]
        return [f"{self.path}[{','.join(map(str, index))}]" for index in self.layer_indices()]

    def layer_indices(self) -> list[tuple[int, ...]]:
        """The index of every layer along `stack`."""
        return list(itertools.product(*(range(self.shape[axis]) for axis in self.stack)))

    def in_layer(self, axis: int) -> int:
        """An axis of the leaf, from either end, as an axis of one layer.

        Raises:
            ValueError: if there is no such axis, or it counts layers.
        """
        number = len(self.shape)
        if not -number <= axis < number:
            raise ValueError(f"there is no axis {axis}")
        if axis % number in self.stack:
            raise ValueError(
                f"axis {axis} counts layers; where it does not, say so by "
                f'`axes={{"{self.path}": "..."}}` with a word for every axis'
            )
        return self.unstacked.index(axis % number)


def layers_of(leaf: Shaped[Array, "..."], axes: Axes) -> list[Shaped[Array, "..."]]:
    """The layers that a leaf stacks, one by one; the leaf itself if it stacks none."""
    if not axes.stack:
        return [leaf]
    # By index, not by a reshape, which would gather what is sharded.
    first = jnp.moveaxis(leaf, axes.stack, range(len(axes.stack)))
    if (layout := _sharding.explicit(first)) is not None:
        # An index along an axis that is divided has no layout: these layers come to all devices.
        spec = PartitionSpec(*(None for _ in axes.stack), *layout.spec[len(axes.stack) :])
        first = _sharding.laid_out(first, NamedSharding(layout.mesh, spec))
    return [first[index] for index in axes.layer_indices()]


def stacked(layers: Sequence[Shaped[Array, "..."]], axes: Axes) -> Shaped[Array, "..."]:
    """The inverse of `layers_of`."""
    if not axes.stack:
        return layers[0]
    if len(axes.stack) == 1:
        return jnp.stack(layers, axes.stack[0])
    counts = [axes.shape[i] for i in axes.stack]
    first = jnp.stack(layers).reshape(*counts, *axes.layer)
    return jnp.moveaxis(first, range(len(counts)), axes.stack)
