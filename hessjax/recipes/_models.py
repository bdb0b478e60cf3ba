"""A recipe's pruners, policies and whole file, as pydantic models; YAML with the line of every field."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field
from pydantic import model_validator as after_validator

from hessjax.recipes._kinds import ALLOCATIONS, PATTERNS, SALIENCIES, Strict, either, is_spec, spec

_Fraction = Annotated[float, Field(ge=0, lt=1)]
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


_Pruner = spec(SALIENCIES, _Who)


class _Instance(Strict):
    instance_name: str


_Count = Annotated[int, Field(ge=0)]


class Policy(Strict):
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


class RecipeFile(Strict):
    """A whole file."""

    version: Literal[1]
    pruners: Annotated[dict[str, _Pruner], Field(min_length=1)]  # type: ignore[valid-type]
    policies: Annotated[list[Policy], Field(min_length=1)]


# -- YAML with the line of every field, for messages that say where ---------------------------------


class YamlError(ValueError):
    """What is wrong with a document, and where."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(line, field, reason)
        self.line, self.field, self.reason = line, field, reason


def load_yaml(text: str) -> tuple[Any, Any]:
    """What a YAML document holds, and its tree of nodes.

    Raises:
        YamlError: for what is not YAML, and for a key that stands there twice.
    """
    try:
        # Composed for the lines, loaded for the values: plain values do not know where they stood.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_keys(node, ())
        return yaml.safe_load(text), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, "", f"not YAML: {error.problem}") from error


def find_in_yaml(node: Any, location: Sequence[Any]) -> tuple[int, str]:
    """The line of a field, and its name. What is not in the file, such as pydantic's tags, is skipped."""
    line, names = node.start_mark.line + 1 if node else 1, []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                continue
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            continue
        names.append(str(part))
    return line, ".".join(names)


def _check_keys(node: Any, location: tuple[str, ...]) -> None:
    """YAML readers keep the last of two equal keys in silence."""
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _check_keys(value, (*location, str(index)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        here = (*location, str(key.value))
        if key.value in seen:
            raise YamlError(key.start_mark.line + 1, ".".join(here), "this key stands here twice")
        seen.add(key.value)
        _check_keys(value, here)
