"""Patterns: which weights of a leaf go together, and how many of a group may go."""

import fnmatch
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from hessjax import _tree
from hessjax._typing import Params


class Pattern(NamedTuple):
    """A way to cut a leaf into groups of equal size, and what may happen to a group.

    Attributes:
        name: what messages call it. Equal settings give the same functions, so that they share what is
            compiled.
        group: `(leaf) -> (groups, size)`: the weights of each group in a row. It only moves numbers, and
            raises a ValueError for a shape it does not fit.
        ungroup: `(rows, shape) -> leaf`, its inverse.
        at_most: how many weights of a group may go. None: a group goes as a whole, or stays.
        tie: leaves of the same name (not None) have as many groups, and lose the same ones.
    """

    name: str
    group: Callable[[Any], Any]
    ungroup: Callable[[Any, tuple[int, ...]], Any]
    at_most: int | None = None
    tie: str | None = None


PatternRule: TypeAlias = Callable[[str, Any], Pattern]
"""`(path, leaf) -> pattern`: one that depends on the leaf."""

Patterns: TypeAlias = Pattern | Mapping[str, Any] | PatternRule
"""A pattern for all leaves; by glob over paths, the first that matches; or by a function of path and leaf."""


@functools.lru_cache
def unstructured() -> Pattern:
    """Every weight on its own.

    Returns:
        A `Pattern`.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> hj.unstructured().group(jnp.ones((2, 3))).shape
        (6, 1)
    """
    return Pattern("unstructured()", lambda x: x.reshape(-1, 1), lambda rows, shape: rows.reshape(shape))


@functools.lru_cache
def n_of_m(n: int, m: int, axis: int = 0) -> Pattern:
    """At least n of every m consecutive weights along an axis stay: 2:4 and its relatives.

    A ranking takes the lowest scores as always, but never more than m − n out of a group; at the sparsity
    1 − n/m every group has exactly n weights left.

    Args:
        n: how many stay.
        m: the size of a group.
        axis: along which they lie. Hardware wants the axis that is summed over, which is 0 for a Dense
            kernel.

    Returns:
        A `Pattern`. `prune` raises a ValueError if m does not divide the axis, or if the sparsity is above
        1 − n/m.

    Raises:
        ValueError: unless 0 < n < m.

    References:
        Mishra et al., Accelerating sparse deep neural networks (2021), arXiv 2104.08378: 2:4.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]])}
        >>> hj.prune_once(params, hj.magnitude(), 0.5, pattern=hj.n_of_m(2, 4, axis=1)).params["kernel"]
        Array([[9., 8., 0., 0., 0., 0., 3., 4.]], dtype=float32)
    """
    if not 0 < n < m:
        raise ValueError(f"`n` must be between 1 and m - 1, how many of `m` stay, got {n} of {m}.")

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups m"]:
        last = jnp.moveaxis(x, _axis(axis, x.shape), -1)
        _check_divides(m, last.shape[-1], f"axis {axis}")
        return last.reshape(-1, m)

    def ungroup(rows: Shaped[Array, "groups m"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        place = _axis(axis, shape)
        last = (*shape[:place], *shape[place + 1 :], shape[place])
        return jnp.moveaxis(rows.reshape(last), -1, place)

    return Pattern(f"n_of_m({n}, {m}, axis={axis})", group, ungroup, at_most=m - n)


def blocks(shape: tuple[int, ...]) -> Pattern:
    """Rectangular blocks over the last axes of a leaf go as a whole.

    Args:
        shape: of one block, `(32, 32)`; axes before the last `len(shape)` are cut into single indices.

    Returns:
        A `Pattern`. `prune` raises a ValueError for a leaf with fewer axes, or axes it does not divide.

    Raises:
        ValueError: if a size is below 1.

    References:
        Narang et al., Block-sparse recurrent neural networks (2017), arXiv 1711.02782.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 1.0, 5.0, 0.5], [1.0, 1.0, 0.1, 0.1]])}
        >>> hj.prune_once(params, hj.magnitude(), 0.5, pattern=hj.blocks((2, 2))).params["kernel"]
        Array([[0. , 0. , 5. , 0.5],
               [0. , 0. , 0.1, 0.1]], dtype=float32)
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"`shape` must be sizes of at least 1, of one block, got {shape}.")
    return _blocks(tuple(shape))


@functools.lru_cache
def _blocks(shape: tuple[int, ...]) -> Pattern:
    k = len(shape)

    def cut(full: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The leaf's shape with each of its last axes in two, and the order that brings blocks together."""
        if len(full) < k:
            raise ValueError(f"it needs {k} axes, and there are {len(full)}")
        lead = len(full) - k
        for place, size in enumerate(shape):
            _check_divides(size, full[lead + place], f"axis {lead + place}")
        pairs = [part for n, size in zip(full[lead:], shape, strict=True) for part in (n // size, size)]
        outer, inner = range(lead, lead + 2 * k, 2), range(lead + 1, lead + 2 * k, 2)
        return (*full[:lead], *pairs), (*range(lead), *outer, *inner)

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        fine, order = cut(x.shape)
        return x.reshape(fine).transpose(order).reshape(-1, math.prod(shape))

    def ungroup(rows: Shaped[Array, "groups size"], full: tuple[int, ...]) -> Shaped[Array, "..."]:
        fine, order = cut(full)
        moved = rows.reshape([fine[i] for i in order])
        return moved.transpose([order.index(i) for i in range(len(order))]).reshape(full)

    return Pattern(f"blocks({shape})", group, ungroup)


@functools.lru_cache
def channels(axis: int = -2) -> Pattern:
    """All weights with the same index along an axis go as a whole.

    Args:
        axis: -2 for the input channels of a Flax kernel, -1 for the output channels (`filters()`).

    Returns:
        A `Pattern`. `prune` raises a ValueError for a leaf without that axis.

    References:
        Li et al., Pruning filters for efficient ConvNets (2016), arXiv 1608.08710.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> params = {"kernel": jnp.array([[1.0, 2.0, 0.5], [1.0, 3.0, 2.0]])}
        >>> hj.prune_once(params, hj.magnitude(), 1 / 3, pattern=hj.channels(-1)).params["kernel"]
        Array([[0. , 2. , 0.5],
               [0. , 3. , 2. ]], dtype=float32)
    """

    def group(x: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        first = jnp.moveaxis(x, _axis(axis, x.shape), 0)
        return first.reshape(first.shape[0], math.prod(first.shape[1:]))

    def ungroup(rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        place = _axis(axis, shape)
        rest = (*shape[:place], *shape[place + 1 :])
        return jnp.moveaxis(rows.reshape(shape[place], *rest), 0, place)

    return Pattern(f"channels({axis})", group, ungroup)


def filters() -> Pattern:
    """The output channels of a Flax kernel, its last axis, go as a whole: `channels(-1)`.

    Returns:
        A `Pattern`.
    """
    return channels(-1)._replace(name="filters()")


def rows() -> Pattern:
    """The rows of a matrix, its first axis, go as a whole: `channels(0)`.

    Returns:
        A `Pattern`.
    """
    return channels(0)._replace(name="rows()")


def heads(num_heads: int | None = None, out: str = "*out*") -> PatternRule:
    """Attention heads go as a whole: the same ones from query, key, value and output.

    Leaves with the same parent's parent belong to one attention: `layer_0/attention/{query,key,value,out}
    /kernel`. Restrict `where` to them.

    Args:
        num_heads: None for kernels with an axis of heads, as Flax's attention has them: second to last, and
            the first of the output's. A number, for kernels that have heads and their entries in one axis:
            the last, and the output's first.
        out: a glob over paths, for the output projection.

    Returns:
        `(path, leaf) -> Pattern`.

    References:
        Michel et al., Are sixteen heads really better than one? (2019), arXiv 1905.10650.

    Example:
        >>> import jax.numpy as jnp, hessjax as hj
        >>> rule = hj.heads()
        >>> rule("attention/query/kernel", jnp.ones((8, 4, 2))).group(jnp.ones((8, 4, 2))).shape
        (4, 16)
        >>> rule("attention/out/kernel", jnp.ones((4, 2, 8))).tie
        'attention'
    """

    def rule(path: str, leaf: Any) -> Pattern:
        tie = path.rsplit("/", 2)[0]
        is_out = fnmatch.fnmatchcase(path, out)
        if num_heads is None:
            return channels(0 if is_out else -2)._replace(name="heads()", tie=tie)
        return _fused_heads(num_heads, 0 if is_out else -1)._replace(tie=tie)

    return rule


@functools.lru_cache
def _fused_heads(num_heads: int, axis: int) -> Pattern:
    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        place = _axis(axis, shape)
        _check_divides(num_heads, shape[place], f"axis {axis}")
        return (*shape[:place], num_heads, shape[place] // num_heads, *shape[place + 1 :])

    whole = channels(0 if axis == 0 else -2)
    return Pattern(
        f"heads({num_heads})",
        lambda x: whole.group(x.reshape(split(x.shape))),
        lambda rows, shape: whole.ungroup(rows, split(shape)).reshape(shape),
    )


def patterns_of(pattern: Patterns, tree: Params) -> list[Pattern]:
    """The pattern of every leaf, each fitting it.

    Raises:
        ValueError: if a glob matches no leaf, a leaf matches none, or a pattern does not fit its leaf.
    """
    named = [(_tree.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    rule = _rule(pattern, [path for path, _ in named])
    found = [rule(path, leaf) for path, leaf in named]
    for (path, leaf), each in zip(named, found, strict=True):
        try:
            jax.eval_shape(each.group, leaf)
        except ValueError as error:
            raise ValueError(
                f"`pattern` must fit every leaf that is pruned, but {each.name} does not fit {path} of shape "
                f"{jnp.shape(leaf)}: {error}. Choose the leaves by `where`, or give one pattern per path: "
                '`{"conv/*": filters(), "*": unstructured()}`.'
            ) from None
    return found


def _rule(pattern: Patterns, paths: list[str]) -> PatternRule:
    if isinstance(pattern, Pattern):
        return lambda path, leaf: pattern
    if not isinstance(pattern, Mapping):
        return pattern
    for glob in pattern:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths):
            raise ValueError(
                f"`pattern` must match by every path, but `{glob}` matches none of: {', '.join(paths)}."
            )

    def look_up(path: str, leaf: Any) -> Pattern:
        for glob, found in pattern.items():
            if fnmatch.fnmatchcase(path, glob):
                return _rule(found, paths)(path, leaf)
        raise ValueError(
            f"`pattern` must have an entry for every leaf that is pruned, but none matches {path}."
        )

    return look_up


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"there is no axis {axis}")
    return axis % len(shape)


def _check_divides(size: int, length: int, name: str) -> None:
    if length % size:
        raise ValueError(f"{size} does not divide {name}, which has {length}")
