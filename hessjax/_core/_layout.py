"""Which axes of every leaf mean what: the one place that decides, for everybody who asks."""

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
    is_vector,
    leaves_of,
    outputs_first,
)
from hessjax._core._stacks import Order, by_bias, depths_of, siblings_of
from hessjax._core._types import Params, Where
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
    leaves = leaves_of(tree)
    said = words_by_path(axes, leaves)
    modules, members = siblings_of(leaves), members_of(leaves)
    places = {x.path: layer_places(said[x.path], len(x.shape)) for x in leaves if x.path in said}
    # A stack in front is evidence for the neighbours; anywhere else it is the leaf's alone.
    given = {path: len(stack) for path, stack in places.items() if stack == tuple(range(len(stack)))}
    depths = depths_of(leaves, modules, members, given)
    flipped = _flipped(leaves, depths, members, modules)
    return _with_outputs(
        [
            _of_leaf(leaf, modules[leaf.parent], depths[leaf.path], members.get(leaf.path), said, flipped)
            for leaf in leaves
        ]
    )


def _with_outputs(found: Sequence[Axes]) -> tuple[Axes, ...]:
    """With what users say of outputs that no name tells: their attention has one too."""
    roots = {x.attention.root for x in found if x.attention is not None and x.attention.role == "output"}
    return tuple(
        x._replace(attention=x.attention._replace(has_output=True))
        if x.attention is not None and x.attention.root in roots
        else x
        for x in found
    )


def selected(
    params: Params, where: Where | None, axes: AxisWords | None = None, argument: str = "where"
) -> Params:
    """A tree of bools: the leaves that are pruned. None: all kernels.

    Raises:
        ValueError: if there are none.
    """
    _tree.check_leaves(params)
    if where is not None:
        return _tree.match(params, where, argument)
    hits = [found.kind == "kernel" for found in tree_axes(params, axes)]
    if not any(hits):
        raise ValueError(
            f"`{argument}` must be given for a tree without kernels, of which biases, scales and embeddings "
            f"are none, got {', '.join(_tree.leaf_paths(params)) or '(no leaves)'}."
        )
    return jax.tree.unflatten(jax.tree.structure(params), hits)


# -- one leaf ------------------------------------------------------------------------------------


def _of_leaf(
    leaf: Leaf,
    siblings: Siblings,
    depth: int,
    member: Member | None,
    said: Mapping[str, tuple[str, ...]],
    flipped: set[str],
) -> Axes:
    words = said.get(leaf.path)
    if words is not None and "..." not in words:
        return _as_said(leaf, words, member)
    stack = tuple(range(depth)) if words is None else layer_places(words, len(leaf.shape))
    shape = tuple(n for axis, n in enumerate(leaf.shape) if axis not in stack)
    n = len(shape)
    every = tuple(range(n))
    vector = is_vector(leaf, siblings) or n < 2
    if vector or (is_embedding(leaf, siblings) and (n < 2 or set(shape[:-1]) == {1})):
        attention = None if member is None else _attention(member, shape, vector=True)
        return Axes(leaf.path, leaf.shape, stack, (), (), every, "vector", attention)
    if is_embedding(leaf, siblings):
        return Axes(leaf.path, leaf.shape, stack, every[:-2], (n - 2,), (n - 1,), "embedding")
    split = member is not None and _is_split(member, shape)
    order = _order_of(leaf, siblings, depth, shape, split, member, flipped)
    spatial, inputs, outputs = _ordered(order, n, split and member is not None and member.role == "output")
    attention = None
    if member is not None:
        at = inputs[0] if member.role == "output" else (n - 2 if split else outputs[0])
        attention = Attention(member.root, member.role, at, split, member.has_output, member.interleaved)
    kind: Kind = (
        "vector"
        if n > 2 and set(shape[:-1]) == {1} and leaf.name not in ("kernel", "weight", "w")
        else "kernel"
    )
    return Axes(leaf.path, leaf.shape, stack, spatial, inputs, outputs, kind, attention)


def _is_split(member: Member, shape: tuple[int, ...]) -> bool:
    """Whether heads have an axis of their own: (features, heads, entries), (heads, entries, features)."""
    return len(shape) == 3 or (len(shape) == 4 and member.role == "query, key and value")


def _attention(member: Member, shape: tuple[int, ...], *, vector: bool) -> Attention:
    """Of a bias: (heads, entries), or both in one axis."""
    split = len(shape) > 1
    head = None if member.role == "output" or not shape else len(shape) - 2 if split else 0
    return Attention(member.root, member.role, head, split, member.has_output, member.interleaved)


def _order_of(
    leaf: Leaf,
    siblings: Siblings,
    depth: int,
    shape: tuple[int, ...],
    split: bool,
    member: Member | None,
    flipped: set[str],
) -> Order:
    """Where a kernel has its outputs."""
    if member is not None and split:
        return "last" if member.role == "output" else len(shape) - 1
    if leaf.path in flipped:
        return "first"
    bias = siblings.get(bias_name(leaf.name) or "")
    found = None if bias is None else by_bias(Leaf(leaf.path, shape), bias[depth:])
    if found is not None and found[0] == 0:
        return found[1]
    return "first" if outputs_first(leaf) else "last"


def _ordered(
    order: Order, n: int, is_output: bool
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Window, inputs and outputs."""
    every = tuple(range(n))
    if is_output:
        return (), every[:-1], every[-1:]
    if isinstance(order, int):
        return (), every[: n - order], every[n - order :]
    if order == "first":
        return every[2:], (1,), (0,)
    if order == "before last":
        return every[:-2], (n - 1,), (n - 2,)
    return every[:-2], (n - 2,), (n - 1,)


def _flipped(
    leaves: Sequence[Leaf],
    depths: Mapping[str, int],
    members: Mapping[str, Member],
    modules: Mapping[str, Siblings],
) -> set[str]:
    """The fused kernels of attentions that are (out, in), as those of one module all are.

    A square one says nothing by itself; its neighbour, three times as long one way, does.
    """
    roots: dict[str, set[bool]] = {}
    for leaf in leaves:
        if leaf.path in members and not is_vector(leaf, modules[leaf.parent]):
            bias = modules[leaf.parent].get(bias_name(leaf.name) or "", ())[-1:]
            shape, role = leaf.shape[depths[leaf.path] :], members[leaf.path].role
            if (evident := _is_flipped(shape, bias, role)) is not None:
                roots.setdefault(members[leaf.path].root, set()).add(evident)
    return {
        leaf.path for leaf in leaves if leaf.path in members and roots.get(members[leaf.path].root) == {True}
    }


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
