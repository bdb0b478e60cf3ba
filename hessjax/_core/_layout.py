"""Which axes of every leaf mean what: the one place that decides, for everybody who asks."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from hessjax._core import _tree
from hessjax._core._attention import Member, Role, members_of
from hessjax._core._axes import Attention, Axes, Kind
from hessjax._core._names import (
    Leaf,
    Siblings,
    bias_name,
    is_embedding,
    is_kernel,
    is_transposed,
    is_vector,
    leaves_of,
    outputs_first,
)
from hessjax._core._stacks import Order, by_bias, depths_of, fronts_of, in_front, siblings_of
from hessjax._core._types import Params, Where, settings
from hessjax._core._where import match
from hessjax._core._words import WINDOW, AxisWords, layer_places, words_by_path


def tree_axes(tree: Params, axes: AxisWords | None = None) -> tuple[Axes, ...]:
    """What the axes of every leaf mean, in the order of the leaves.

    By names and shapes of the whole tree, in the layouts of Flax, Haiku, Equinox, PyTorch and Hugging Face's
    Flax models, unless the user says something else.

    Args:
        tree: the params, or what is like them.
        axes: what the user says, by glob.

    Raises:
        TypeError: if `axes` is no mapping of text to text.
        ValueError: for a word there is none of, a glob that matches no leaf, or another number of words than
            the leaf has axes.
    """
    there = leaves_of(tree)
    said, members = words_by_path(axes, there), members_of(there)
    roots = {member.root for member in members.values()}
    # What users say of a leaf counts its axes as they are.
    fronts = fronts_of([x for x in there if x.path not in said], siblings_of(there), roots)
    leaves = [in_front(leaf, fronts) for leaf in there]
    modules = siblings_of(leaves)
    places = {x.path: layer_places(said[x.path], len(x.shape)) for x in leaves if x.path in said}
    # A stack in front is evidence for the neighbours; anywhere else it is the leaf's alone.
    given = {path: len(stack) for path, stack in places.items() if stack == tuple(range(len(stack)))}
    depths = depths_of(leaves, modules, members, given)
    depths |= {path: max(1, depths[path]) for path in fronts}
    tree_of = _Tree(modules, members, depths, _turned(leaves, depths, members, modules))
    found = [tree_of.axes(leaf, said.get(leaf.path)) for leaf in leaves]
    return _with_outputs([_put_back(x, fronts.get(x.path, 0)) for x in found])


def _put_back(found: Axes, front: int) -> Axes:
    """The axes of a leaf whose stack was brought to the front, as they lie in it."""
    if not front:
        return found
    order = (front, *(axis for axis in range(len(found.shape)) if axis != front))
    shape = tuple(found.shape[order.index(axis)] for axis in range(len(order)))
    return found._replace(shape=shape, stack=tuple(order[i] for i in found.stack))


def _with_outputs(found: Sequence[Axes]) -> tuple[Axes, ...]:
    """With what users say of outputs that no name tells: their attention has one too."""
    roots = {x.attention.root for x in found if x.attention is not None and x.attention.role == "output"}
    return tuple(
        x._replace(attention=x.attention._replace(has_output=True))
        if x.attention is not None and x.attention.root in roots
        else x
        for x in found
    )


@settings()
class Kernels:
    """The leaves that are pruned by default: all but biases, scales, embeddings and the like."""

    def __call__(self, params: Params, axes: AxisWords | None = None) -> Params:
        """A tree of bools: which leaves are kernels.

        Raises:
            ValueError: if there are none.
        """
        hits = [found.kind == "kernel" for found in tree_axes(params, axes)]
        if not any(hits):
            raise ValueError(
                "`where` must be given for a tree without kernels, of which biases, scales and embeddings "
                f"are none, got {', '.join(_tree.leaf_paths(params)) or '(no leaves)'}."
            )
        return jax.tree.unflatten(jax.tree.structure(params), hits)

    def __repr__(self) -> str:
        return "kernels"


kernels = Kernels()


def selected(params: Params, where: Where, axes: AxisWords | None = None) -> Params:
    """A tree of bools: the leaves that `where` selects, of which `kernels` are told by their axes."""
    _tree.check_leaves(params)
    return where(params, axes) if isinstance(where, Kernels) else match(params, where)


# -- one leaf ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tree:
    """What the whole tree says of its leaves.

    Attributes:
        modules: the shapes of all leaves, by module and name.
        members: the leaves of attentions, by path.
        depths: how many leading axes count layers, by path.
        turned: of leaves of attentions whether they are (out, in), by path, where that is known.
    """

    modules: Mapping[str, Siblings]
    members: Mapping[str, Member]
    depths: Mapping[str, int]
    turned: Mapping[str, bool]

    def axes(self, leaf: Leaf, words: tuple[str, ...] | None) -> Axes:
        """The axes of one leaf."""
        member, depth = self.members.get(leaf.path), self.depths[leaf.path]
        if words is not None and "..." not in words:
            return _as_said(leaf, words, member)
        stack = tuple(range(depth)) if words is None else layer_places(words, len(leaf.shape))
        layer = Leaf(leaf.path, tuple(n for axis, n in enumerate(leaf.shape) if axis not in stack))
        found = Axes(leaf.path, leaf.shape, stack, (), (), tuple(range(len(layer.shape))), "vector")
        siblings = self.modules[leaf.parent]
        if _is_vector(layer, siblings):
            return found if member is None else found._replace(attention=_of_bias(member, layer.shape))
        if is_embedding(leaf, siblings):
            spatial, inputs, outputs = _ordered("last", len(layer.shape))
            return found._replace(kind="embedding", spatial=spatial, input=inputs, output=outputs)
        return self._kernel(layer, found, member)

    def _kernel(self, layer: Leaf, found: Axes, member: Member | None) -> Axes:
        n = len(layer.shape)
        if member is None:
            spatial, inputs, outputs = _ordered(self._order(layer), n)
            return found._replace(kind="kernel", spatial=spatial, input=inputs, output=outputs)
        # With heads on an axis of their own: (features, heads, entries), (heads, entries, features).
        is_split = n == 3 or (n == 4 and member.role in ("query, key and value", "key and value"))
        is_output, order = member.role == "output", self._order(layer)
        if is_split:
            order = 1 if is_output else n - 1
        spatial, inputs, outputs = _ordered(order, n)
        head = inputs[0] if is_output else n - 2 if is_split else outputs[0]
        attention = _attention(member, head, is_split)
        return found._replace(
            kind="kernel", spatial=spatial, input=inputs, output=outputs, attention=attention
        )

    def _order(self, layer: Leaf) -> Order:
        """Where a kernel has its outputs: as its attention, its bias or its name says."""
        if layer.path in self.turned:
            return "first" if self.turned[layer.path] else "last"
        bias = self.modules[layer.parent].get(bias_name(layer.name) or "")
        found = None if bias is None else by_bias(layer, bias[self.depths[layer.path] :])
        if found is not None and found[0] == 0:
            return found[1]
        if is_transposed(layer):
            return "before last"
        return "first" if outputs_first(layer) else "last"


def _is_vector(layer: Leaf, siblings: Siblings) -> bool:
    """Whether a layer is a bias, a scale or the like, or has but one axis that is longer than 1."""
    if is_vector(layer, siblings) or len(layer.shape) < 2:
        return True
    has_one = set(layer.shape[:-1]) == {1}
    return has_one and (len(layer.shape) > 2 or is_embedding(layer, siblings)) and not is_kernel(layer)


def _of_bias(member: Member, shape: tuple[int, ...]) -> Attention:
    """Of a bias: (heads, entries), or both in one axis; that of the output has none."""
    is_split = len(shape) > 1
    head = None if member.role == "output" or not shape else len(shape) - 2 if is_split else 0
    return _attention(member, head, is_split)


def _attention(member: Member, head: int | None, is_split: bool) -> Attention:
    return Attention(member.root, member.role, head, is_split, member.has_output, member.interleaved)


def _ordered(order: Order, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Window, inputs and outputs of a kernel of n axes."""
    every = tuple(range(n))
    if isinstance(order, int):
        return (), every[: n - order], every[n - order :]
    if order == "first":
        return every[2:], (1,), (0,)
    if order == "second":
        return every[2:], (0,), (1,)
    if order == "before last":
        return every[:-2], (n - 1,), (n - 2,)
    return every[:-2], (n - 2,), (n - 1,)


def _turned(
    leaves: Sequence[Leaf],
    depths: Mapping[str, int],
    members: Mapping[str, Member],
    modules: Mapping[str, Siblings],
) -> dict[str, bool]:
    """Of the fused kernels of attentions whether they are (out, in), where that is evident.

    A square one says nothing by itself; its neighbour, three times as long one way, says it for both.
    """
    found: dict[str, set[bool]] = {}
    mine = [leaf for leaf in leaves if leaf.path in members]
    for leaf in mine:
        if not is_vector(leaf, modules[leaf.parent]):
            bias = modules[leaf.parent].get(bias_name(leaf.name) or "", ())[-1:]
            shape, member = leaf.shape[depths[leaf.path] :], members[leaf.path]
            if (evident := _is_flipped(shape, bias, member.role)) is not None:
                found.setdefault(member.root, set()).add(evident)
    known = {root: min(evident) for root, evident in found.items() if len(evident) == 1}
    return {leaf.path: known[members[leaf.path].root] for leaf in mine if members[leaf.path].root in known}


def _is_flipped(shape: tuple[int, ...], bias: tuple[int, ...], role: Role) -> bool | None:
    """Whether a fused kernel is (out, in), by its bias or by three projections in one; None: that is open."""
    if len(shape) != 2 or shape[0] == shape[1]:
        return None
    if bias in (shape[:1], shape[1:]):
        return bias == shape[:1]
    three = role == "query, key and value" and max(shape) == 3 * min(shape)
    return shape[0] > shape[1] if three else None


def _as_said(leaf: Leaf, words: tuple[str, ...], member: Member | None) -> Axes:
    """The axes as the user names them."""
    stack = layer_places(words, len(words))
    rest = [word for word in words if word != "layer"]
    has_output = "out" in rest
    inner = ("in", "vocab", *(("head", "entry", "heads") if has_output else ()))
    inputs = tuple(i for i, word in enumerate(rest) if word in inner)
    spatial = tuple(i for i, word in enumerate(rest) if word in WINDOW)
    outputs = tuple(i for i in range(len(rest)) if i not in (*inputs, *spatial))
    kind: Kind = "embedding" if "vocab" in rest else "kernel" if inputs and outputs else "vector"
    attention = None
    head = next((i for i, word in enumerate(rest) if word in ("head", "heads")), None)
    if head is not None:
        role: Role = (
            "output" if has_output and "in" not in rest else "query" if member is None else member.role
        )
        root = leaf.parent.rpartition("/")[0] if member is None else member.root
        attention = Attention(root, role, head, rest[head] == "head", member is None or member.has_output)
    elif member is not None and kind == "vector":
        attention = Attention(member.root, member.role, None, False, member.has_output)
    return Axes(leaf.path, leaf.shape, stack, spatial, inputs, outputs, kind, attention)
