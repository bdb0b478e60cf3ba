"""Distiller's own classes and fields, said in a recipe's; or by name, that they have no counterpart."""

import itertools
from typing import Any, NamedTuple

from hessjax.recipes._distiller_pruners import NoCounterpartError, Part, counterparts

Location = tuple[Any, ...]


class Translation(NamedTuple):
    """A file in a recipe's own words.

    Attributes:
        content: of the file; what has no counterpart is left out.
        pruners: the name in the file of every pruner that was made of one.
        policies: the index in the file of every policy.
        wrong: locations in the file, and what is wrong there.
    """

    content: Any
    pruners: dict[str, str]
    policies: list[int]
    wrong: list[tuple[Location, str]]

    def in_file(self, location: Location) -> Location:
        """A location in `content` as one in the file."""
        if location[:1] == ("pruners",) and len(location) > 1:
            return ("pruners", self.pruners.get(location[1], location[1]), *location[2:])
        if location[:1] == ("policies",) and len(location) > 1 and location[1] < len(self.policies):
            return ("policies", self.policies[location[1]], *location[2:])
        return location


def translated(content: Any) -> Translation:
    """The content of a file, with what is Distiller's in a recipe's own words."""
    if not isinstance(content, dict):
        return Translation(content, {}, [], [])
    rest, wrong = _without_sections(content)
    made: dict[str, list[Part]] = {}
    pruners = rest.get("pruners")
    if isinstance(pruners, dict):
        for name, pruner in pruners.items():
            try:
                made[name] = counterparts(name, pruner)
            except NoCounterpartError as error:
                wrong.append((("pruners", name, *error.where), error.reason))
        rest["pruners"] = {new: part for parts in made.values() for new, part in parts}
    policies = rest.get("policies")
    indices: list[int] = []
    if isinstance(policies, list):
        lost = {location[1] for location, _ in wrong if location[0] == "pruners"}
        rest["policies"], indices = _policies(policies, pruners, made, lost, wrong)
    return Translation(rest, {new: name for name, parts in made.items() for new, _ in parts}, indices, wrong)


# -- whole sections --------------------------------------------------------------------------------

_SECTIONS = {
    "lr_schedulers": "give the optimizer a schedule, as in `optax.sgd(optax.exponential_decay(...))`",
    "regularizers": "add the penalty to the loss, or to the optimizer by `optax.add_decayed_weights`",
    "quantizers": "nothing is quantized here",
    "extensions": "networks are made smaller after training, by `hessjax.compact`",
}


def _without_sections(content: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Location, str]]]:
    rest, wrong = dict(content), []
    for section, advice in _SECTIONS.items():
        if isinstance(parts := content.get(section), dict) and parts:
            del rest[section]
            for name, part in parts.items():
                what = part.get("class", section) if isinstance(part, dict) else section
                wrong.append(((section, name), f"{what} has no counterpart in a recipe: {advice}"))
    return rest, wrong


# -- policies --------------------------------------------------------------------------------------

_KINDS = {"lr_scheduler": "lr_schedulers", "regularizer": "regularizers", "quantizer": "quantizers",
          "extension": "extensions"}  # fmt: skip


def _policies(
    policies: list[Any],
    pruners: Any,
    made: dict[str, list[Part]],
    lost: set[Any],
    wrong: list[tuple[Location, str]],
) -> tuple[list[Any], list[int]]:
    """Every policy for each of the pruners that its one has become, and its index in the file."""
    found, indices = [], []
    for index, policy in enumerate(policies):
        try:
            parts = _policy(policy, pruners, made, lost)
        except NoCounterpartError as error:
            wrong.append((("policies", index, *error.where), error.reason))
            continue
        found += parts
        indices += [index] * len(parts)
    return found, indices


def _policy(policy: Any, pruners: Any, made: dict[str, list[Part]], lost: set[Any]) -> list[Any]:
    if not isinstance(policy, dict):
        return [policy]
    for kind, section in _KINDS.items():
        if kind in policy:
            advice = _SECTIONS[section]
            raise NoCounterpartError(f"a policy of a {kind} has no counterpart: {advice}")
    named = policy.get("pruner")
    name = named.get("instance_name") if isinstance(named, dict) else None
    if not isinstance(name, str) or not isinstance(named, dict):
        return [policy]
    if name in lost:  # told already
        return []
    parts = made.get(name, [])
    if not parts or parts[0][1] is pruners[name]:
        return [policy]
    _apply_args(named.get("args"), parts)
    return [{"pruner": {"instance_name": new}, **_when(policy)} for new, _ in parts]


def _apply_args(args: Any, parts: list[Part]) -> None:
    """What a policy says of its pruner: whether weights that are pruned go on to be trained."""
    given = dict(args) if isinstance(args, dict) else {}
    both = "use_double_copies", "mask_on_forward_only"
    dense, masked = [bool(given.pop(name, False)) for name in both], bool(given.pop("mask_gradients", False))
    kept = bool(given.pop("keep_mask", False))
    if any(given.values()):
        name = next(name for name, value in given.items() if value)
        raise NoCounterpartError(f"`{name}` has no counterpart", "pruner", "args", name)
    if any(dense) != all(dense) or (all(dense) and not kept) or (masked and not all(dense)):
        raise NoCounterpartError(
            "dense weights beside the masked ones are there with `use_double_copies`, `mask_on_forward_only` "
            "and `keep_mask` all true, or not at all; other choices have no counterpart",
            "pruner",
            "args",
        )
    if all(dense):
        for _, part in parts:
            part["args"] |= {"regrow": True, "straight_through": not masked}


def _when(policy: dict[str, Any]) -> dict[str, Any]:
    """Distiller leaves out the ending epoch; its target is reached in the last one that it prunes in."""
    left = {name: x for name, x in policy.items() if name not in ("pruner", "epochs")}
    if "epochs" in policy:
        return left | _of_epochs(policy["epochs"])
    if not {"starting_epoch", "ending_epoch"} <= left.keys():
        return left
    start, end, every = left["starting_epoch"], left["ending_epoch"], left.get("frequency", 1)
    if not all(type(x) is int for x in (start, end, every)) or every < 1:
        return left
    if end <= start:
        raise NoCounterpartError(
            f"must lie after `starting_epoch`, which is {start}, got {end}", "ending_epoch"
        )
    return left | {"ending_epoch": start + (end - start - 1) // every * every}


def _of_epochs(epochs: Any) -> dict[str, Any]:
    is_list = isinstance(epochs, list) and bool(epochs) and all(type(x) is int for x in epochs)
    steps = {b - a for a, b in itertools.pairwise(epochs)} if is_list else set()
    if not is_list or len(steps) > 1 or min(steps, default=1) < 1:
        raise NoCounterpartError("`epochs` must be equally far apart; others have no counterpart", "epochs")
    return {"starting_epoch": epochs[0], "ending_epoch": epochs[-1], "frequency": min(steps, default=1)}
