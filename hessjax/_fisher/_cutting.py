"""Blocks of weights on many devices: cut from what each of them holds, and no more sent than must be.

A block is made of consecutive entries of a leaf in row-major order, wherever these lie: the numbers are those
of one device. Where the entries that a device holds are whole blocks, as they are if `width` divides the
stretches in which they follow each other, nothing is sent. Else each device first exchanges its share of the
leaf for an equally large stretch of it (all-to-all), and then what is left of its last block with its
neighbour. Blocks are filled up with empty ones, so that all devices hold equally many.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hessjax._fisher._shards import Axes, Home, Shards, padded, size_of


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How a leaf is cut into blocks: each device cuts what it holds.

    Attributes:
        shards: the layout of its gradients.
        shape: of the leaf.
        width: of a block.
    """

    shards: Shards
    shape: tuple[int, ...]
    width: int

    @property
    def home(self) -> Home:
        """Where the blocks lie."""
        mesh, used = self.shards.mesh, {*self._own, *self.shards.examples}
        return Home(mesh, tuple(name for name in mesh.axis_names if name in used))

    def cut(self, x: Array, examples: Axes) -> Float[Array, "blocks rows width"]:
        """The blocks of this device, from its part of several vectors that are spread over these axes."""
        flat = x.reshape(len(x), -1) if self._is_local else self._stretch(x)
        blocks = padded(flat, self.width, 1).reshape(len(x), -1, self.width)
        if not self.shards.examples:
            return blocks.swapaxes(0, 1)
        blocks = padded(blocks, self.shards.num_parts, 1)
        if examples:
            return jax.lax.all_to_all(blocks, examples, 1, 0, tiled=True).swapaxes(0, 1)
        return self._own_part(blocks, self.shards.examples, 1).swapaxes(0, 1)

    def join(self, blocks: Float[Array, "blocks width"]) -> Array:
        """The part of the leaf on this device, from its blocks."""
        if self.shards.examples:
            blocks = jax.lax.all_gather(blocks, self.shards.examples, tiled=True)
        flat = blocks[: self._slots].reshape(1, -1)
        if not self._is_local:
            return self._unstretch(flat)
        return flat[0, : math.prod(self._local)].reshape(self._local)

    @property
    def slots(self) -> int:
        """The blocks of each device, with those that fill up."""
        return -(-self._slots // self.shards.num_parts)

    def order(self) -> np.ndarray:
        """(parts of the home, slots): which block of the leaf lies where; −1 for those that fill up."""
        number = -(-math.prod(self.shape) // self.width)
        if self._is_local and self._own:
            numbers = self._local_order(number)
        else:
            numbers = np.pad(np.arange(number), (0, self._parts * self._slots - number), constant_values=-1)
            numbers = numbers.reshape(self._parts, self._slots)
        fill = self.slots * self.shards.num_parts - self._slots
        numbers = np.pad(numbers, ((0, 0), (0, fill)), constant_values=-1)
        axes, home = (*self._stretch_axes, *self.shards.examples), self.home
        numbers = numbers.reshape(*(size_of(home.mesh, (name,)) for name in axes), self.slots)
        places = [axes.index(name) for name in home.axes]
        return numbers.transpose(*places, len(axes)).reshape(home.size, self.slots)

    # -- what is where -----------------------------------------------------------------------------

    @functools.cached_property
    def _own(self) -> Axes:
        return tuple(name for axes in self.shards.spec for name in axes)

    @functools.cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(size_of(self.shards.mesh, axes) for axes in self.shards.spec)

    @property
    def _parts(self) -> int:
        return math.prod(self._counts)

    @property
    def _local(self) -> tuple[int, ...]:
        return tuple(n // count for n, count in zip(self.shape, self._counts, strict=True))

    @property
    def _last(self) -> int:
        """The last axis that is spread over devices."""
        return max((i for i, axes in enumerate(self.shards.spec) if axes), default=0)

    @functools.cached_property
    def _is_local(self) -> bool:
        """Whether the entries of a device are whole blocks: they follow each other in stretches."""
        return not self._own or math.prod(self._local[self._last :]) % self.width == 0

    @functools.cached_property
    def _slots(self) -> int:
        number = -(-math.prod(self.shape) // self.width)
        return -(-number // self._parts)

    def _local_order(self, number: int) -> np.ndarray:
        last, counts = self._last, self._counts[: self._last + 1]
        grid = (*self.shape[:last], math.prod(self.shape[last:]) // self.width)
        fine = [part for n, count in zip(grid, counts, strict=True) for part in (count, n // count)]
        numbers = np.arange(number).reshape(fine)
        axes = range(len(fine))
        return numbers.transpose(*axes[::2], *axes[1::2]).reshape(self._parts, self._slots)

    # -- exchanges ---------------------------------------------------------------------------------

    @functools.cached_property
    def _others(self) -> tuple[int, ...]:
        """Axes before the last that are spread over devices too, and whose parts must come to the last."""
        found = tuple(i for i in range(self._last) if self.shards.spec[i])
        # Stretches of what one device holds of the first axis follow each other as they are.
        divides = math.prod(self._local[: self._last]) % self._counts[self._last] == 0
        return () if found == (0,) and divides else found

    @property
    def _last_axes(self) -> Axes:
        spec = self.shards.spec
        return (*spec[self._last], *(name for i in self._others for name in spec[i]))

    @property
    def _stretch_axes(self) -> Axes:
        """In which order the devices hold stretches of the leaf."""
        if self._is_local or not self._can_exchange or not self._last:
            return self._own
        return (*(() if self._others else self.shards.spec[0]), *self._last_axes)

    @property
    def _collected(self) -> int:
        return math.prod(self._counts[i] for i in self._others)

    @property
    def _can_exchange(self) -> bool:
        return self._local[self._last] % self._collected == 0

    @property
    def _lines(self) -> int:
        """How many stretches there are of the last axis that is spread over devices, filled up."""
        lead = self.shape if self._others else self._local
        number = math.prod(lead[: self._last])
        return number + -number % size_of(self.shards.mesh, self._last_axes)

    def _stretch(self, x: Array) -> Float[Array, "rows n"]:
        """A stretch of the leaf, of so many blocks as the device is to have."""
        rows, last, size = len(x), self._last, self._slots * self.width
        if not self._can_exchange:
            for axis, names in enumerate(self.shards.spec):
                x = jax.lax.all_gather(x, names, axis=axis + 1, tiled=True) if names else x
            return self._own_part(padded(x.reshape(rows, -1), self._parts * size, 1), self._own, 1)
        for axis in self._others:
            x = jax.lax.all_to_all(x, self.shards.spec[axis], last + 1, axis + 1, tiled=True)
        if last:
            x = x.reshape(rows, math.prod(x.shape[1 : last + 1]), x.shape[last + 1], -1)
            x = jax.lax.all_to_all(padded(x, self._lines, 1), self._last_axes, 1, 2, tiled=True)
        return self._shifted(x.reshape(rows, -1), size)

    def _unstretch(self, flat: Float[Array, "1 n"]) -> Array:
        last, spec, local = self._last, self.shards.spec, list(self._local)
        if not self._can_exchange:
            whole = jax.lax.all_gather(flat[0], self._own, tiled=True)
            x = whole[: math.prod(self.shape)].reshape(self.shape)
            for axis, names in enumerate(spec):
                x = self._own_part(x, names, axis) if names else x
            return x
        if not last:
            return self._shifted(flat, math.prod(local)).reshape(local)
        line, rest = self.shape[last], math.prod(self.shape[last + 1 :])
        number = self._lines // size_of(self.shards.mesh, self._last_axes)
        x = self._shifted(flat, number * line * rest).reshape(number, line, rest)
        x = jax.lax.all_to_all(x, self._last_axes, 1, 0, tiled=True)
        for axis in self._others:
            local[axis] = self.shape[axis]
        local[last] //= self._collected
        x = x[: math.prod(local[:last])].reshape(local)
        for axis in reversed(self._others):
            x = jax.lax.all_to_all(x, spec[axis], axis, last, tiled=True)
        return x

    def _shifted(self, x: Float[Array, "rows n"], size: int) -> Float[Array, "rows size"]:
        """Stretches of another length, of what lies end to end on the devices; zero beyond the end."""
        axes, number, more = self._stretch_axes, self._parts, size - x.shape[1]
        if not more:
            return x
        # At most `sent` numbers come from the next devices, or the previous ones, where all stretches before
        # are longer, or shorter, by `more`.
        sent = min(x.shape[1], number * abs(more))
        hops = min(-(-number * abs(more) // x.shape[1]), number - 1)
        start = jax.lax.axis_index(axes) * more
        if more > 0:
            theirs = [self._sent(x[:, :sent], -hop) for hop in range(1, hops + 1)]
            whole = jnp.concatenate([x, *theirs, jnp.zeros((len(x), size), x.dtype)], axis=1)
            return jax.lax.dynamic_slice_in_dim(whole, start, size, 1)
        theirs = [self._sent(x[:, -sent:], hop) for hop in range(hops, 0, -1)]
        return jax.lax.dynamic_slice_in_dim(
            jnp.concatenate([*theirs, x], axis=1), hops * sent + start, size, 1
        )

    def _sent(self, x: Array, hop: int) -> Array:
        """What the device has that lies so many stretches before this one."""
        mesh, axes = self.shards.mesh, self._stretch_axes
        # jax counts devices in the order of the mesh's axes, whatever that of `axes` is.
        names = tuple(name for name in mesh.axis_names if name in axes)
        numbers = np.arange(self._parts).reshape([mesh.shape[name] for name in names])
        numbers = numbers.transpose([names.index(name) for name in axes]).reshape(-1)
        places = [i for i in range(self._parts) if 0 <= i + hop < self._parts]
        return jax.lax.ppermute(x, names, [(int(numbers[i]), int(numbers[i + hop])) for i in places])

    def _own_part(self, x: Array, axes: Axes, axis: int) -> Array:
        size = x.shape[axis] // size_of(self.shards.mesh, axes)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis)
