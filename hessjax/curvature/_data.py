"""Batches made ready for a product: of one size, on their devices, each with what it counts."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from hessjax._core import _tree
from hessjax._core._messages import checked_count, checked_function, shown
from hessjax._core._sources import check_source, length_of, opened
from hessjax.curvature._weights import Weights, batch_weight, check_total, leading_axis


def batches(
    source: Any,
    *,
    with_weights: Callable[[Any, Any], Any] | None = None,
    size: int | None = None,
    sharding: Any = None,
) -> "Batches":
    """A source of data whose batches are filled up to one size, and laid out over devices.

    Whatever takes `batches` takes a loader as it is; this says more about it. A last batch of fewer examples
    compiles everything anew. With `with_weights` it is filled up with copies of its last example, and every
    batch is told which of its examples count, w = 1, and which do not, w = 0. That is exact if the loss is a
    mean by these weights, Σ w ℓ / Σ w; nothing but the loss can see to it, and `hj.check` tells whether it
    does.

    Args:
        source: any source of batches: a list, a loader, or a function that opens one, called for every pass
            (`dataset.as_numpy_iterator`, a generator function). Tensors of other libraries become NumPy
            arrays.
        with_weights: `with_weights(batch, weights) -> batch` puts the weights of the examples, a NumPy array
            (size,), into the batch: `lambda batch, w: (*batch, w)`, or where there is a mask already `lambda
            batch, w: {**batch, "mask": batch["mask"] * w[:, None]}`. None: batches stay as long as they are.
        size: how many examples batches are filled up to. None: as many as the first of the pass holds.
        sharding: a `jax.sharding.Sharding` for all arrays of a batch that have axes, or a tree of them that
            is a prefix of the batch's: `NamedSharding(mesh, PartitionSpec("data"))` cuts the examples.
            Where several processes run each gives its own part of every batch, as
            `jax.make_array_from_process_local_data` takes it, and as many batches as the others.

    Returns:
        A `Batches`, for `over_batches`, `landscape` and `check`, or to be iterated over. It starts afresh
        if `source` does.

    Raises:
        TypeError: `source` is no source of batches; an argument of another kind.
        ValueError: `size` without `with_weights`; at a batch: more examples than `size`; axes that
            `sharding` does not divide; processes that disagree in the number of batches.

    Cost:
        A copy of a batch in the host's memory: a loader may fill the same arrays again.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> import hessjax as hj
        >>> def loader():
        ...     yield np.array([1.0, 2.0, 3.0])
        ...     yield np.array([6.0])
        >>> def loss_fn(w, batch):
        ...     x, weights = batch
        ...     return jnp.sum(weights * x) / jnp.sum(weights) * w**2 / 2
        >>> data = hj.batches(loader, with_weights=lambda x, weights: (x, weights))
        >>> A = hj.over_batches(lambda batch: hj.hessian(loss_fn, jnp.array(1.0), batch), data)
        >>> float(A(jnp.array(1.0)))
        3.0
    """
    check_source(source, "source")
    if isinstance(source, Batches):
        raise TypeError("`source` must be the data itself, got what `batches` returned: call it once.")
    if with_weights is not None:
        checked_function("with_weights", with_weights, "(batch, weights) -> batch")
    if size is not None:
        size = checked_count("size", size)
        if with_weights is None:
            raise ValueError(
                "`size` must come with `with_weights`, the function that says which examples are there: "
                "without weights padding would count as data."
            )
    for leaf in [] if sharding is None else jax.tree.leaves(sharding) or [sharding]:
        if not isinstance(leaf, Sharding):
            raise TypeError(
                "`sharding` must be a `jax.sharding.Sharding`, or a tree of them, such as "
                f"`NamedSharding(mesh, PartitionSpec('data'))`, got {shown(leaf)}."
            )
    return Batches(source, with_weights, size, sharding)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)  # hashed by identity, as its source is
class Batches:
    """What `batches` returns: an iterable of batches.

    Attributes:
        source: where they come from.
        with_weights: what puts the weights of the examples into a batch; None: they are not filled up.
        size: the number of examples in each; None: as in the first.
        sharding: how they lie on devices; None: on the default one.
    """

    source: Any
    with_weights: Callable[[Any, Any], Any] | None = None
    size: int | None = None
    sharding: Any = None

    def __iter__(self) -> Iterator[Any]:
        return (self.placed(batch) for batch, _ in self.filled())

    def __len__(self) -> int:
        if (length := length_of(self.source)) is None:
            raise TypeError(f"a source of type {type(self.source).__name__} has no length")
        return length

    def __repr__(self) -> str:
        return f"Batches of {type(self.source).__name__}"

    def filled(self, argument: str = "source") -> Iterator[tuple[Any, int | None]]:
        """One pass, on the host: every batch, and how many of its examples are there; None: all."""
        size = self.size
        for index, batch in enumerate(opened(self.source, argument)):
            if self.with_weights is None:
                yield batch, None
                continue
            count = leading_axis(batch)
            size = count if size is None else size
            if not 1 <= count <= size:
                raise ValueError(
                    f"batches must hold 1 to {size} examples to be filled up to {size}, but batch {index} "
                    f"has {count}: pass `size`, the most that any holds."
                )
            whole = jax.tree.map(lambda x, more=size - count: _longer(x, more), batch)
            there = (np.arange(size) < count).astype(jnp.result_type(float))
            yield self.with_weights(whole, there), count

    def part(self) -> tuple[Any, Any] | None:
        """Half of the first batch, with its weights: as it is, and filled up; None where there is no such."""
        if self.with_weights is None:
            return None
        batch = next(opened(self.source))
        if (count := leading_axis(batch)) < 2:
            return None
        half = jax.tree.map(lambda x: x[: count // 2] if jnp.ndim(x) else x, batch)
        filled, _ = next(dataclasses.replace(self, source=[half], size=count).filled())
        whole, _ = next(dataclasses.replace(self, source=[half], size=None).filled())
        return whole, filled

    def weight(self, weights: Weights | None, batch: Any, count: int | None, index: int) -> float:
        """How much a batch of `filled` counts, on all processes together."""
        own = batch_weight(weights, batch, index, count)
        return own if self.sharding is None else _of_all(own, index)

    def placed(self, batch: Any) -> Any:
        """The batch on its devices."""
        if self.sharding is None:
            return jax.tree.map(_put, batch)
        return jax.tree.map(
            lambda sharding, part: _laid_out(part, sharding), self.sharding, batch, is_leaf=_is_sharding
        )


def weighed(source: Any, weights: Weights | None) -> Iterator[tuple[float, Any]]:
    """One pass: what each batch counts, and the batch, on its devices; those that do not count are left out.

    Nothing here waits for a device: while a product runs, the next batch is read and put beside it, as long
    as whoever asks for it has started the product and not yet waited for it. No thread does the reading, so
    that what a source raises, and Ctrl-C, arrive where the data is asked for.
    """
    data, argument = _data(source)
    index, total = -1, 0.0
    for index, (batch, count) in enumerate(data.filled(argument)):
        # Read off NumPy's arrays, before they go to a device, and so without waiting for it.
        if weight := data.weight(weights, batch, count, index):
            total += weight
            yield weight, data.placed(batch)
    if data.sharding is not None:
        _of_all(-1.0, index + 1)
    check_total(total, index)


def unweighed(source: Any) -> Iterator[Any]:
    """One pass over all batches, on their devices."""
    data, argument = _data(source)
    return (data.placed(batch) for batch, _ in data.filled(argument))


def _data(source: Any) -> tuple[Batches, str]:
    """As `Batches`, and by which argument the source was given."""
    return (source, "source") if isinstance(source, Batches) else (Batches(source), "batches")


def check_not_filled(source: Any) -> None:
    """Raise a ValueError for batches that are filled up, where nothing would take their weights."""
    if isinstance(source, Batches) and source.with_weights is not None:
        raise ValueError(
            "`batches` must not be filled up by `with_weights` here, where padding would count as data."
        )


# -- filling up and placing ------------------------------------------------------------------------


def _longer(x: Any, more: int) -> Any:
    """With so many copies of the last example: numbers that a loss is used to, as zeros may not be."""
    if not jnp.ndim(x) or not more:
        return x
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _longer(np.asarray(jax.random.key_data(x)), more)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)  # on the host: jax would compile a program for every length
    return np.concatenate([x, np.repeat(x[-1:], more, axis=0)])


def _put(x: Any) -> Any:
    """NumPy's arrays of numbers on the default device; all else stays as it is."""
    if not _is_numbers(x):
        return x
    # A copy of our own: on a CPU jax computes with NumPy's own memory, which a loader may fill again while
    # the product still runs. (`may_alias=False` copies, but has not finished when it returns.)
    own = np.array(x)
    return own if jax.process_count() > 1 else jax.device_put(own)


def _is_numbers(x: Any) -> bool:
    return isinstance(x, np.ndarray) and (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number))


def _is_sharding(x: Any) -> bool:
    return isinstance(x, Sharding)


def _laid_out(part: Any, sharding: Sharding) -> Any:
    paths = zip(_tree.leaf_paths(part), jax.tree.leaves(part), strict=True)
    return jax.tree.unflatten(jax.tree.structure(part), [_shard(x, sharding, path) for path, x in paths])


def _shard(x: Any, sharding: Sharding, path: str) -> Any:
    if not (isinstance(x, jax.Array) or _is_numbers(x)) or not jnp.ndim(x):
        return x
    try:
        if isinstance(x, jax.Array) and (jax.process_count() == 1 or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.array(x))
    except ValueError as error:
        where = "a batch" if path == "." else f"`{path}` of a batch"
        raise ValueError(
            f"`sharding` must fit all arrays of a batch, but {where} is {shown(x)}: fill batches up to one "
            f"size by `with_weights`, or give a tree of shardings. ({error})"
        ) from error


def _of_all(weight: float, index: int) -> float:
    """The sum over all processes; -1 says that this one has no such batch."""
    if jax.process_count() == 1:
        return weight
    # As bits: jax would cut a float64, and counts of tokens pass 2²⁴.
    bits = np.array([weight], np.float64).view(np.uint32)
    found = np.asarray(multihost_utils.process_allgather(bits)).reshape(-1, 2).copy().view(np.float64)
    without = np.flatnonzero(found < 0)
    if 0 < without.size < found.size:
        raise ValueError(
            "`batches` must be as many on every process, but there is no batch "
            f"{index} on {without.tolist()}."
        )
    return float(found.sum())
