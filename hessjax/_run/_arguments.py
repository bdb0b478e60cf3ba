"""What a run is given: its options, and whether all arguments are what they must be."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax

from hessjax._core import _tree
from hessjax._core._messages import (
    checked_any_key,
    checked_flag,
    checked_function,
    checked_instance,
    checked_sequence,
    shown,
)
from hessjax._core._types import Params, Vector
from hessjax._run import _estimator
from hessjax._run._estimator import Callback, Estimator


class RunOptions(TypedDict, total=False):
    """The options that every one-liner passes on to `run`.

    Attributes:
        callbacks: each is called with a `Progress` every few products and at the end; see `run`.
        on_device: run the whole loop in one compiled `lax.while_loop`; see `run`.
    """

    callbacks: Sequence[Callback]
    on_device: bool


def checked_options(function: str, options: Mapping[str, Any]) -> RunOptions:
    """The options of a one-liner of this name, none of them unknown."""
    if unknown := options.keys() - RunOptions.__annotations__.keys():
        raise TypeError(
            f"{function}() got an unexpected keyword argument '{min(unknown)}'; options of a run are "
            f"{', '.join(f'`{name}`' for name in RunOptions.__annotations__)}."
        )
    check_callbacks(options.get("callbacks", ()))
    checked_flag("on_device", options.get("on_device", False))
    return RunOptions(**options)  # type: ignore[typeddict-item]


def check_callbacks(callbacks: Any) -> None:
    """Raise a TypeError for what is no sequence of functions, or one that only makes a callback."""
    for callback in checked_sequence("callbacks", callbacks, "functions `(progress) -> None`"):
        # Called with a `Progress`, they would make one more callback and show nothing.
        is_maker = getattr(callback, "__name__", "") in ("progress_bar", "checkpoint")
        if not callable(callback) or is_maker:
            hint = f": call it, `hessjax.{callback.__name__}(...)`" if is_maker else ""
            raise TypeError(
                "`callbacks` must hold functions `(progress) -> None`, such as `hessjax.progress_bar()`, "
                f"got {shown(callback)}{hint}."
            )
        checked_function("callbacks", callback, "(progress) -> None")


def check_run(estimator: Any, matvec: Any, key: Any, callbacks: Any, on_device: Any) -> None:
    """Raise an error for arguments of a run that are not what they must be."""
    _check_estimator(estimator)
    checked_function("matvec", matvec, "(vector) -> vector")
    checked_any_key(key)
    check_callbacks(callbacks)
    checked_flag("on_device", on_device)


def _check_estimator(estimator: Any) -> None:
    """An estimator goes through `jit` as an argument: one that is no pytree is made a static one."""
    checked_instance("estimator", estimator, Estimator, "lanczos(5)")
    if not jax.tree_util.all_leaves([estimator]):
        return
    kind = type(estimator)
    try:
        hash(estimator)
    except TypeError as error:
        raise TypeError(
            f"`estimator` must hash, got a {kind.__name__} that does not ({error}): make it a frozen "
            "dataclass, and if it holds arrays a pytree with these as leaves "
            "(`jax.tree_util.register_dataclass`)."
        ) from None
    jax.tree_util.register_static(kind)


def is_traced(tree: Any) -> bool:
    """Whether any leaf is a value that only a trace knows."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def refuse_tracers(tree: Any) -> None:
    """The loop on the host reads numbers, which traced values do not have."""
    if is_traced(tree):
        raise TypeError(
            "`run` loops on the host by default and cannot be traced: inside `jit`, `vmap` or `scan` pass "
            "`on_device=True`."
        )


def width_of(estimator: Estimator, state: Any, like: Params, argument: str) -> int:
    """How many vectors a step multiplies, all of them like the params."""
    # By a function of the module: a bound method would be traced anew in every run.
    block = _estimator.block_of.eval_shape(estimator, state)
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), block)
    _tree.check_like(row, like, argument, "like")
    return jax.tree.leaves(block)[0].shape[0]


def check_products(products: Sequence[Vector], like: Params) -> None:
    """Raise an error for products that are not vectors like the params."""
    for product in products:
        _tree.check_vector(product, like, "matvec(vector)", "like")
