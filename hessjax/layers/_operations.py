"""Operations that a leaf enters linearly: its entries as matrices, what goes in, and what comes back."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax._core._tables import shape_text
from hessjax.program._origins import Origin
from hessjax.program._program import Operation


@dataclasses.dataclass(frozen=True, eq=False)
class Kind(abc.ABC):
    """One operation, and the leaf in it as a stack of matrices W: y = Σ a W at every position.

    Attributes:
        operation: the operation.
        operand: which of its operands the leaf is.
        shape: of the leaf as it enters, 1 along the axes that it is copied along.
    """

    operation: Operation
    operand: int
    shape: tuple[int, ...]

    @property
    @abc.abstractmethod
    def positions(self) -> tuple[int, ...]:
        """The shape of the positions that share the leaf."""

    @abc.abstractmethod
    def matrix(self, origin: Origin) -> Origin:
        """The moves that lead on from the operand to (stack, inputs, outputs)."""

    @abc.abstractmethod
    def inputs(self, data: Array) -> Array:
        """a, from the other operand: (positions..., stack, inputs); of an embedding without the last axis."""

    @abc.abstractmethod
    def gradients(self, output: Array, data: Array) -> Array:
        """g, from the gradient in the result: (positions..., stack, outputs)."""

    @abc.abstractmethod
    def words(self) -> str:
        """A line that says what it does."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Kind):
    """A matrix product: any axes contracted, free and shared with the data, which stacks matrices."""

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self._sorted(self.operand)

    def _sorted(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """An operand's batch axes, contracted axes and free ones."""
        contracted, batch = (tuple(x[operand]) for x in self.operation.params["dimension_numbers"])
        count = len(self.operation.inputs[operand].shape)
        return batch, contracted, tuple(a for a in range(count) if a not in batch + contracted)

    def _sizes(self, operand: int) -> list[tuple[int, ...]]:
        shape = self.operation.inputs[operand].shape
        return [tuple(shape[a] for a in axes) for axes in self._sorted(operand)]

    @property
    def positions(self) -> tuple[int, ...]:
        return self._sizes(1 - self.operand)[2]

    @property
    def _lengths(self) -> tuple[int, int, int]:
        stack, inputs, outputs = map(math.prod, self._sizes(self.operand))
        return stack, inputs, outputs

    def matrix(self, origin: Origin) -> Origin:
        batch, contracted, free = self._axes
        return origin.then("transpose", (*batch, *contracted, *free)).then("reshape", self._lengths)

    def inputs(self, data: Array) -> Array:
        batch, contracted, free = self._sorted(1 - self.operand)
        stack, inputs, _ = self._lengths
        return data.transpose(*free, *batch, *contracted).reshape(*self.positions, stack, inputs)

    def gradients(self, output: Array, data: Array) -> Array:
        batch, ours, theirs = len(self._axes[0]), len(self._axes[2]), len(self.positions)
        # The result has the batch axes, then the left operand's free ones, then the right one's.
        start = batch if self.operand else batch + ours
        positions = range(start, start + theirs)
        rest = [a for a in range(output.ndim) if a not in positions]
        stack, _, outputs = self._lengths
        return output.transpose(*positions, *rest).reshape(*self.positions, stack, outputs)

    def words(self) -> str:
        stack, inputs, outputs = self._lengths
        return f"dense {inputs} → {outputs}" if stack == 1 else f"einsum {stack} × ({inputs} → {outputs})"


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution(Kind):
    """A convolution with this kernel: the inputs of a position are the patch under the window."""

    @property
    def _groups(self) -> int:
        groups: int = self.operation.params["feature_group_count"]
        return groups

    @property
    def _kernel(self) -> tuple[int, ...]:
        """(outputs, inputs of a group, window...)."""
        shape = self.operation.inputs[1].shape
        return tuple(shape[a] for a in self.operation.params["dimension_numbers"].rhs_spec)

    @property
    def _space(self) -> tuple[int, ...]:
        shape = self.operation.outputs[0].shape
        return tuple(shape[a] for a in self.operation.params["dimension_numbers"].out_spec[2:])

    @property
    def positions(self) -> tuple[int, ...]:
        batch = self.operation.params["dimension_numbers"].out_spec[0]
        return (self.operation.outputs[0].shape[batch], *self._space)

    def matrix(self, origin: Origin) -> Origin:
        outputs, *inputs = self._kernel
        shape = (self._groups, outputs // self._groups, math.prod(inputs))
        order = self.operation.params["dimension_numbers"].rhs_spec
        return origin.then("transpose", order).then("reshape", shape).then("transpose", (0, 2, 1))

    def inputs(self, data: Array) -> Array:
        params = self.operation.params
        x = data.transpose(params["dimension_numbers"].lhs_spec)
        inside = [
            (low, high, n - 1)
            for (low, high), n in zip(params["padding"], params["lhs_dilation"], strict=True)
        ]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *inside])
        # Slices, not a convolution with unit kernels, which a CPU takes ten times as long for.
        offsets = itertools.product(*map(range, self._kernel[2:]))
        patches = jnp.stack([self._under(x, offset) for offset in offsets], axis=-1)
        _, channels, *_, window = patches.shape
        patches = jnp.moveaxis(patches, 1, -2)
        return patches.reshape(*self.positions, self._groups, channels // self._groups * window)

    def _under(self, x: Array, offset: tuple[int, ...]) -> Array:
        """What lies under one place of the window, at every position."""
        params = self.operation.params
        start = [o * d for o, d in zip(offset, params["rhs_dilation"], strict=True)]
        strides = params["window_strides"]
        limit = [s + (n - 1) * k + 1 for s, n, k in zip(start, self._space, strides, strict=True)]
        return jax.lax.slice(x, (0, 0, *start), (*x.shape[:2], *limit), (1, 1, *strides))

    def gradients(self, output: Array, data: Array) -> Array:
        batch, feature, *space = self.operation.params["dimension_numbers"].out_spec
        output = output.transpose(batch, *space, feature)
        return output.reshape(*output.shape[:-1], self._groups, -1)

    def words(self) -> str:
        params, (outputs, inputs, *window) = self.operation.params, self._kernel
        said = [f"conv {shape_text(tuple(window)) or '1'}, {inputs * self._groups} → {outputs}"]
        counts = {
            "stride": params["window_strides"],
            "dilation": params["rhs_dilation"],
            "input dilation": params["lhs_dilation"],
        }
        said += [
            f"{name} {n[0] if len(set(n)) == 1 else shape_text(n)}"
            for name, n in counts.items()
            if set(n) - {1}
        ]
        return ", ".join([*said, *([f"{self._groups} groups"] if self._groups > 1 else [])])


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding(Kind):
    """Rows of a table, by number: a product with one-hot vectors, which are never formed."""

    @property
    def _axis(self) -> int:
        axis: int = self.operation.params["dimension_numbers"].start_index_map[0]
        return axis

    @property
    def positions(self) -> tuple[int, ...]:
        return self.operation.inputs[1].shape[:-1]

    def matrix(self, origin: Origin) -> Origin:
        rest = [a for a in range(len(origin.shape)) if a != self._axis]
        rows = origin.shape[self._axis]
        outputs = math.prod(origin.shape) // max(rows, 1)
        return origin.then("transpose", (self._axis, *rest)).then("reshape", (1, rows, outputs))

    def inputs(self, data: Array) -> Array:
        return data[..., 0][..., None]

    def gradients(self, output: Array, data: Array) -> Array:
        offsets = self.operation.params["dimension_numbers"].offset_dims
        positions = [a for a in range(output.ndim) if a not in offsets]
        output = output.transpose(*positions, *offsets)
        return output.reshape(*output.shape[: len(positions)], 1, -1)

    def words(self) -> str:
        shape = self.operation.inputs[0].shape
        return f"embedding {shape[self._axis]} → {math.prod(shape) // max(shape[self._axis], 1)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Bias(Kind):
    """A sum with data: what goes in is 1, at every position."""

    @property
    def _copied(self) -> tuple[int, ...]:
        # A number meets an array as it is, without axes.
        shape = self.shape or (1,) * len(self.operation.outputs[0].shape)
        return tuple(axis for axis, n in enumerate(shape) if n == 1)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(self.operation.outputs[0].shape[axis] for axis in self._copied)

    def matrix(self, origin: Origin) -> Origin:
        return origin.then("reshape", (1, 1, math.prod(self.shape)))

    def inputs(self, data: Array) -> Array:
        return jnp.ones((*self.positions, 1, 1))

    def gradients(self, output: Array, data: Array) -> Array:
        rest = [axis for axis in range(output.ndim) if axis not in self._copied]
        output = output.transpose(*self._copied, *rest).reshape(*self.positions, 1, math.prod(self.shape))
        return -output if self.operation.name == "sub" and self.operand == 1 else output

    def words(self) -> str:
        return f"bias {math.prod(self.shape)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Bias):
    """A product with data, or a quotient, entry by entry: a bias whose gradients are g · x or g / x."""

    def gradients(self, output: Array, data: Array) -> Array:
        product = output / data if self.operation.name == "div" else output * data
        return super().gradients(product, data)

    def words(self) -> str:
        return f"scale {math.prod(self.shape)}"


# -- which it is -----------------------------------------------------------------------------------


def kind_of(operation: Operation, operand: int, shape: tuple[int, ...]) -> Kind | str:
    """What the operation does with a leaf that enters it in this shape, or why that is nothing known."""
    known = _KINDS.get(operation.name)
    if known is None:
        return f"enters `{operation.name}`, where it is no factor, term or table"
    return known(operation, operand, shape)


def _is_whole(operation: Operation, operand: int, shape: tuple[int, ...]) -> bool:
    return shape == operation.inputs[operand].shape


_COPIED = "is copied along an axis before it enters `{}`"


def _dense(operation: Operation, operand: int, shape: tuple[int, ...]) -> Kind | str:
    if not _is_whole(operation, operand, shape):
        return _COPIED.format(operation.name)
    return Dense(operation, operand, shape)


def _convolution(operation: Operation, operand: int, shape: tuple[int, ...]) -> Kind | str:
    if operand != 1 or operation.params["batch_group_count"] != 1:
        return "enters a convolution as its input, or one with groups of examples"
    if not _is_whole(operation, operand, shape):
        return _COPIED.format(operation.name)
    return Convolution(operation, operand, shape)


def _embedding(operation: Operation, operand: int, shape: tuple[int, ...]) -> Kind | str:
    numbers, sizes = operation.params["dimension_numbers"], operation.params["slice_sizes"]
    axis = numbers.start_index_map
    rest_is_whole = all(n == shape[a] for a, n in enumerate(sizes) if a not in axis)
    is_lookup = operand == 0 and len(axis) == 1 and tuple(numbers.collapsed_slice_dims) == tuple(axis)
    if not is_lookup or numbers.operand_batching_dims or not rest_is_whole:
        return "enters `gather` otherwise than as a table whose rows are taken whole"
    return (
        Embedding(operation, operand, shape)
        if _is_whole(operation, operand, shape)
        else _COPIED.format("gather")
    )


def _quotient(operation: Operation, operand: int, shape: tuple[int, ...]) -> Kind | str:
    return "divides, which is not linear" if operand else Scale(operation, operand, shape)


_KINDS: dict[str, Callable[[Operation, int, tuple[int, ...]], Kind | str]] = {
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    "gather": _embedding,
    **dict.fromkeys(["add", "sub", "add_any"], Bias),
    "div": _quotient,
    "mul": Scale,
}
