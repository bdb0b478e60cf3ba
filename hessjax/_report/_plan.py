"""What is asked for, and how many products each part of it may take."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from hessjax._core._messages import check_flags, checked_count, checked_number

WISHED = {"trace": 100, "eigenpairs": 300, "density": 160, "per_layer": 20}
"""Products by default: probes, Lanczos steps with restarts, steps of two probes, steps for each leaf."""

LEAST = {"trace": 10, "eigenpairs": 40, "density": 20, "per_layer": 8}
"""Fewer say too little to be shown."""

LANDSCAPE_POINTS = 15
QUALITY_PROBES = 2
"""For each leaf, to hold K-FAC against the Fisher matrix."""
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Sparsities that the report tries."""

FORWARD = 0.25
"""A loss costs about a quarter of a product."""


class Asked(NamedTuple):
    """What a report is to hold, and how much it may cost.

    Attributes:
        top: eigenpairs from each end of the spectrum.
        density: the spectral density.
        per_layer: the spectrum of the block of every leaf.
        landscape: the loss across the plane of the two steepest directions.
        layers: what each leaf takes part in, and how well K-FAC describes the curvature.
        budget: the most products; None: as many as it takes by default.
        minutes: the most time, likewise.
        seed: of all random vectors.
    """

    top: int = 5
    density: bool = False
    per_layer: bool = False
    landscape: bool = False
    layers: bool = False
    budget: int | None = None
    minutes: float | None = None
    seed: int = 0


def checked_asked(asked: Asked) -> Asked:
    """The same, every number being one that can be met."""
    checked_count("top", asked.top)
    checked_count("seed", asked.seed, 0)
    check_flags(**{name: getattr(asked, name) for name in ("density", "per_layer", "landscape", "layers")})
    if asked.budget is not None:
        checked_count("budget", asked.budget, 1, ", a number of products")
    if asked.minutes is not None and not checked_number("minutes", asked.minutes) > 0:
        raise ValueError(f"`minutes` must be above 0, got {asked.minutes}.")
    if asked.budget is not None and asked.minutes is not None:
        raise ValueError("`budget` and `minutes` must not both be given: one of them limits the work.")
    return asked


class Plan(NamedTuple):
    """Products for each stage that makes some; 0: what the budget leaves is too little for it."""

    products: dict[str, int]

    def left_out(self, name: str) -> bool:
        """Whether the budget leaves nothing for a stage."""
        return self.products.get(name) == 0


def stage_names(asked: Asked) -> list[str]:
    """The stages in the order in which they are made, the cheap ones first."""
    names = ["check", "loss", "trace", "pruning", "eigenpairs"]
    extra = ("density", "per_layer", "landscape", "layers")
    return names + [name for name in extra if getattr(asked, name)]


def planned(asked: Asked, num_params: int, num_leaves: int, budget: float | None) -> Plan:
    """How many products each stage may make.

    Args:
        asked: what is wanted.
        num_params: no Krylov method makes more steps than there are parameters.
        num_leaves: of the params.
        budget: products for all of it; None: the default of each.

    Returns:
        The plan. Within a budget all shrink alike; those that would fall below what says anything are left
        out, the last ones first.
    """
    names = [name for name in stage_names(asked) if name in (*WISHED, "landscape", "layers", "pruning")]
    wished = {name: _of(WISHED, name, asked, num_leaves) for name in names}
    least = {name: _of(LEAST, name, asked, num_leaves) for name in names}
    if budget is None:
        return Plan({name: _capped(name, wished[name], num_params, num_leaves) for name in names})
    kept = list(names)
    while kept and sum(least[name] for name in kept) > budget:
        kept.pop()
    spare = budget - sum(least[name] for name in kept)
    more = sum(wished[name] - least[name] for name in kept)
    share = min(1.0, spare / more) if more else 0.0
    products = dict.fromkeys(names, 0)
    for name in kept:
        number = least[name] + int(share * (wished[name] - least[name]))
        products[name] = _capped(name, number, num_params, num_leaves)
    return Plan(products)


def _of(table: Mapping[str, int], name: str, asked: Asked, num_leaves: int) -> int:
    fixed = {
        "landscape": int(FORWARD * LANDSCAPE_POINTS**2),
        "layers": QUALITY_PROBES * num_leaves + 4,
        "pruning": max(int(FORWARD * len(LEVELS)), 1),
    }
    if name in fixed:
        return fixed[name]
    number = table[name] * (num_leaves if name == "per_layer" else 1)
    return max(number, 6 * asked.top + 10) if name == "eigenpairs" else number


def _capped(name: str, number: int, num_params: int, num_leaves: int) -> int:
    # Lanczos makes no more steps than there are parameters; `eigenpairs` with restarts sees to that itself.
    if name == "density":
        return min(number, 2 * num_params)
    return min(number, num_params * num_leaves) if name == "per_layer" else number


def as_record(asked: Asked) -> dict[str, Any]:
    """As `report.json` has it."""
    return asked._asdict()
