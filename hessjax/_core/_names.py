"""What the names of leaves say, in the conventions of Flax, Haiku, Equinox, PyTorch and Hugging Face."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hessjax._core import _tree

_NORM = re.compile(r"norm(?!al(?!i))|(^|_)(ln|bn)(_|\d|f?$)")  # not `normal`
_EMBEDDING = re.compile(r"embed|^w[tp]e$|^emb$")
_MATRICES = re.compile(
    r"dense(?!_?general)|linear(?!_?general)|^fc_?\d*$|^mlp|_proj$|^(up|down|gate|router)$", re.IGNORECASE
)
_WEIGHTS = ("kernel", "weight", "weights", "w", "W")
_STACKED = re.compile(r"expert|lora|base_layer")
_PLAIN = re.compile(r"(dense|linear)_?\d*", re.IGNORECASE)
_OUT_IN = re.compile(r"(^|_)weight(_|$)")


class Leaf(NamedTuple):
    """A leaf by its place and shape."""

    path: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """The path of the module that holds it."""
        return self.path.rpartition("/")[0]

    @property
    def module(self) -> str:
        """The name of the module that holds it."""
        return self.parent.rpartition("/")[2]


Siblings = Mapping[str, tuple[int, ...]]
"""The shapes of all leaves of one module, by name."""


def leaves_of(tree: Any) -> list[Leaf]:
    """The leaves of a tree, in order."""
    return [
        Leaf(path, jnp.shape(x))
        for path, x in zip(_tree.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    ]


def bias_name(name: str) -> str | None:
    """What the bias beside a kernel of this name is called; None for other names."""
    for word in ("kernel", "weight"):
        if word in name:
            return name.replace(word, "bias")
    return "b" + name[1:] if name[:1] in ("w", "W") else None


def is_norm(leaf: Leaf, siblings: Siblings) -> bool:
    """Whether it scales (or shifts) what a normalisation gives."""
    if leaf.name in ("scale", "gamma", "beta") or _NORM.search(leaf.name.lower()):
        return True
    if leaf.name in ("bias", "offset") and "scale" in siblings:
        return siblings["scale"] == leaf.shape
    # A projection may be called after the norm that it belongs to: then its bias is smaller than its kernel.
    same = siblings.get("bias", siblings.get("weight", leaf.shape)) == siblings.get("weight", leaf.shape)
    # PyTorch numbers the layers of a `Sequential`: what has a weight of its bias's shape scales and shifts.
    named = {"weight", "bias"} <= siblings.keys() or bool(_NORM.search(leaf.module.lower()))
    return leaf.name in ("weight", "bias") and same and named


def is_vector(leaf: Leaf, siblings: Siblings) -> bool:
    """Whether it is a bias, a scale or the like, however many axes it has."""
    name = leaf.name
    if "bias" in name or is_norm(leaf, siblings) or name in ("cls", "cls_token", "mask_token"):
        return True
    # `b` may be anything, unless there is a `w` that it is the bias of.
    return name[:1] == "b" and ("w" + name[1:] in siblings or "W" + name[1:] in siblings)


def is_embedding(leaf: Leaf, siblings: Siblings) -> bool:
    """Whether it is a table that is looked up, rather than multiplied with."""
    if leaf.name not in _WEIGHTS:
        return bool(_EMBEDDING.search(leaf.name.lower()))
    # Patches are embedded by convolutions, and by layers with a bias: those are kernels like others.
    has_bias = bias_name(leaf.name) in siblings
    return len(leaf.shape) < 4 and not has_bias and bool(_EMBEDDING.search(leaf.module.lower()))


def is_kernel(leaf: Leaf) -> bool:
    """Whether its name is that of what a module multiplies with, which has two axes at least."""
    return leaf.name in ("kernel", "weight", "w")


def is_convolution(leaf: Leaf) -> bool:
    """Whether it says so itself."""
    return "conv" in f"{leaf.module}/{leaf.name}".lower()


def is_matrix(leaf: Leaf) -> bool:
    """Whether a kernel of that name is a matrix, so that further axes stack several."""
    if is_convolution(leaf):
        return False
    # Nobody keeps a window in experts or adapters without saying so: three axes are (experts, in, out).
    if _STACKED.search(leaf.parent.lower()) and leaf.name in _WEIGHTS and len(leaf.shape) == 3:
        return True
    # A projection of four axes is as well a convolution, as of patches; one called dense is not.
    named = bool(_MATRICES.search(leaf.module)) and leaf.name in _WEIGHTS
    if named and (len(leaf.shape) == 3 or "dense" in leaf.module.lower()):
        return True
    # Hand-written convolutions have four axes or say what they are; three are matrices side by side.
    return leaf.name not in ("kernel", "weight") and len(leaf.shape) == 3


def outputs_first(leaf: Leaf) -> bool:
    """Whether its name is that of a kernel (out, in), as in Equinox and PyTorch: `weight`, `weight_ih_l0`."""
    return bool(_OUT_IN.search(leaf.name)) or leaf.name.endswith("weight")


def is_plain(leaf: Leaf) -> bool:
    """Whether its module has the name that Flax gives a Dense or Linear, whose outputs are one axis."""
    return bool(_PLAIN.fullmatch(leaf.module))


def is_transposed(leaf: Leaf) -> bool:
    """Whether it says that it is a transposed convolution of Haiku, which keeps (window, out, in)."""
    return leaf.name == "w" and "transpose" in leaf.module.lower()
