"""What the numbers of a report say, in plain words and by rules that are stated beside them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hessjax._core._tables import number, percent
from hessjax._report._record import zero_share

FLAT = 1e-3
"""A gain of this share of the loss is none."""
NEGATIVE = 0.05
"""Negative curvature of less than this share of the largest eigenvalue is common at good minima."""
GOOD, ROUGH = 0.1, 0.3
"""Relative standard errors of the sample."""
SHARP = 2.0
"""A leaf is sharp if its share of the trace is so many times its share of the weights."""
SPARED = 0.02
"""A rise of the loss by this share is small."""


class Line(NamedTuple):
    """One question, and the answer.

    Attributes:
        question: what is asked.
        verdict: `good`, `care`, or `unknown`.
        answer: in words.
        rule: how the verdict comes about.
    """

    question: str
    verdict: str
    answer: str
    rule: str


def reading(record: Mapping[str, Any]) -> list[Line]:
    """The answers that the stages of a record allow."""
    results = {name: entry["result"] for name, entry in record["stages"].items() if "result" in entry}
    found = [ask(results) for ask in (_trust, _minimum, _sample, _sharp, _prunable)]
    found.append(_pruned(record.get("pruned")))
    return [line for line in found if line is not None]


def _trust(results: Mapping[str, Any]) -> Line | None:
    if "check" not in results:
        return None
    rows = results["check"]["rows"]
    failed = [f"{row['name']} ({row['detail']})" for row in rows if not row["passed"]]
    rule = "Every row of the self-test must pass: finite, repeatable, symmetric, linear, right."
    if failed:
        return Line("Can these numbers be believed?", "care", f"No: {'; '.join(failed)}.", rule)
    answer = "Yes: the loss is finite and repeatable, and its derivatives agree with finite differences."
    return Line("Can these numbers be believed?", "good", answer, rule)


def _minimum(results: Mapping[str, Any]) -> Line | None:
    if not {"loss", "eigenpairs"} <= results.keys():
        return None
    loss, values = results["loss"], [x for x in _floats(results["eigenpairs"]["values"]) if math.isfinite(x)]
    question = "Is this a minimum?"
    rule = (
        f"It is, as far as this sample tells, if a gradient step of 1/λ₁ would gain (‖g‖²/2λ₁) less than "
        f"{FLAT:.1%} of the loss or than its standard error, and no eigenvalue is below −{NEGATIVE:.0%} of "
        "the largest."
    )
    if not values or max(values) <= 0:
        return Line(question, "unknown", "No eigenvalue above zero was found.", rule)
    largest, least, height = max(values), min(values), abs(float(loss["loss"]))
    gain, stderr = float(loss["norm"]) ** 2 / (2 * largest), float(loss["stderr"])
    allowed = max(FLAT * height, stderr if math.isfinite(stderr) else 0.0)
    told = (
        f"the gradient's norm is {number(loss['norm'])}, and a step of 1/λ₁ would gain {number(gain, 2)} of "
    )
    told += number(height)
    if gain > allowed:
        return Line(question, "care", f"Not yet: {told}. Training longer would lower the loss.", rule)
    if least < -NEGATIVE * largest:
        share = f"{-least / largest:.0%}"
        answer = (
            f"Flat, but no minimum: the least eigenvalue is {number(least)}, {share} of the largest below 0."
        )
        return Line(question, "care", answer, rule)
    low = f"the least eigenvalue found is {number(least, 2)} against {number(largest)} for the largest"
    return Line(question, "good", f"Yes, as far as this sample tells: {told}; {low}.", rule)


def _sample(results: Mapping[str, Any]) -> Line | None:
    question = "Is the sample large enough?"
    rule = (
        f"Relative standard errors from the scatter between batches: at most {GOOD:.0%} is enough, beyond "
        f"{ROUGH:.0%} is too little. One batch alone has no scatter."
    )
    errors = dict(_sample_errors(results))
    if not errors:
        return None
    known = {name: x for name, x in errors.items() if math.isfinite(x)}
    if not known:
        return Line(question, "unknown", "It cannot be told from one batch: give the data in several.", rule)
    worst = max(known, key=lambda name: known[name])
    listed = ", ".join(f"{name} ± {x:.1%}" for name, x in known.items())
    if known[worst] <= GOOD:
        return Line(question, "good", f"Yes: {listed}.", rule)
    more = math.ceil((known[worst] / GOOD) ** 2)
    word = "Roughly" if known[worst] <= ROUGH else "No"
    answer = f"{word}: {listed}. About {more} times the data would bring {worst} to ± {GOOD:.0%}."
    return Line(question, "care", answer, rule)


def _sample_errors(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    if "loss" in results:
        yield "the loss", _ratio(results["loss"]["stderr"], results["loss"]["loss"])
    if (total := results.get("trace", {}).get("total")) and total["data_stderr"] is not None:
        yield "the trace", _ratio(total["data_stderr"], total["mean"])
    pairs = results.get("eigenpairs", {})
    if pairs.get("data_stderr"):
        yield "the largest eigenvalue", _ratio(pairs["data_stderr"][0], pairs["values"][0])


def _ratio(error: Any, value: Any) -> float:
    return abs(float(error) / float(value)) if float(value) else math.inf


def _sharp(results: Mapping[str, Any]) -> Line | None:
    if "trace" not in results:
        return None
    question = "Which layers are sharp?"
    rule = (
        f"A leaf whose share of the trace, less two standard errors, is at least {SHARP:g} times its share "
        "of the weights. Sharp layers want smaller steps and more bits, and lose most when pruned."
    )
    rows, total = results["trace"]["leaves"], float(results["trace"]["total"]["mean"])
    weights = sum(row["parameters"] for row in rows)
    if total <= 0 or not weights:
        return Line(question, "unknown", "The trace is not above zero.", rule)
    times = {row["path"]: _excess(row, total, weights) for row in rows if row["parameters"]}
    sharp = sorted((path for path in times if times[path] >= SHARP), key=lambda path: -times[path])
    if not sharp:
        return Line(question, "good", "None stands out: curvature is spread like the weights.", rule)
    shares = {row["path"]: float(row["share"]) for row in rows}
    listed = ", ".join(
        f"{path} ({shares[path]:.0%} of the trace, {times[path]:.3g} times its weights)" for path in sharp[:3]
    )
    more = f" and {len(sharp) - 3} more" if len(sharp) > 3 else ""
    return Line(question, "care", f"{listed}{more}.", rule)


def _excess(row: Mapping[str, Any], total: float, weights: int) -> float:
    error = float(row["stderr"])
    least = float(row["trace"]) - 2 * (error if math.isfinite(error) else 0.0)
    return least / total / (row["parameters"] / weights)


def _prunable(results: Mapping[str, Any]) -> Line | None:
    levels = results.get("pruning", {}).get("levels")
    if not levels or "loss" not in results:
        return None
    question = "What could be pruned?"
    rule = (
        f"The most zeros, by magnitude, at which the measured loss rises by at most {SPARED:.0%}, without "
        "any training. Fine-tuning usually allows far more."
    )
    allowed = SPARED * abs(float(results["loss"]["loss"]))
    good = [row for row in levels if float(row["rise"]) <= allowed]
    first = levels[0]
    if not good or float(first["rise"]) > allowed:
        at = f"{percent(first['sparsity'])} % zeros raise the loss by {number(first['rise'], 2)}"
        return Line(question, "care", f"Little without training: already {at}.", rule)
    last = _last_in_a_row(levels, allowed)
    rise = float(last["rise"])
    told = f"the loss rises by {number(rise, 2)}" if rise > 0 else "the loss does not rise"
    at = f"{percent(last['sparsity'])} % of the kernels' weights: {told}"
    return Line(question, "good", f"{at}{_spares(results['pruning']['leaves'])}.", rule)


def _pruned(pruned: Mapping[str, Any] | None) -> Line | None:
    """Of a pruning that was made."""
    if pruned is None:
        return None
    before, after = (pruned["stages"][name]["result"] for name in ("before", "network"))
    loss, zeros = float(before["loss"]), percent(zero_share(after["zeros"]))
    told = f"with {zeros} % zeros after {after['how']}: the loss goes from {number(loss, 4)} to "
    told += number(after["loss"], 4)
    told += "".join(
        f", {name} from {number(value, 4)} to {number(after['metrics'][name], 4)}"
        for name, value in before["metrics"].items()
        if name in after["metrics"]
    )
    small = float(after["loss"]) - loss <= SPARED * abs(loss)
    rule = f"Little is lost if the loss over the data rises by at most {SPARED:.0%}."
    head = "Little" if small else "Something"
    return Line("What did pruning cost?", "good" if small else "care", f"{head}, {told}.", rule)


def _last_in_a_row(levels: list[dict[str, Any]], allowed: float) -> dict[str, Any]:
    last = levels[0]
    for row in levels:
        if float(row["rise"]) > allowed:
            break
        last = row
    return last


def _spares(leaves: list[dict[str, Any]]) -> str:
    """Which leaf is expected to spare the most, alone, at the highest level."""
    at = [row for row in leaves if row["predicted"] is not None and math.isfinite(float(row["predicted"]))]
    if not at:
        return ""
    level = max(row["sparsity"] for row in at)
    best = min((row for row in at if row["sparsity"] == level), key=lambda row: float(row["predicted"]))
    return f". Easiest to spare by the curvature is {best['path']}"


def _floats(values: Any) -> list[float]:
    return [float(x) for x in values]
