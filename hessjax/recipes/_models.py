"""A recipe's pruners, policies and whole file, as pydantic models."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic import model_validator as after_validator

from hessjax.recipes._kinds import (
    ALLOCATIONS,
    PATTERNS,
    SALIENCIES,
    Flag,
    Real,
    Strict,
    Whole,
    either,
    is_spec,
    spec,
)

_Fraction = Annotated[Real, Field(ge=0, lt=1)]
_Allocation = spec(ALLOCATIONS)
_Pattern = spec(PATTERNS)
_by_path = dict[str, _Pattern]  # type: ignore[valid-type]
_Patterns = either(_by_path, _Pattern, lambda value: isinstance(value, dict) and not is_spec(value))


def _given(value: Any) -> Any:
    """A field left empty is a slip; None stands here for one that is not there at all."""
    if value is None:
        raise ValueError("must have a value, or be left out, got null")
    return value


_Given = BeforeValidator(_given)


class _Who(Strict):
    """What the arguments of every pruner may hold beside those of its saliency."""

    where: Annotated[str | list[str] | None, _Given] = None
    axes: Annotated[dict[str, str] | None, _Given] = None
    initial_sparsity: _Fraction = 0.0
    final_sparsity: Annotated[_Fraction | None, _Given] = None
    initial_threshold: Real = 0.0
    final_threshold: Annotated[Real | None, _Given] = None
    least: _Fraction = 0.005
    power: Annotated[Real, Field(gt=0)] = 3.0
    allocation: Annotated[_Allocation | None, _Given] = None  # type: ignore[valid-type]
    pattern: Annotated[_Patterns | None, _Given] = None  # type: ignore[valid-type]
    regrow: Flag = True
    straight_through: Flag = False

    @after_validator(mode="after")
    def _one_target(self) -> "_Who":
        if (self.final_sparsity is None) == (self.final_threshold is None):
            raise ValueError("either `final_sparsity` or `final_threshold` must be given, and not both")
        other = "threshold" if self.final_threshold is None else "sparsity"
        wrong = self.model_fields_set & {f"initial_{other}", *(["least"] if other == "threshold" else [])}
        if wrong:
            raise ValueError(f"`{min(wrong)}` has no meaning without `final_{other}`")
        return self


_Pruner = spec(SALIENCIES, _Who)


class _Instance(Strict):
    instance_name: str


_Count = Annotated[Whole, Field(ge=0)]


class Policy(Strict):
    """When a pruner acts: all in epochs, or all in steps."""

    pruner: _Instance
    starting_epoch: Annotated[_Count | None, _Given] = None
    ending_epoch: Annotated[_Count | None, _Given] = None
    starting_step: Annotated[_Count | None, _Given] = None
    ending_step: Annotated[_Count | None, _Given] = None
    frequency: Annotated[Whole, Field(ge=1)] = 1

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


def _whole(value: Any) -> Any:
    """For `Literal`, 1.0 and True are 1."""
    return value if type(value) is int else repr(value)


class RecipeFile(Strict):
    """A whole file."""

    version: Annotated[Literal[1], BeforeValidator(_whole)]
    pruners: Annotated[dict[str, _Pruner], Field(min_length=1)]  # type: ignore[valid-type]
    policies: Annotated[list[Policy], Field(min_length=1)]
