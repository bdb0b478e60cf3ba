"""The grammar of recipes, as pydantic models, and the functions that their parts stand for."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Union

import jax
import optax
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model
from pydantic import model_validator as after_validator

from hessjax._typing import Relative
from hessjax.pruning import allocation, densities, first_order, obs
from hessjax.pruning import pattern as patterns
from hessjax.pruning.compensated import compensated
from hessjax.pruning.hard_concrete import hard_concrete
from hessjax.pruning.movement import movement, soft_movement
from hessjax.pruning.pattern_by_path import heads
from hessjax.pruning.saliency import magnitude


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Kind(NamedTuple):
    """A function that a recipe may name, and the types of the arguments that it may give.

    What is not given has the function's default; what has none must be given.
    """

    function: Callable[..., Any]
    fields: dict[str, Any] = {}  # noqa: RUF012 (never changed)


# -- {class: name, args: {...}} --------------------------------------------------------------------

_SEED = "seed"  # files hold no keys


def _spec(table: dict[str, Kind], base: type[BaseModel] | None = None) -> Any:
    """One of the table, as `{class: name, args: {...}}` or, without arguments, as its name alone."""
    models = [_model(name, kind, base) for name, kind in table.items()]
    return Annotated[
        Annotated[Union[tuple(models)], Field(discriminator="class_")],  # noqa: UP007
        BeforeValidator(lambda value: {"class": value} if isinstance(value, str) else value),
    ]


def _model(name: str, kind: Kind, base: type[BaseModel] | None) -> type[BaseModel]:
    parameters = inspect.signature(kind.function).parameters.values()
    needed = {_SEED if p.name == "key" else p.name for p in parameters if p.default is p.empty}
    fields: dict[str, Any] = {k: (type_, ... if k in needed else None) for k, type_ in kind.fields.items()}
    args: Any = create_model(f"{name}_args", __base__=base or _Strict, **fields)
    default = ... if base is not None or needed & fields.keys() else args()
    tag: Any = Literal[name]
    return create_model(name, __base__=_Strict, class_=(tag, Field(alias="class")), args=(args, default))


def build(part: Any, stop: int | None = None) -> Any:
    """What a part of a recipe stands for: functions called with their arguments, numbers as they are."""
    if isinstance(part, _RelativeTo):
        return Relative(part.relative)
    if isinstance(part, dict):
        return {name: build(value, stop) for name, value in part.items()}
    if not isinstance(part, BaseModel):
        return tuple(part) if isinstance(part, list) else part
    function, fields = _KINDS[part.class_]  # type: ignore[attr-defined]
    args: Any = part.args  # type: ignore[attr-defined]
    given = {name: build(getattr(args, name), stop) for name in args.model_fields_set & fields.keys()}
    if _SEED in given:
        given["key"] = jax.random.key(given.pop(_SEED))
    if "stop" in inspect.signature(function).parameters:
        given["stop"] = stop
    return function(**given)


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "class" in value


def _either(first: Any, second: Any, is_first: Callable[[Any], bool]) -> Any:
    """A value of the first type, or of the second, as the function tells."""
    return Annotated[
        Annotated[first, Tag("first")] | Annotated[second, Tag("second")],
        Discriminator(lambda value: "first" if is_first(value) else "second"),
    ]


# -- what may be named -----------------------------------------------------------------------------

SCHEDULES = {
    "linear_schedule": Kind(
        optax.linear_schedule,
        {"init_value": float, "end_value": float, "transition_steps": int, "transition_begin": int},
    ),
    "polynomial_schedule": Kind(
        optax.polynomial_schedule,
        {
            "init_value": float,
            "end_value": float,
            "power": float,
            "transition_steps": int,
            "transition_begin": int,
        },
    ),
    "cosine_decay_schedule": Kind(
        optax.cosine_decay_schedule, {"init_value": float, "decay_steps": int, "alpha": float}
    ),
}

_Scheduled = _either(_spec(SCHEDULES), float, _is_spec)

_ADAM = {"learning_rate": _Scheduled, "b1": float, "b2": float, "eps": float}
OPTIMIZERS = {
    "sgd": Kind(optax.sgd, {"learning_rate": _Scheduled, "momentum": float, "nesterov": bool}),
    "adam": Kind(optax.adam, _ADAM),
    "adamw": Kind(optax.adamw, _ADAM | {"weight_decay": float}),
}


class _RelativeTo(_Strict):
    relative: float


_GRADS = {"num_grads": int, "batch_size": int}
_FISHER = {
    "update": str,
    "damping": _either(_RelativeTo, float, lambda value: isinstance(value, dict)),
    "block_size": int | None,
    **_GRADS,
}
_OPTIMIZER = {"optimizer": _spec(OPTIMIZERS)}
_SINGLE_SALIENCIES = {
    "magnitude": Kind(magnitude),
    "random": Kind(first_order.random, {_SEED: int}),
    "gradient": Kind(first_order.gradient, {"decay": float}),
    "movement": Kind(movement, _OPTIMIZER),
    "soft_movement": Kind(soft_movement, {"penalty": _Scheduled, **_OPTIMIZER}),
    "hard_concrete": Kind(
        hard_concrete, {"penalty": _Scheduled, _SEED: int, "start_open": float, **_OPTIMIZER}
    ),
    "obd": Kind(obs.obd, _GRADS),
    "obs": Kind(obs.obs, _FISHER),
    "wood_taylor": Kind(obs.wood_taylor, _FISHER),
}
_SALIENCY = _spec(_SINGLE_SALIENCIES)
SALIENCIES = _SINGLE_SALIENCIES | {"compensated": Kind(compensated, {"choose": _SALIENCY, "by": _SALIENCY})}

ALLOCATIONS = {
    "global_threshold": Kind(allocation.global_threshold, {"floor": float}),
    "uniform": Kind(allocation.uniform),
    "erdos_renyi": Kind(densities.erdos_renyi),
    "explicit": Kind(densities.explicit, {"sparsities": dict[str, float]}),
    "by_curvature": Kind(densities.by_curvature, {"curvature": dict[str, float], "floor": float}),
}

PATTERNS = {
    "unstructured": Kind(patterns.unstructured),
    "n_of_m": Kind(patterns.n_of_m, {"n": int, "m": int, "axis": int}),
    "blocks": Kind(patterns.blocks, {"shape": list[int]}),
    "channels": Kind(patterns.channels, {"axis": int}),
    "filters": Kind(patterns.filters),
    "rows": Kind(patterns.rows),
    "heads": Kind(heads, {"num_heads": int | None, "out": str}),
}
_Pattern = _spec(PATTERNS)

_KINDS = SCHEDULES | OPTIMIZERS | SALIENCIES | ALLOCATIONS | PATTERNS


# -- the whole -------------------------------------------------------------------------------------

_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Allocation = _spec(ALLOCATIONS)
_by_path = dict[str, _Pattern]  # type: ignore[valid-type]
_Patterns = _either(_by_path, _Pattern, lambda value: isinstance(value, dict) and not _is_spec(value))


def _given(value: Any) -> Any:
    """A field left empty is a slip; None stands here for one that is not there at all."""
    if value is None:
        raise ValueError("must have a value, or be left out, got null")
    return value


_Given = BeforeValidator(_given)


class _Who(_Strict):
    """What the arguments of every pruner may hold beside those of its saliency."""

    where: Annotated[str | list[str] | None, _Given] = None
    initial_sparsity: _Fraction = 0.0
    final_sparsity: Annotated[_Fraction | None, _Given] = None
    initial_threshold: float = 0.0
    final_threshold: Annotated[float | None, _Given] = None
    least: _Fraction = 0.005
    power: Annotated[float, Field(gt=0)] = 3.0
    allocation: Annotated[_Allocation | None, _Given] = None  # type: ignore[valid-type]
    pattern: Annotated[_Patterns | None, _Given] = None  # type: ignore[valid-type]
    regrow: bool = True
    straight_through: bool = False

    @after_validator(mode="after")
    def _one_target(self) -> "_Who":
        if (self.final_sparsity is None) == (self.final_threshold is None):
            raise ValueError("either `final_sparsity` or `final_threshold` must be given, and not both")
        other = "threshold" if self.final_threshold is None else "sparsity"
        wrong = self.model_fields_set & {f"initial_{other}", *(["least"] if other == "threshold" else [])}
        if wrong:
            raise ValueError(f"`{min(wrong)}` has no meaning without `final_{other}`")
        return self


_Pruner = _spec(SALIENCIES, _Who)


class _Instance(_Strict):
    instance_name: str


_Count = Annotated[int, Field(ge=0)]


class Policy(_Strict):
    """When a pruner acts: all in epochs, or all in steps."""

    pruner: _Instance
    starting_epoch: Annotated[_Count | None, _Given] = None
    ending_epoch: Annotated[_Count | None, _Given] = None
    starting_step: Annotated[_Count | None, _Given] = None
    ending_step: Annotated[_Count | None, _Given] = None
    frequency: Annotated[int, Field(ge=1)] = 1

    @property
    def in_epochs(self) -> bool:
        """Whether start, end and frequency count epochs."""
        return self.starting_epoch is not None

    @property
    def span(self) -> tuple[int, int]:
        """Start and end, in the unit of the policy."""
        pairs = (self.starting_epoch, self.ending_epoch), (self.starting_step, self.ending_step)
        start, end = pairs[0] if self.in_epochs else pairs[1]
        assert start is not None
        assert end is not None
        return start, end

    @after_validator(mode="after")
    def _one_unit(self) -> "Policy":
        given = {name for name in ("epoch", "step") for end in ("starting", "ending")
                 if getattr(self, f"{end}_{name}") is not None}  # fmt: skip
        unit = min(given, default="epoch")
        if len(given) != 1 or None in (getattr(self, f"starting_{unit}"), getattr(self, f"ending_{unit}")):
            raise ValueError(
                "`starting_epoch` and `ending_epoch` must be given, or `starting_step` and `ending_step`"
            )
        start, end = self.span
        if end < start:
            raise ValueError(
                f"`ending_{unit}` must not lie before `starting_{unit}`, which is {start}, got {end}: "
                "the target would never be reached"
            )
        return self


class RecipeFile(_Strict):
    """A whole file."""

    version: Literal[1]
    pruners: Annotated[dict[str, _Pruner], Field(min_length=1)]  # type: ignore[valid-type]
    policies: Annotated[list[Policy], Field(min_length=1)]
