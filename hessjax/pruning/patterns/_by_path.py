"""Patterns that depend on the leaf: attention heads, and one for each path."""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hessjax._core import _tree
from hessjax._core._types import Params
from hessjax.pruning.patterns._pattern import Pattern, axis_of, channels, check_divides

PatternRule: TypeAlias = Callable[[str, Any], Pattern]
"""`(path, leaf) -> pattern`: one that depends on the leaf."""

Patterns: TypeAlias = Pattern | Mapping[str, Any] | PatternRule
"""A pattern for all leaves; by glob over paths, the first that matches; or by a function of path and leaf."""


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
        >>> rule = hj.patterns.heads()
        >>> rule("attention/query/kernel", jnp.ones((8, 4, 2))).group(jnp.ones((8, 4, 2))).shape
        (4, 16)
        >>> rule("attention/out/kernel", jnp.ones((4, 2, 8))).tie
        'attention'
    """

    def rule(path: str, leaf: Any) -> Pattern:
        tie = "/".join(path.split("/")[:-2])
        is_out = fnmatch.fnmatchcase(path, out)
        if num_heads is None:
            return channels(0 if is_out else -2)._replace(name="heads()", tie=tie)
        return _fused_heads(num_heads, 0 if is_out else -1)._replace(tie=tie)

    return rule


@functools.lru_cache
def _fused_heads(num_heads: int, axis: int) -> Pattern:
    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        place = axis_of(axis, shape)
        check_divides(num_heads, shape[place], f"axis {axis}")
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
