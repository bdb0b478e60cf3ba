"""Distiller's pruners: each as pruners of a recipe, or the reason why there is none like it."""

from collections.abc import Callable, Iterator
from typing import Any

Part = tuple[str, dict[str, Any]]
"""A pruner of a recipe: its name, class and arguments."""


class NoCounterpartError(Exception):
    """Why something cannot be translated, and where in it that stands."""

    def __init__(self, reason: str, *where: str) -> None:
        super().__init__(reason)
        self.reason, self.where = reason, where


def counterparts(name: str, pruner: Any) -> list[Part]:
    """One of Distiller's pruners as one of ours for every target, each with a name; others as they are."""
    kind = pruner.get("class") if isinstance(pruner, dict) else None
    if isinstance(kind, str) and kind in _NONE:
        raise NoCounterpartError(f"{kind} has no counterpart: {_NONE[kind]}")
    if not isinstance(kind, str) or kind not in _CLASSES:
        return [(name, pruner)]
    saliency, translate = _CLASSES[kind]
    given = {k: v for k, v in pruner.items() if k != "class"}
    if isinstance(args := given.get("args"), dict):  # as a recipe nests them
        given = given | args
        del given["args"]
    fields = _Fields(kind, given)
    more = {"regrow": False} | ({"seed": 0} if saliency == "random" else {})
    parts = [{"class": saliency, "args": more | args} for args in translate(fields)]
    fields.check_all_taken()
    names = [name] if len(parts) == 1 else [f"{name}#{i}" for i in range(1, len(parts) + 1)]
    return list(zip(names, parts, strict=True))


class _Fields:
    """The fields of a pruner, which must all be taken."""

    def __init__(self, kind: str, fields: dict[str, Any]) -> None:
        self.kind, self.left = kind, fields

    def take(self, name: str, *default: Any) -> Any:
        """A field, or its default where it has one."""
        if name not in self.left and not default:
            raise NoCounterpartError(f"`{name}` of {self.kind} is missing")
        return self.left.pop(name, *default)

    def refuse_unless(self, name: str, plain: Any, advice: str) -> None:
        """A field with one value that has a counterpart."""
        if self.take(name, plain) != plain:
            raise NoCounterpartError(f"{advice}: `{name}` of {self.kind} has no counterpart", name)

    def check_all_taken(self) -> None:
        """Raise for a field that is none."""
        for name in self.left:
            raise NoCounterpartError(f"there is no `{name}` in {self.kind}", name)


def _gradual(fields: _Fields) -> list[dict[str, Any]]:
    ends = {name: fields.take(name) for name in ("initial_sparsity", "final_sparsity")}
    return [{"where": _globs(fields.take("weights")), "allocation": "uniform", **ends}]


def _gradual_groups(fields: _Fields) -> list[dict[str, Any]]:
    pattern = _pattern(fields)
    return [args | {"pattern": pattern} for args in _gradual(fields)]


def _levels(fields: _Fields) -> list[dict[str, Any]]:
    levels = {name: level for name, level in _by_name(fields, "levels").items() if level != 0}
    if not levels:
        raise NoCounterpartError("`levels` must have one above 0", "levels")
    return [_level(names, level) for level, names in _together(levels, "levels")]


def _groups(fields: _Fields) -> list[dict[str, Any]]:
    if "reg_regims" in fields.left:  # of its first version
        return [_level(names, level) | {"pattern": pattern} for names, level, pattern in _regimes(fields)]
    pattern = _pattern(fields)
    return [_level(fields.take("weights"), fields.take("desired_sparsity")) | {"pattern": pattern}]


def _thresholds(fields: _Fields) -> list[dict[str, Any]]:
    thresholds = _by_name(fields, "thresholds")
    return [_threshold(names, level) for level, names in _together(thresholds, "thresholds")]


def _group_thresholds(fields: _Fields) -> list[dict[str, Any]]:
    fields.refuse_unless("threshold_criteria", "Mean_Abs", "groups are judged by their mean magnitude")
    return [_threshold(names, level) | {"pattern": pattern} for names, level, pattern in _regimes(fields)]


def _level(names: Any, level: Any) -> dict[str, Any]:
    # From its first mask on, as Distiller does: nothing rises.
    ends = {"initial_sparsity": level, "final_sparsity": level}
    return {"where": _globs(names), "allocation": "uniform", **ends}


def _threshold(names: Any, level: Any) -> dict[str, Any]:
    return {"where": _globs(names), "initial_threshold": level, "final_threshold": level, "least": 0}


def _by_name(fields: _Fields, name: str) -> dict[str, Any]:
    found = fields.take(name)
    if not isinstance(found, dict) or not found:
        raise NoCounterpartError(f"`{name}` of {fields.kind} must have an entry for every weight", name)
    return found


def _together(values: dict[str, Any], field: str) -> list[tuple[Any, list[str]]]:
    """The names of every value: one pruner for each."""
    found: list[tuple[Any, list[str]]] = []
    for name, value in values.items():
        names = next((names for other, names in found if other == value), None)
        if names is None:
            found.append((value, names := []))
        names.append(name)
    if "*" in values and len(found) > 1:
        raise NoCounterpartError(
            "a `*` beside others, which stands for the rest, has no counterpart: name the weights", field, "*"
        )
    return found


def _regimes(fields: _Fields) -> Iterator[tuple[list[str], Any, Any]]:
    regimes = _by_name(fields, "reg_regims")
    for name, pair in regimes.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise NoCounterpartError("there must be a number and a type of group", "reg_regims", name)
    for (level, group), names in _together({k: tuple(v) for k, v in regimes.items()}, "reg_regims"):
        yield names, level, _pattern_of(fields.kind, group, "reg_regims", names[0])


_GROUPS = {"Filters": "filters", "3D": "filters", "Channels": "channels", "Rows": "rows"}


def _pattern(fields: _Fields) -> Any:
    fields.refuse_unless("group_dependency", None, "every leaf is ranked by itself")
    fields.refuse_unless("group_size", 1, "a group is one filter or channel")
    fields.refuse_unless("noise", 0, "scores have no noise")
    group, more = fields.take("group_type"), fields.take("kwargs", None)
    if group == "Blocks":
        return _blocks(more)
    if more:
        raise NoCounterpartError(f"`kwargs` has no counterpart for {group}", "kwargs")
    return _pattern_of(fields.kind, group, "group_type")


def _pattern_of(kind: str, group: Any, *where: str) -> str:
    if kind.startswith("Random") and group not in ("Filters", "3D"):
        raise NoCounterpartError(f"{kind} must have Filters or 3D, got {group}", *where)
    if not isinstance(group, str) or group not in _GROUPS:
        known = ", ".join([*_GROUPS, "Blocks"])
        raise NoCounterpartError(f"there is no group {group!r}, only {known}", *where)
    return _GROUPS[group]


def _blocks(more: Any) -> dict[str, Any]:
    """[repetitions, depth, 1, 1] over filters and channels: the last two axes of a kernel, turned round."""
    shape = more.get("block_shape") if isinstance(more, dict) else None
    if not isinstance(shape, list) or len(shape) != 4 or shape[2:] != [1, 1] or 1 not in shape[:2]:
        raise NoCounterpartError(
            "`block_shape` must be [n, 1, 1, 1] or [1, n, 1, 1]; others have no counterpart",
            "kwargs",
            "block_shape",
        )
    return {"class": "blocks", "args": {"shape": [shape[1], shape[0]]}}


_NOT_STD = (
    "thresholds here are numbers, not multiples of a leaf's deviation: MagnitudeParameterPruner takes them"
)
_NOT_FED = "nothing here sees activations: L1RankedStructureParameterPruner ranks the same groups"
_NONE = {
    "SensitivityPruner": _NOT_STD,
    "SplicingPruner": _NOT_STD,
    "BaiduRNNPruner": "its thresholds rise by two slopes: `magnitude` takes `initial_` and `final_threshold`",
    "BernoulliFilterPruner": "the masks of a recipe are no random ones: RandomRankedFilterPruner draws once",
    "RandomLevelStructureParameterPruner": "a recipe's sparsity is no random one",
    "GradientRankedFilterPruner": "`movement` and `obd` with `pattern: filters` use gradients",
    "ActivationAPoZRankedFilterPruner": _NOT_FED,
    "ActivationMeanRankedFilterPruner": _NOT_FED,
    "FMReconstructionChannelPruner": _NOT_FED,
    "L2RankedStructureParameterPruner": "groups are ranked by mean magnitude: take L1Ranked...",
}
_NONE |= {f"{name}_AGP": advice for name, advice in _NONE.items()}

_CLASSES: dict[str, tuple[str, Callable[[_Fields], list[dict[str, Any]]]]] = {
    "AutomatedGradualPruner": ("magnitude", _gradual),
    "SparsityLevelParameterPruner": ("magnitude", _levels),
    "LevelPruner": ("magnitude", _levels),
    "MagnitudeParameterPruner": ("magnitude", _thresholds),
    "StructureParameterPruner": ("magnitude", _group_thresholds),
    "L1RankedStructureParameterPruner": ("magnitude", _groups),
    "L1RankedStructureParameterPruner_AGP": ("magnitude", _gradual_groups),
    "RandomRankedFilterPruner": ("random", _groups),
    "RandomRankedFilterPruner_AGP": ("random", _gradual_groups),
}


# -- names of weights ------------------------------------------------------------------------------

# One glob has no alternatives: letter by letter, this one is `kernel` or `weight`.
_WEIGHT = "[kw]e[ri][ng][eh][lt]"


def _globs(names: Any) -> Any:
    return [_glob(name) for name in names] if isinstance(names, list) else _glob(names)


def _glob(name: Any) -> Any:
    """`module.conv1.weight` as a glob that `conv1/kernel` matches; a path or a glob as it is."""
    if not isinstance(name, str) or "/" in name or "." not in name:
        return name
    *modules, last = name.removeprefix("module.").split(".")
    return "[._/]".join([*modules, _WEIGHT if last == "weight" else last])
