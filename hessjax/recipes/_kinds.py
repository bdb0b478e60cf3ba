"""What a recipe may name, as pydantic models made of tables, and the functions that the names stand for."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Union

import jax
import jax.numpy as jnp
import optax
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model

from hessjax._core._types import Relative
from hessjax.pruning.allocations import _allocation, _densities
from hessjax.pruning.patterns import _patterns
from hessjax.pruning.patterns._heads import heads
from hessjax.pruning.patterns._pattern import unstructured
from hessjax.pruning.saliencies import _first_order, _obs
from hessjax.pruning.saliencies._drop_and_grow import rigl, sparse_evolution
from hessjax.pruning.saliencies._hard_concrete import hard_concrete
from hessjax.pruning.saliencies._movement import from_magnitudes, movement, soft_movement
from hessjax.pruning.saliencies._saliency import compensated


class Strict(BaseModel):
    """A model that refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")


# YAML tells numbers, text and booleans apart: what is of another kind is a slip, not to be converted.
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, gt=-(2**31), lt=2**31)]
Flag = Annotated[bool, Field(strict=True)]


class Kind(NamedTuple):
    """A function that a recipe may name, and the types of the arguments that it may give.

    What is not given has the function's default; what has none must be given.
    """

    function: Callable[..., Any]
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)


# -- {class: name, args: {...}} --------------------------------------------------------------------

_SEED = "seed"  # files hold no keys


def spec(table: dict[str, Kind], base: type[BaseModel] | None = None) -> Any:
    """One of the table, as `{class: name, args: {...}}` or, without arguments, as its name alone."""
    # Told apart by `class`: an error is then of the class that was named, not of every class there is.
    models = [_model(name, kind, base) for name, kind in table.items()]
    return Annotated[
        Annotated[Union[tuple(models)], Field(discriminator="class_")],  # noqa: UP007
        BeforeValidator(lambda value: {"class": value} if isinstance(value, str) else value),
    ]


def _model(name: str, kind: Kind, base: type[BaseModel] | None) -> type[BaseModel]:
    parameters = inspect.signature(kind.function).parameters.values()
    needed = {_SEED if p.name == "key" else p.name for p in parameters if p.default is p.empty}
    fields: dict[str, Any] = {k: (type_, ... if k in needed else None) for k, type_ in kind.fields.items()}
    args: Any = create_model(f"{name}_args", __base__=base or Strict, **fields)
    default = ... if base is not None or needed & fields.keys() else args()
    tag: Any = Literal[name]
    return create_model(name, __base__=Strict, class_=(tag, Field(alias="class")), args=(args, default))


def build(part: Any, stop: int | None = None) -> Any:
    """What a part of a recipe stands for: functions called with their arguments, numbers as they are."""
    if isinstance(part, _RelativeTo):
        return Relative(part.relative)
    if isinstance(part, dict):
        return {name: build(value, stop) for name, value in part.items()}
    if not isinstance(part, BaseModel):
        return tuple(part) if isinstance(part, list) else part
    function, fields = KINDS[part.class_]  # type: ignore[attr-defined]
    args: Any = part.args  # type: ignore[attr-defined]
    given = {name: build(getattr(args, name), stop) for name in args.model_fields_set & fields.keys()}
    if _SEED in given:
        given["key"] = jax.random.key(given.pop(_SEED))
    if "stop" in inspect.signature(function).parameters:
        given["stop"] = stop
    return function(**given)


def is_spec(value: Any) -> bool:
    """Whether a part of a file is `{class: ..., ...}`."""
    return isinstance(value, dict) and "class" in value


def either(first: Any, second: Any, is_first: Callable[[Any], bool]) -> Any:
    """A value of the first type, or of the second, as the function tells."""
    return Annotated[
        Annotated[first, Tag("first")] | Annotated[second, Tag("second")],
        Discriminator(lambda value: "first" if is_first(value) else "second"),
    ]


# -- what may be named -----------------------------------------------------------------------------

SCHEDULES = {
    "linear_schedule": Kind(
        optax.linear_schedule,
        {"init_value": Real, "end_value": Real, "transition_steps": Whole, "transition_begin": Whole},
    ),
    "polynomial_schedule": Kind(
        optax.polynomial_schedule,
        {
            "init_value": Real,
            "end_value": Real,
            "power": Real,
            "transition_steps": Whole,
            "transition_begin": Whole,
        },
    ),
    "cosine_decay_schedule": Kind(
        optax.cosine_decay_schedule, {"init_value": Real, "decay_steps": Whole, "alpha": Real}
    ),
}

_Scheduled = either(spec(SCHEDULES), Real, is_spec)

_ADAM = {"learning_rate": _Scheduled, "b1": Real, "b2": Real, "eps": Real}
OPTIMIZERS = {
    "sgd": Kind(optax.sgd, {"learning_rate": _Scheduled, "momentum": Real, "nesterov": Flag}),
    "adam": Kind(optax.adam, _ADAM),
    "adamw": Kind(optax.adamw, _ADAM | {"weight_decay": Real}),
    "lars": Kind(optax.lars, {"learning_rate": _Scheduled, "trust_coefficient": Real, "momentum": Real}),
}

STARTS = {"from_magnitudes": Kind(lambda: from_magnitudes), "zeros": Kind(lambda: jnp.zeros_like)}


class _RelativeTo(Strict):
    relative: Real


_GRADS = {"num_grads": Whole, "batch_size": Whole}
_FISHER = {
    "update": _obs.Update,
    "damping": either(_RelativeTo, Real, lambda value: isinstance(value, dict)),
    "block_size": Whole | None,
    **_GRADS,
}
_OPTIMIZER = {"optimizer": spec(OPTIMIZERS)}
_SINGLE_SALIENCIES = {
    "magnitude": Kind(_first_order.magnitude),
    "random": Kind(_first_order.random, {_SEED: Whole}),
    "gradient": Kind(_first_order.gradient, {"decay": Real}),
    "movement": Kind(movement, {"start": spec(STARTS), **_OPTIMIZER}),
    "soft_movement": Kind(soft_movement, {"penalty": _Scheduled, **_OPTIMIZER}),
    "hard_concrete": Kind(
        hard_concrete, {"penalty": _Scheduled, _SEED: Whole, "start_open": Real, **_OPTIMIZER}
    ),
    "sparse_evolution": Kind(sparse_evolution, {"fraction": _Scheduled, _SEED: Whole}),
    "rigl": Kind(rigl, {"fraction": _Scheduled}),
    "obd": Kind(_obs.obd, _GRADS),
    "obs": Kind(_obs.obs, _FISHER),
    "wood_taylor": Kind(_obs.wood_taylor, _FISHER),
}
_SALIENCY = spec(_SINGLE_SALIENCIES)
SALIENCIES = _SINGLE_SALIENCIES | {"compensated": Kind(compensated, {"choose": _SALIENCY, "by": _SALIENCY})}

ALLOCATIONS = {
    "global_threshold": Kind(_allocation.global_threshold, {"floor": Real}),
    "uniform": Kind(_allocation.uniform),
    "erdos_renyi": Kind(_densities.erdos_renyi),
    "explicit": Kind(_densities.explicit, {"sparsities": dict[str, Real]}),
    "by_curvature": Kind(_densities.by_curvature, {"curvature": dict[str, Real], "floor": Real}),
}

PATTERNS = {
    "unstructured": Kind(unstructured),
    "n_of_m": Kind(_patterns.n_of_m, {"n": Whole, "m": Whole, "axis": Whole}),
    "blocks": Kind(_patterns.blocks, {"shape": list[Whole]}),
    "channels": Kind(_patterns.channels, {"axis": Whole}),
    "filters": Kind(_patterns.filters),
    "rows": Kind(_patterns.rows),
    "heads": Kind(heads, {"num_heads": Whole | None, "num_kv_heads": Whole | None}),
}

KINDS = SCHEDULES | OPTIMIZERS | STARTS | SALIENCIES | ALLOCATIONS | PATTERNS
