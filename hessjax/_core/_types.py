"""The types that packages share: params and vectors, settings objects, tolerances, results."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, dataclass_transform, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from hessjax._core._messages import checked_number, is_key, public_name

Params: TypeAlias = PyTree
"""Weights: any pytree whose leaves are real floating-point arrays."""

Vector: TypeAlias = PyTree
"""A direction in weight space: the structure and shapes of the params."""

Block: TypeAlias = PyTree
"""Several vectors at once: a vector whose leaves carry one more, leading, axis."""

Matvec: TypeAlias = Callable[[Vector], Vector]
"""A symmetric linear map on vectors; those that hessjax makes are `jax.tree_util.Partial`s."""

LossFn: TypeAlias = Callable[..., Any]
"""`loss_fn(params, *args) -> scalar`, a mean over the examples in `args`."""

ModelFn: TypeAlias = Callable[..., Any]
"""`model_fn(params, *args) -> outputs`, any pytree of arrays."""

Key: TypeAlias = jax.Array
"""A JAX random key, `jax.random.key(0)`."""

Scalar: TypeAlias = Float[Array, ""]

Where: TypeAlias = (
    str | Collection[str | Callable[..., Any]] | Callable[..., Any] | Mapping[str, Any] | bool | PyTree
)
"""Which leaves: a glob over paths (`"*/kernel"`), several, `(path, leaf) -> bool`, or booleans as a tree."""


# -- settings --------------------------------------------------------------------------------------

Class = TypeVar("Class")


_SETTINGS: set[type] = set()


@dataclass_transform(frozen_default=True)
def settings(*, arrays: tuple[str, ...] = ()) -> Callable[[type[Class]], type[Class]]:
    """Make a class a settings object: a frozen dataclass that is a pytree.

    Equal settings are equal, hash alike and, as arguments of `jax.jit`, share compiled code. Check values in
    `__post_init__`: it runs when people construct one, not when jax rebuilds one around traced values.

    Args:
        arrays: the fields that hold arrays, trees of arrays, or other settings: they are the pytree's
            children, and other values of them compile nothing anew. All other fields must hash.

    Example:
        >>> @settings(arrays=("shift",))
        ... class Line:
        ...     slope: float
        ...     shift: Any = 0.0
        >>> Line(2.0), jax.tree.leaves(Line(2.0, shift=3.0)), Line(2.0) == Line(2.0)
        (Line(slope=2.0, shift=0.0), [3.0], True)
    """

    def decorate(cls: type[Class]) -> type[Class]:
        own_repr = "__repr__" in vars(cls)
        # Not the `==` of dataclasses, which asks for the truth of a comparison of arrays.
        made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        names = [field.name for field in dataclasses.fields(made)]
        static = tuple(name for name in names if name not in arrays)

        def flatten(self: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            held = vars(self)
            return tuple([held[name] for name in arrays]), tuple([held[name] for name in static])

        def flatten_with_keys(self: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            children, values = flatten(self)
            return tuple(zip(map(jax.tree_util.GetAttrKey, arrays), children, strict=True)), values

        def unflatten(values: tuple[Any, ...], children: Any) -> Any:
            # Not by the constructor: its checks read numbers, and jax also passes tracers and placeholders.
            self = object.__new__(made)
            for name, value in zip((*static, *arrays), (*values, *children), strict=True):
                object.__setattr__(self, name, value)
            return self

        # Arrays do not hash: without them equal settings still hash alike.
        made.__eq__, made.__hash__ = _equal, lambda self: hash((made, flatten(self)[1]))
        readable_defaults(made.__init__)
        if not own_repr:
            made.__repr__ = settings_as_text
        # Both forms, since every call of a compiled step flattens, and does it faster without keys.
        jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
        made._array_fields = arrays
        _SETTINGS.add(made)
        return made

    return decorate


def is_settings(x: Any) -> bool:
    """Whether `settings` made its class, or one that it inherits from."""
    return not isinstance(x, type) and any(cls in _SETTINGS for cls in type(x).__mro__)


def assign(made: Any, **checked: Any) -> None:
    """Put checked values in the place of those given; for `__post_init__`, and for nothing else."""
    for name, value in checked.items():
        object.__setattr__(made, name, value)


def _equal(self: Any, other: Any) -> bool:
    if type(self) is not type(other):
        return False
    # Field by field, not as pytrees: to jax an instance of a user's subclass is one leaf, which is itself.
    names = [field.name for field in dataclasses.fields(self)]
    return all(_same_tree(getattr(self, name), getattr(other, name)) for name in names)


def _same_tree(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):  # type: ignore[operator]
        return False
    return all(map(_same, jax.tree.leaves(a), jax.tree.leaves(b)))


def _same(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b  # what is traced has no value to compare
    if (is_key(a) or is_key(b)) and getattr(a, "dtype", None) != getattr(b, "dtype", None):
        return False  # jax refuses to compare them
    # Compared by jax first: a typed random key does not become an array of numpy's.
    return np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a == b)))


def settings_as_text(self: Any) -> str:
    """What people would write for it, arrays by dtype and shape."""
    fields = [f"{f.name}={as_text(getattr(self, f.name))}" for f in dataclasses.fields(self)]
    return f"{public_name(type(self))}({', '.join(fields)})"


def as_text(value: Any) -> str:
    """Functions by name, arrays by dtype and shape."""
    if dataclasses.is_dataclass(value):
        return repr(value)
    return repr(jax.tree.map(_Text, value))


class _Text:
    """A leaf, as it is shown within a tree."""

    def __init__(self, leaf: Any) -> None:
        self.leaf = leaf

    def __repr__(self) -> str:
        leaf = self.leaf
        if inspect.isroutine(leaf) or isinstance(leaf, type):
            return leaf.__name__
        if not hasattr(leaf, "dtype"):
            return repr(leaf)
        if np.ndim(leaf) or is_key(leaf) or isinstance(leaf, jax.core.Tracer):
            return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        return str(leaf)


class _Readable(inspect.Signature):
    """A signature that prints functions among its defaults by name."""

    def __str__(self) -> str:
        return str(self._named())

    def format(self, **options: Any) -> str:
        """As `help` asks for it."""
        return self._named().format(**options)  # type: ignore[attr-defined]

    def _named(self) -> inspect.Signature:
        given = self.parameters.values()
        shown = [p if p.default is p.empty else p.replace(default=_Text(p.default)) for p in given]
        return inspect.Signature(shown, return_annotation=self.return_annotation)


Function = TypeVar("Function", bound=Callable[..., Any])


def readable_defaults(function: Function) -> Function:
    """Let `help` show `rademacher` where it shows `<function rademacher at 0x7f…>`."""
    found = inspect.signature(function)
    parameters, returned = list(found.parameters.values()), found.return_annotation
    function.__signature__ = _Readable(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return function


# -- tolerances and dampings ------------------------------------------------------------------------


CONVERGENCE = ": it decides what counts as converged"
"""What a tolerance that must be there is for; see `Amount.of`."""


@settings(arrays=("amount",))
class Amount:
    """A tolerance or damping: a number, or (`Relative`) a fraction of a scale that is known later.

    Attributes:
        amount: the number, or the fraction.
    """

    amount: Any

    @staticmethod
    def of(value: Any, argument: str = "tol", *, meaning: str = ", got None", instead: str = "") -> "Amount":
        """What a user gave: a number that is at least 0, or `hessjax.relative(r)`.

        Raises:
            TypeError, ValueError: it is no number, negative, NaN, or None. `meaning` may say what the number
                is for, `instead` what a caller takes in its place.
        """
        if isinstance(value, Amount):
            return value
        if value is None:
            raise ValueError(f"`{argument}` must be a number or `relative(r)`{meaning}.")
        checked_number(argument, value, " or `relative(r)`")
        if isinstance(value, jax.core.Tracer):
            return Amount(value)
        if not (number := float(value)) >= 0:
            raise ValueError(f"`{argument}` must be at least 0{instead}, got {number}.")
        return Amount(number)

    def limit(self, scale: Any) -> Any:
        """The number that this stands for, in the units of `scale`."""
        return self.amount

    def fraction(self, scale: Any) -> Any:
        """The number that this stands for, as a fraction of `scale`."""
        return self.amount / scale

    def __repr__(self) -> str:
        return repr(self.amount)


@settings(arrays=("amount",))
class Relative(Amount):
    """A tolerance or damping given as a fraction of the natural scale of what it is compared with."""

    def limit(self, scale: Any) -> Any:
        """The fraction of this scale."""
        return self.amount * scale

    def fraction(self, scale: Any) -> Any:
        """The fraction."""
        return self.amount

    @property
    def factor(self) -> Any:
        """The fraction."""
        return self.amount

    def __repr__(self) -> str:
        return f"relative({self.amount})"


def relative(factor: float | Scalar) -> Relative:
    """A tolerance or damping as a fraction of the natural scale of what it is compared with.

    Args:
        factor: the fraction, positive. `relative(1e-3)` as a tolerance of `eigenpairs` means 1e-3 of the
            largest absolute eigenvalue; of `trace`, 1e-3 of the trace.

    Returns:
        The fraction, marked as one.

    Raises:
        TypeError, ValueError: `factor` is not a positive finite number.

    Example:
        >>> import hessjax as hj
        >>> hj.relative(0.1)
        relative(0.1)
    """
    if isinstance(checked_number("factor", factor), jax.core.Tracer):
        return Relative(factor)
    if not 0 < factor < math.inf:
        raise ValueError(f"`factor` must be positive and finite, got {factor}.")
    return Relative(float(factor))


Tolerance: TypeAlias = float | Relative
"""What arguments take: a number, or `relative(r)`. `Amount.of` checks it."""


# -- means over batches ------------------------------------------------------------------------------


class Forms(NamedTuple):
    """How vᵀAv is made up, for an A that is a mean over batches.

    Attributes:
        parts: (batches, leaves) v_l·(A_b v)_l for every batch b and leaf l.
        weights: (batches,) the number of examples in each.
    """

    parts: Float[Array, "batches leaves"]
    weights: Float[Array, " batches"]


@runtime_checkable
class BatchMatvec(Protocol):
    """A matvec that is a mean over batches of data, and can say how the batches differ."""

    def by_batch(self, vector: Vector) -> tuple[Vector, Forms]:
        """The product, and what each batch contributes to vᵀAv."""
