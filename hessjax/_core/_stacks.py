"""Leaves that stack layers: how many leading axes count them, from the evidence of the whole tree."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from hessjax._core._attention import Member, Role, Shapes
from hessjax._core._names import (
    Leaf,
    Siblings,
    bias_name,
    is_embedding,
    is_kernel,
    is_matrix,
    is_norm,
    is_plain,
    is_transposed,
    is_vector,
    outputs_first,
)

Order: TypeAlias = Literal["last", "first", "second", "before last"] | int
"""Where a kernel has its outputs; a number: along so many last axes, as `DenseGeneral` does."""


class _Below(NamedTuple):
    """What is known below a module: the stacks that its leaves are in, and how all shapes there begin."""

    stacks: set[tuple[int, ...]]
    common: tuple[int, ...]


def siblings_of(leaves: Sequence[Leaf]) -> dict[str, Siblings]:
    """By path of the module, the shapes of its leaves by name."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for leaf in leaves:
        found.setdefault(leaf.parent, {})[leaf.name] = leaf.shape
    return found  # type: ignore[return-value]


def fronts_of(leaves: Sequence[Leaf], modules: Mapping[str, Siblings], roots: set[str]) -> dict[str, int]:
    """By path, the axis that counts layers, for leaves where it is not the first.

    `nn.scan` and `nnx.vmap` put it where they are told, the same place in every leaf. The scale of a norm has
    one axis, and the bias of a Dense: with two there is a stack, and the block tells where, if all leaves
    there agree about an axis.

    Args:
        leaves: of the tree.
        modules: their shapes by module and name.
        roots: the attentions, whose own norms may have an axis of heads.
    """
    found: dict[str, int] = {}
    for leaf in leaves:
        marks = len(leaf.shape) > 1 and _marks(leaf, modules[leaf.parent])
        if not marks or leaf.path in found or not roots.isdisjoint(_above(leaf.parent)):
            continue
        blocks = _blocks(leaf, leaves)
        axes = [axis for axis in (0, 1, -1) if blocks and _agree_at(axis, blocks[0], modules)]
        if axes and axes[0]:
            # What a block agrees about, all blocks inside it do.
            widest = [block for block in blocks if _agree_at(axes[0], block, modules)][-1]
            found |= {other.path: axes[0] % len(other.shape) for other in widest}
    return found


def _marks(leaf: Leaf, siblings: Siblings) -> bool:
    """Whether a leaf of several axes shows that there is a stack: a norm's scale, the bias of a Dense."""
    if is_norm(leaf, siblings):
        return set(leaf.shape[:-1]) != {1}
    return is_vector(leaf, siblings) and is_plain(leaf)


def _blocks(leaf: Leaf, leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """The leaves of the modules around one, from the smallest on that holds leaves of more axes too."""
    inside = [
        [x for x in leaves if not place or x.path.startswith(f"{place}/")] for place in _above(leaf.parent)
    ]
    return [block for block in inside if any(len(x.shape) > len(leaf.shape) for x in block)]


def _agree_at(axis: int, block: Sequence[Leaf], modules: Mapping[str, Siblings]) -> bool:
    """Whether the axis may count layers in all leaves of a block: as many, and biases fit their kernels."""
    least = max(2, axis + 1)
    if any(len(leaf.shape) < least for leaf in block) or len({leaf.shape[axis] for leaf in block}) != 1:
        return False
    for leaf in block:
        siblings = {name: _first(shape, axis) for name, shape in modules[leaf.parent].items()}
        if _evident(Leaf(leaf.path, _first(leaf.shape, axis)), siblings) == 0:
            return False
    return True


def _first(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    place = axis % len(shape) if shape else 0
    return (*shape[place : place + 1], *shape[:place], *shape[place + 1 :])


def in_front(leaf: Leaf, fronts: Mapping[str, int]) -> Leaf:
    """The leaf as if its layers lay along the first axis."""
    return Leaf(leaf.path, _first(leaf.shape, fronts.get(leaf.path, 0)))


def depths_of(
    leaves: Sequence[Leaf],
    modules: Mapping[str, Siblings],
    members: Mapping[str, Member],
    given: Mapping[str, int],
) -> dict[str, int]:
    """By path, how many leading axes of a leaf count layers.

    `nn.scan`, `nnx.vmap` and a vmapped `init` put one axis in front of every leaf of a module. Nothing marks
    it, but a scale has one axis, a bias as many as its kernel's outputs, and all leaves of one module are
    stacked alike.

    Args:
        leaves: of the whole tree.
        modules: their shapes by module and name.
        members: the leaves of attention modules, by path.
        given: what the user says, by path.
    """
    known = dict(given)
    for leaf in leaves:
        siblings = modules[leaf.parent]
        if leaf.path not in known and leaf.path not in members:
            depth = _evident(leaf, siblings)
            if depth is not None:
                known[leaf.path] = depth
    known |= _attentions(leaves, modules, members, known)
    below = _summed_up(leaves, known)
    return {leaf.path: _depth(leaf, modules[leaf.parent], known, below) for leaf in leaves}


def _evident(leaf: Leaf, siblings: Siblings) -> int | None:
    """The depth of a leaf by itself and its bias, or None."""
    if is_norm(leaf, siblings):
        # Haiku's normalisations of images keep axes of length 1 in front of the channels.
        leading = leaf.shape[:-1]
        return len(leading) if leading and set(leading) != {1} else (None if leading else 0)
    if is_vector(leaf, siblings):
        return _of_its_kernel(leaf, siblings)
    if is_embedding(leaf, siblings):
        return None
    bias = siblings.get(bias_name(leaf.name) or "")
    found = None if bias is None else by_bias(leaf, bias)
    return None if found is None else found[0]


def _of_its_kernel(leaf: Leaf, siblings: Siblings) -> int | None:
    for name, shape in siblings.items():
        if bias_name(name) == leaf.name:
            found = by_bias(Leaf(f"{leaf.parent}/{name}", shape), leaf.shape)
            return None if found is None else found[0]
    return None


def by_bias(leaf: Leaf, bias: tuple[int, ...]) -> tuple[int, Order] | None:
    """The depth of a kernel, and where its outputs are, by the shape of its bias; None if they do not fit."""
    found = _by_bias(leaf, bias)
    if found is None and outputs_first(leaf) and bias[-1:] == (1,):
        # Equinox keeps an axis of length 1 behind the biases of convolutions for each of their windows'.
        channels = len(bias) - sum(1 for _ in itertools.takewhile(lambda n: n == 1, reversed(bias)))
        found = _by_bias(leaf, bias[: max(channels, 1)])
    return found


def _by_bias(leaf: Leaf, bias: tuple[int, ...]) -> tuple[int, Order] | None:
    # The deepest stack first, as layers of several output axes are rare.
    for depth in range(len(bias) - 1, -1, -1):
        if leaf.shape[:depth] == bias[:depth]:
            order = _order(leaf, leaf.shape[depth:], bias[depth:])
            if order is not None:
                return depth, order
    return None


def _order(leaf: Leaf, kernel: tuple[int, ...], bias: tuple[int, ...]) -> Order | None:
    if len(bias) > 1:
        return len(bias) if len(kernel) > len(bias) and kernel[-len(bias) :] == bias else None
    if len(kernel) < 2:
        return None
    if outputs_first(leaf) and kernel[0] == bias[0]:
        return "first"
    # PyTorch keeps transposed convolutions as (in, out, window).
    if outputs_first(leaf) and len(kernel) > 3 and kernel[1] == bias[0]:
        return "second"
    if is_transposed(leaf) and kernel[-2] == bias[0]:
        return "before last"
    if kernel[-1] == bias[0]:
        return "last"
    if outputs_first(leaf) and len(kernel) > 2 and kernel[1] == bias[0]:
        return "second"
    # The last but one are the outputs of a transposed kernel; the first, of one that is (out, in).
    if len(kernel) > 2 and kernel[-2] == bias[0]:
        return "before last"
    return "first" if kernel[0] == bias[0] else None


def _attentions(
    leaves: Sequence[Leaf],
    modules: Mapping[str, Siblings],
    members: Mapping[str, Member],
    known: Mapping[str, int],
) -> dict[str, int]:
    """The depths of attention modules, whose leaves must fit each other."""
    found: dict[str, int] = {}
    if not members:
        return found
    below = _summed_up(leaves, known)
    for root in dict.fromkeys(member.root for member in members.values()):
        mine = [leaf for leaf in leaves if leaf.path in members and members[leaf.path].root == root]
        kernels: dict[Role, tuple[int, ...]] = {}
        biases: dict[Role, tuple[int, ...]] = {}
        for leaf in mine:
            kept = biases if is_vector(leaf, modules[leaf.parent]) else kernels
            kept.setdefault(members[leaf.path].role, leaf.shape)
        near = _nearest(root, below)
        depth = Shapes(kernels, biases).depth(len(near) if near else None)
        if depth is not None:
            found |= {leaf.path: depth for leaf in mine if leaf.path not in known}
        else:
            own = {leaf.path: _evident(leaf, modules[leaf.parent]) for leaf in mine if leaf.path not in known}
            found |= {path: depth for path, depth in own.items() if depth is not None}
    return found


def _summed_up(leaves: Sequence[Leaf], known: Mapping[str, int]) -> dict[str, _Below]:
    """By path of every module, what is below it."""
    found: dict[str, _Below] = {}
    for leaf in leaves:
        stack = {leaf.shape[: known[leaf.path]]} if leaf.path in known else set()
        for module in _above(leaf.parent):
            below = found.get(module)
            common = leaf.shape if below is None else _common([below.common, leaf.shape])
            found[module] = _Below(stack | (below.stacks if below else set()), common)
    return found


def _above(module: str) -> Iterator[str]:
    """The module, and all that hold it, up to the root."""
    while module:
        yield module
        module = module.rpartition("/")[0]
    yield ""


def _common(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """How all of them begin."""
    same = itertools.takewhile(lambda sizes: len(set(sizes)) == 1, zip(*shapes, strict=False))
    return tuple(sizes[0] for sizes in same)


def _nearest(module: str, below: Mapping[str, _Below]) -> tuple[int, ...]:
    """The stack that a module is in, by the nearest that is known of its neighbours."""
    for place in _above(module):
        known = below.get(place)
        if known is not None and known.stacks:
            # All leaves of a stacked module are: what only happens to begin alike has others beside it.
            return _common([*sorted(known.stacks), known.common])
    return ()


def _depth(leaf: Leaf, siblings: Siblings, known: Mapping[str, int], below: Mapping[str, _Below]) -> int:
    if leaf.path in known:
        return known[leaf.path]
    if is_vector(leaf, siblings):
        stack = _nearest(leaf.parent, below)
        return len(stack) if leaf.shape[: len(stack)] == stack else 0
    axes = len(leaf.shape)
    stack = _nearest(leaf.parent, below)
    # A kernel has two axes at least; what has another name may be a vector in each layer.
    least = 2 if is_kernel(leaf) else 1
    if stack and leaf.shape[: len(stack)] == stack and axes - len(stack) >= least:
        # Within a layer there may be matrices side by side again: experts.
        inner = Leaf(leaf.path, leaf.shape[len(stack) :])
        return len(stack) + (1 if len(inner.shape) == 3 and _is_matrix(inner, siblings) else 0)
    if is_embedding(leaf, siblings):
        return axes - 2 if axes > 2 and set(leaf.shape[: axes - 2]) != {1} else 0
    return axes - 2 if axes > 2 and _is_matrix(leaf, siblings) else 0


def _is_matrix(leaf: Leaf, siblings: Siblings) -> bool:
    """Whether its name says that it is a matrix, whatever it has more of axes."""
    return not is_embedding(leaf, siblings) and is_matrix(leaf) and set(leaf.shape[:-1]) != {1}
