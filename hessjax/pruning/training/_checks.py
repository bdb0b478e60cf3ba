"""What `prune` refuses: foreign states, params that are not sparse any more, rankings without information."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from hessjax._core import _tree
from hessjax._core._counting import Test, count_where, num_set, total
from hessjax._core._types import Block, Params
from hessjax.pruning.saliencies._first_order import Static
from hessjax.pruning.saliencies._movement import check_optimizer
from hessjax.pruning.saliencies._saliency import Context, Saliency, drop_others, is_hole
from hessjax.pruning.training._state import Budget, PruneState

RESTORE = (
    "A checkpoint knows no classes: restore it into `tx.init(params)`, as "
    "`flax.serialization.from_bytes(tx.init(params), data)` and Orbax's `restore(path, tx.init(params))` do."
)
UNDONE = (
    "Something after `prune` changed its updates (decay, clipping, an average: it belongs inside, "
    "`prune(optax.chain(...), ...)`), an update was not applied, or params were put in from elsewhere "
    "(mask those by `hessjax.mask_of`)."
)


# -- what `prune` is given


def checked_dtype(dtype: Any) -> Any:
    """A floating-point dtype that this jax holds, or None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"`dense_dtype` must be a floating-point dtype such as `jnp.float32`, or None, got {dtype!r}."
        )
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(f"`dense_dtype` must be one that jax holds, got {found}: set `jax_enable_x64`.")
    return found


def checked_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which takes extra arguments."""
    if isinstance(inner, optax.MultiSteps):  # which passes extra arguments on only as a transformation
        inner = inner.gradient_transformation()
    check_optimizer(inner, "inner")
    return optax.with_extra_args_support(inner)


def check_wide_enough(dense: Params, params: Params) -> None:
    """Raise a ValueError if the dense weights hold less than the params that are made of them."""
    for w, p in zip(*map(jax.tree.leaves, (dense, drop_others(params, dense))), strict=True):
        wide, narrow = jnp.finfo(w.dtype), jnp.finfo(jnp.result_type(p))
        if wide.nmant < narrow.nmant or wide.maxexp < narrow.maxexp:
            raise ValueError(
                "`dense_dtype` must hold all that the params hold, which are "
                f"{jnp.result_type(p)}, got {w.dtype}."
            )


# -- what an update is given ---------------------------------------------------------------------


def check_update(grads: Params, state: Any, params: Params | None) -> None:
    """Raise a ValueError unless these belong together."""
    if params is None:
        raise ValueError("`params` must be given: write `tx.update(grads, state, params)`, got None.")
    if not isinstance(state, PruneState):
        raise ValueError(
            f"`state` must hold the state of a `hessjax.prune`, got a {type(state).__name__}. {RESTORE}"
        )
    _tree.check_like(grads, params, "grads", "params")
    check_mask("state", state.mask, params)


def check_mask(argument: str, mask: Params, params: Params) -> None:
    """Raise a ValueError if the state, this argument, belongs to other params."""
    try:
        fits = jax.tree.map(lambda m, p: is_hole(m) or m.shape == jnp.shape(p), mask, params, is_leaf=is_hole)
    except (AttributeError, TypeError, ValueError):
        fits = False
    if all(jax.tree.leaves(fits)):
        return
    got, want = (dict(zip(_tree.leaf_paths(t), map(jnp.shape, jax.tree.leaves(t)), strict=True))
                 for t in (mask, params))  # fmt: skip
    lines = [
        f"  {path}: {shape} in the state, {want.get(path, 'missing')} in the params"
        for path, shape in got.items()
        if want.get(path) != shape
    ]
    raise ValueError(
        f"`{argument}` must be that of a `hessjax.prune` of these `params`, but\n"
        + ("\n".join(lines) or "  the containers differ")
        + "\nMake it anew by `tx.init(params)`."
    )


def check_kind(state: PruneState, expected: Callable[[], PruneState], cause: Exception) -> None:
    """Raise a ValueError, for what went wrong, if the state is that of another kind of `prune`."""
    pairs = zip(PruneState._fields, state, expected(), strict=True)
    others = [name for name, found, want in pairs if jax.tree.structure(found) != jax.tree.structure(want)]  # type: ignore[operator]
    if others:
        raise ValueError(
            "`state` must be that of this `hessjax.prune`, with its saliency, its inner optimizer and its "
            f"options, but {' and '.join(f'`{name}`' for name in others)} differ. Make it anew by "
            "`tx.init(params)`."
        ) from cause


def block_at(params: Params, function: Callable[[Params], Block]) -> Block:
    """The gradients of examples at these params."""
    try:
        return function(params)
    except Exception as error:
        if not any(is_hole(x) for x in jax.tree.leaves(params, is_leaf=is_hole)):
            raise
        raise ValueError(
            "`per_example_grads` was called with a part of the params, since `optax.masked` or "
            "`optax.partition` keeps the others from `prune`: let it take the params of your loop instead, "
            "`per_example_grads=lambda _: hessjax.per_example_grads(loss_fn, params, batch)`."
        ) from error


def rows_of(block: Block, mask: Params) -> Block:
    """Gradients of single examples, of the leaves that are pruned."""
    try:
        return drop_others(block, mask)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`per_example_grads` must have the structure of `params`: {error}") from None


# -- zeros that are none -------------------------------------------------------------------------


def most_undone(state: PruneState, params: Params) -> Int[Array, ""]:
    """The most weights there have been, these params included, that are pruned and yet not 0.

    Before the first update none has to be 0.

    Raises:
        ValueError: outside `jit`, if there are any.
    """
    wrong = _counts(_is_undone, state.mask, drop_others(params, state.mask))
    number = jnp.where(state.num_updates > 0, total(wrong).clipped(), 0)
    if not isinstance(number, jax.core.Tracer) and number > 0:
        said = _where(state.mask, wrong)
        raise ValueError(f"`params` must be 0 where they are pruned, but {said} not. {UNDONE}")
    return jnp.maximum(state.num_undone, number)


def num_stuck(mask: Params, params: Params) -> Int[Array, ""]:
    """How many params the mask prunes that are NaN or infinite: nothing added to one makes it 0.

    Raises:
        FloatingPointError: outside `jit`, if there are any.
    """
    # The mask before is not asked for: read after the new one is made, it would be copied at every update.
    wrong = _counts(_is_stuck, mask, params)
    number = total(wrong).clipped()
    if not isinstance(number, jax.core.Tracer) and number > 0:
        said = _where(mask, wrong)
        raise FloatingPointError(
            f"`params` must be finite where they are pruned, but {said} not: no update makes 0 of "
            "NaN or an infinity. Keep such leaves out by `where=`, and bad steps by `optax.apply_if_finite`."
        )
    return number


def num_nan(scores: Params) -> Int[Array, ""]:
    """How many are, or 2³¹ − 1 if they are more."""
    # Not by pieces, for which scores would be written out that no one else needs as such.
    return total(jnp.stack([num_set(jnp.isnan(x)) for x in jax.tree.leaves(scores)])).clipped()


def _is_undone(_: int, mask: Array, param: Array) -> list[Array]:
    return [~mask & (param != 0)]


def _is_stuck(_: int, mask: Array, param: Array) -> list[Array]:
    return [~mask & ~jnp.isfinite(param)]


@functools.partial(jax.jit, static_argnums=0)
def _counts(test: Test, *trees: Params) -> Int[Array, " leaves"]:
    """Of every leaf, how many entries are such and such."""
    return count_where(test, *map(jax.tree.leaves, trees))[0]


def _where(mask: Params, numbers: Int[Array, " leaves"]) -> str:
    """How many of which leaves."""
    found = dict(zip(_tree.leaf_paths(mask), numbers.tolist(), strict=True))
    named = [f"{number} of {path}" for path, number in found.items() if number]
    return f"{', '.join(named)} {'is' if sum(found.values()) == 1 else 'are'}"


# -- scores that say nothing ---------------------------------------------------------------------


def warn_uninformed(rule: Saliency, state: Any, seen: Context, mask: Params, budget: Budget) -> None:
    """Warn of leaves whose scores are all zero and which lose more than their share for it.

    A leaf that begins at zero (a head, the gate of a residual branch, LoRA's B) lies below all others.
    """
    # Scores that the user gives are meant as they are.
    if isinstance(rule, Static) or not budget.over_all_leaves:
        return
    scores = rule.scores(state, seen)
    leaves = list(zip(_tree.leaf_paths(mask), jax.tree.leaves(scores), jax.tree.leaves(mask), strict=True))
    if any(isinstance(x, jax.core.Tracer) for _, *pair in leaves for x in pair):
        return
    lost = {path: int((~m).sum()) for path, _, m in leaves}
    share = sum(lost.values()) / max(sum(m.size for *_, m in leaves), 1)
    named = [
        f"{lost[path]} of the {m.size} weights of {path}"
        for path, s, m in leaves
        if lost[path] > share * m.size + 1 and not bool(jnp.any(s))
    ]
    if named:
        warnings.warn(
            f"At step 0 the ranking over all leaves takes {', '.join(named)}, whose scores are all 0, as "
            "those of weights that begin at zero are. They do not come back: a pruned weight is not "
            "trained. Begin when they have learned something (`start=`), or give every leaf its share "
            "(`allocation=hessjax.allocations.uniform()`).",
            stacklevel=4,
        )
