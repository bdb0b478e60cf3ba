"""Attention modules: which leaves are their queries, keys, values and outputs, by their own place there."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from hessjax._core._names import Leaf

Role: TypeAlias = Literal["query", "key", "value", "key and value", "query, key and value", "output"]

_CALLED: dict[Role, tuple[str, ...]] = {
    "query": ("query", "q", "q_proj", "query_proj", "q_lin", "to_q", "wq", "q_kernel"),
    "key": ("key", "k", "k_proj", "key_proj", "k_lin", "to_k", "wk", "k_kernel"),
    "value": ("value", "v", "v_proj", "value_proj", "v_lin", "to_v", "wv", "v_kernel"),
    "key and value": ("kv", "kv_proj", "to_kv", "wkv"),
    "query, key and value": ("qkv", "qkv_proj", "c_attn", "to_qkv", "wqkv", "query_key_value", "in_proj"),
}  # fmt: skip
_ROLES = {name: role for role, names in _CALLED.items() for name in names}
# The most telling first: beside `query` stand a `dense` and an `out` in some modules.
_OUTPUTS = (
    "out", "out_proj", "o_proj", "output_proj", "out_lin", "to_out", "to_out_0", "wo", "o", "c_proj", "proj",
    "linear", "dense", "output", "o_kernel", "out_kernel",
)  # fmt: skip
_PARAMETERS = ("kernel", "weight", "w", "bias", "b")
_INNER = ("self", "attention", "self_attention", "attn", "core", "mha")


class Member(NamedTuple):
    """What a leaf is in an attention.

    Attributes:
        root: the path of the module.
        role: which projection it belongs to.
        has_output: whether the module has an output that is known by name.
        interleaved: whether query, key and value lie side by side head by head.
    """

    root: str
    role: Role
    has_output: bool
    interleaved: bool = False


def members_of(leaves: Iterable[Leaf]) -> dict[str, Member]:
    """By path, the leaves of all attention modules."""
    tree: dict[str, dict[str, list[Leaf]]] = {}
    for leaf in leaves:
        parent, name = _projection(leaf)
        tree.setdefault(parent, {}).setdefault(name, []).append(leaf)
    found: dict[str, Member] = {}
    for root, children in tree.items():
        # State space models have an `in_proj` too: it is attention's only where that is what the module is.
        attends = "att" in root.lower().replace("pattern", "")
        roles = {name: _ROLES[name] for name in children if name in _ROLES and (attends or name != "in_proj")}
        if _is_attention(set(roles.values())):
            output = _output(root, tree)
            for name, role in roles.items():
                member = Member(root, role, bool(output), name == "query_key_value")
                found |= {leaf.path: member for leaf in children[name]}
            found |= {leaf.path: Member(root, "output", True) for leaf in output}
    return found


def _projection(leaf: Leaf) -> tuple[str, str]:
    """Where the layer is that the leaf belongs to, and its name, in small letters."""
    name = leaf.name.lower()
    if name in _PARAMETERS:
        return leaf.parent.rpartition("/")[0], leaf.module.lower()
    if name.startswith("b") and "w" + name[1:] in (*_ROLES, "wo"):
        return leaf.parent, "w" + name[1:]
    return leaf.parent, name.removesuffix("_weight").removesuffix("_bias")


def _is_attention(roles: set[Role]) -> bool:
    if "query, key and value" in roles:
        return True
    return "query" in roles and ({"key", "value"} <= roles or "key and value" in roles)


def _output(root: str, tree: dict[str, dict[str, list[Leaf]]]) -> list[Leaf]:
    """The leaves of the output's projection: beside the queries, or as BERT has it, `output/dense` one up."""
    above, _, own = root.rpartition("/")
    places = [tree.get(root, {})]
    if own.lower() in _INNER:
        places += [tree.get(f"{above}/output" if above else "output", {}), tree.get(above, {})]
    for children in places:
        for name in _OUTPUTS:
            if name in children:
                return children[name]
    return []


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of one attention's kernels and biases, by role."""

    kernels: dict[Role, tuple[int, ...]]
    biases: dict[Role, tuple[int, ...]]

    def depth(self, hint: int | None) -> int | None:
        """How many leading axes stack whole modules, if the shapes agree on a number."""
        whole = self.kernels.get("query, key and value")
        query = self.kernels.get("query", whole)
        if query is None:
            return None
        # Heads apart from their entries, or in one axis: (features, heads, entries), (features, both).
        widths = (4, 3, 2) if whole else (3, 2)
        options = [(len(query) - n, n) for n in widths if len(query) >= n and self._agree(len(query) - n, n)]
        options.sort(key=lambda option: option[0] != hint)  # what the neighbours say decides between two
        return options[0][0] if options else None

    def _agree(self, depth: int, width: int) -> bool:
        """Whether all shapes are those of one attention, stacked along so many axes."""
        shapes = [*self.kernels.values(), *self.biases.values()]
        if len({shape[:depth] for shape in shapes}) > 1 or min(map(len, shapes)) <= depth:
            return False
        kernels = {role: shape[depth:] for role, shape in self.kernels.items()}
        inputs = [kernels[role] for role in ("query", "key", "value") if role in kernels]
        if any(len(shape) != width for shape in inputs) or not self._biases_agree(depth, width):
            return False
        return "output" not in kernels or _fits(kernels, width)

    def _biases_agree(self, depth: int, width: int) -> bool:
        for role, bias in self.biases.items():
            if len(bias) - depth != (1 if role == "output" else width - 1):
                return False
        return True


def _fits(kernels: dict[Role, tuple[int, ...]], width: int) -> bool:
    """Whether the output sums over what the values (or, of fused ones, the queries) give."""
    output = kernels["output"]
    query = kernels.get("query", kernels.get("query, key and value", ()))
    value = kernels.get("value", query)
    if len(output) not in (2, 3):
        return False
    if width == 2:  # fused: in either order of axes, and with fewer heads of values than of queries
        return len(output) == 2 and ("value" not in kernels or any(n % v == 0 for n in output for v in value))
    if len(output) == 2:
        return query[-2] * value[-1] in output
    if "query, key and value" in kernels:
        return output[0] == query[-2]
    return output[0] == query[-2] and output[1] == value[-1]
