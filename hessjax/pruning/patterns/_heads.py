"""Attention heads: the same ones from query, key, value and output, however their axes are laid."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from hessjax._core._axes import Attention, Axes
from hessjax._core._messages import checked_count
from hessjax._core._types import assign, settings
from hessjax.pruning.patterns._pattern import Grid, Gridded, Kept, Pattern, check_divides, place_of


@settings()
class Heads(Pattern):
    """Attention heads go as a whole: the same ones from query, key, value and output.

    Which leaves these are is told by their own names in the attention, `query`, `q_proj`, `c_attn`, `qkv`,
    `out`, `o_proj`, `c_proj`, ..., and BERT's `self/query` and `output/dense`; for other names say it by
    `axes`. Restrict `where` to them. Biases of query, key and value lose the entries of a head, that of the
    output has none and stays as it is.

    With fewer heads of keys and values than of queries, a key and value go with all queries that share them.

    Args:
        num_heads: of the queries. None for kernels with an axis of heads, as Flax's attention has them;
            needed for those that have heads and their entries in one axis.
        num_kv_heads: of the keys and values. None: as many as of the queries.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if a number is below 1, or `num_kv_heads` does not divide `num_heads`; by `prune`, for a
            leaf that has no such heads, an attention without an output that is known, or leaves of one
            attention that disagree about their heads (each is named, with how many it has).

    References:
        Michel et al., Are sixteen heads really better than one? (2019), arXiv 1905.10650. Ainslie et al., GQA
        (2023), arXiv 2305.13245: fewer keys and values.

    Example:
        >>> import jax, jax.numpy as jnp, hessjax as hj
        >>> shapes = {"query": (8, 4, 2), "key": (8, 4, 2), "value": (8, 4, 2), "out": (4, 2, 8)}
        >>> params = {name: {"kernel": jax.random.normal(jax.random.key(0), s)} for name, s in shapes.items()}
        >>> mask = hj.prune_once(params, hj.saliencies.magnitude(), 0.5, pattern=hj.patterns.heads()).mask
        >>> mask["query"]["kernel"].all((0, 2)).tolist() == mask["out"]["kernel"].all((1, 2)).tolist()
        True
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self, name) is not None:
                assign(self, **{name: checked_count(name, getattr(self, name))})
        if self.num_heads and self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"`num_kv_heads` must divide `num_heads`, which is {self.num_heads}, got {self.num_kv_heads}."
            )

    def __repr__(self) -> str:
        first = "" if self.num_heads is None else str(self.num_heads)
        second = "" if self.num_kv_heads is None else f"num_kv_heads={self.num_kv_heads}"
        return f"heads({', '.join(filter(None, (first, second)))})"

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """Of no leaf without its place in an attention."""
        raise ValueError("heads are those of an attention: they need a tree with its query, key and value")

    def along(self, axes: Axes) -> Pattern:
        """The heads of one leaf, tied to those of its attention."""
        found = axes.attention
        if found is None:
            raise ValueError(
                "it belongs to no attention that is known by name; `axes` can say that it does: "
                f'`axes={{"{axes.path}": "in head entry"}}`'
            )
        if not found.has_output:
            raise ValueError(
                f"the attention {found.root or 'at the root'} has no output that is known by name; `axes` "
                'can say which leaf it is, by "head entry out" or, with both in one axis, "heads out"'
            )
        if found.head is None:
            return Kept()
        return (
            self._split(axes, found, found.head) if found.is_split else self._fused(axes, found, found.head)
        )

    def _split(self, axes: Axes, found: Attention, head: int) -> Pattern:
        """Of a leaf with an axis of heads."""
        count = axes.layer[head]
        is_query = found.role not in ("key", "value", "key and value")
        told = self.num_heads if is_query else self.num_kv_heads or self.num_heads
        if told is not None and told != count:
            name = "num_kv_heads" if not is_query and self.num_kv_heads else "num_heads"
            raise ValueError(f"it has {count} heads, and `{name}` is {told}")
        groups = self.num_kv_heads or count
        check_divides(groups, count, "its axis of heads")
        entries = math.prod(axes.layer[i] for i in range(head + 1, len(axes.layer)))
        return HeadGroups(
            head, groups, (1,), repr(self), found.root, count, entries if found.role != "output" else 0
        )

    def _fused(self, axes: Axes, found: Attention, head: int) -> Pattern:
        """Of a leaf with heads and their entries in one axis."""
        length = axes.layer[head]
        if self.num_heads is None:
            raise ValueError(
                f"heads and their entries share an axis of {length}: say how many heads there are, "
                "`heads(num_heads=...)`"
            )
        kv = self.num_kv_heads or self.num_heads
        parts = {"key": (kv,), "value": (kv,), "key and value": (kv, kv)}.get(found.role, (self.num_heads,))
        if found.role == "query, key and value":
            parts = (self.num_heads, kv, kv)
        if length % sum(parts):
            raise ValueError(f"{sum(parts)} does not divide axis {head}, which has {length}, into heads")
        entries = length // sum(parts)
        if found.interleaved:
            if kv != self.num_heads:
                raise ValueError("query, key and value lie head by head in it, with as many heads of each")
            parts, entries = (self.num_heads,), length // self.num_heads
        return HeadGroups(head, kv, parts, repr(self), found.root, parts[0], entries)


@settings()
class HeadGroups(Gridded):
    """Runs of indices along an axis go as a whole, the first of every part together, the second, and so on.

    Args:
        axis: of heads, or of heads and their entries.
        groups: how many runs there are in each part.
        parts: the shares of the axis that each is cut by itself: queries, keys and values in one leaf.
        called: its name in messages.
        attention: to whose other leaves it is tied, "" for one at the root.
        num_heads: how many there are, for messages.
        entries: of a head, for the same.
    """

    axis: int
    groups: int
    parts: tuple[int, ...]
    called: str
    attention: str
    num_heads: int
    entries: int

    def __repr__(self) -> str:
        return self.called

    @property
    def tie(self) -> str:
        """The attention."""
        return self.attention

    def grid(self, shape: tuple[int, ...]) -> Grid | None:
        """The axis in parts, and each part in runs; None if the parts are not of one length."""
        if len(set(self.parts)) > 1:
            return None
        place, number = place_of(self.axis, shape), len(self.parts)
        cuts = {place: (number, self.groups, shape[place] // (number * self.groups))}
        parts = tuple(cuts.get(axis, (n,)) for axis, n in enumerate(shape))
        return Grid(parts, tuple(axis for axis in range(len(shape) + 2) if axis != place + 1))

    def group(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "groups size"]:
        """The weights of each run in a row."""
        if len(set(self.parts)) == 1:
            return super().group(leaf)
        first = jnp.moveaxis(leaf, place_of(self.axis, leaf.shape), 0)
        width = math.prod(first.shape[1:])
        parts = jnp.split(first, self._cuts(first.shape[0]))
        return jnp.concatenate(
            [x.reshape(self.groups, x.shape[0] // self.groups * width) for x in parts], axis=1
        )

    def ungroup(self, rows: Shaped[Array, "groups size"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Back along the axis."""
        if len(set(self.parts)) == 1:
            return super().ungroup(rows, shape)
        place = place_of(self.axis, shape)
        rest = (*shape[:place], *shape[place + 1 :])
        width, cuts = math.prod(rest), self._cuts(shape[place])
        parts = jnp.split(rows, [cut // self.groups * width for cut in cuts], axis=1)
        return jnp.moveaxis(jnp.concatenate([x.reshape(-1, *rest) for x in parts]), 0, place)

    def _cuts(self, length: int) -> list[int]:
        """Where a part ends and the next begins."""
        unit = length // sum(self.parts)
        return [unit * sum(self.parts[:i]) for i in range(1, len(self.parts))]


def check_heads(found: Sequence[tuple[Axes, Pattern]]) -> None:
    """Raise a ValueError if leaves of one attention have other heads than the rest."""
    attentions: dict[str, list[tuple[Axes, HeadGroups]]] = {}
    for axes, pattern in found:
        if isinstance(pattern, HeadGroups):
            attentions.setdefault(pattern.attention, []).append((axes, pattern))
    for root, leaves in attentions.items():
        _check_groups(root, leaves)
        _check_entries(root, leaves)


def _check_groups(root: str, leaves: list[tuple[Axes, HeadGroups]]) -> None:
    if len({(pattern.groups, axes.num_layers) for axes, pattern in leaves}) < 2:
        return
    counts = {axes.attention.role: pattern.num_heads for axes, pattern in leaves if axes.attention}
    least = min(counts.values())
    raise ValueError(
        f"`pattern` must find as many heads in all leaves of {root or 'the attention'}, but "
        f"{_listed(leaves)}. `heads(num_kv_heads={least})` takes a key and value with all queries that share "
        "them; to prune queries alone, leave key and value out by `where`."
    )


def _check_entries(root: str, leaves: list[tuple[Axes, HeadGroups]]) -> None:
    """Queries and keys have heads of one width, and values and outputs: a fused axis only shows there."""
    for pair in (("query", "key"), ("value", "output")):
        mine = [
            (a, p) for a, p in leaves if a.attention and a.attention.role in pair and not a.attention.is_split
        ]
        if len({pattern.entries for _, pattern in mine}) > 1:
            raise ValueError(
                f"`pattern` must find heads of one width in {root or 'the attention'}, but {_listed(mine)}. "
                "Say how many heads of keys and values there are by `heads(num_heads, num_kv_heads=...)`."
            )


def _listed(leaves: list[tuple[Axes, HeadGroups]]) -> str:
    """`query has 8 heads, key has 2`, with paths and the width of a head."""
    return ", ".join(
        f"{axes.attention.role if axes.attention else 'it'} has {pattern.num_heads} heads "
        f"({axes.path} of shape {axes.shape})"
        for axes, pattern in leaves
    )


heads = Heads
