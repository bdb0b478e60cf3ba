"""What the PyHessian paper says of BatchNorm and shortcuts, and what the rows of `batch_norm.py` say to it.

Two networks are compared seed by seed, by the logarithm of the ratio of their traces at the end of training.
The bar is Student's, at 95 %, over the seeds. A seed is another start, another order and other examples to
measure on, and the probes are other ones: the seeds' spread holds all four.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

ROWS = pathlib.Path(__file__).parents[1] / "results" / "batch_norm.jsonl"
ALL, NONE = (True, True, True), (False, False, False)
LEARNED = 0.8  # of the training images right: curvature says little of a network that has learned nothing
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by the number of seeds
REPEATED, NOT_REPEATED, UNDECIDED = "repeated", "not repeated", "undecided"

Row = dict[str, Any]


class Ratio(NamedTuple):
    """A ratio of two networks' curvature: its mean over the seeds and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "does not learn"
        if self.seeds == 1:
            return f"{self.mean:.2g} (one seed)"
        return f"{self.mean:.2g} ({self.low:.2g} to {self.high:.2g})"

    def verdict(self, above: bool) -> str:
        """Whether it is above one, or below, as the claim says."""
        if self.seeds > 1 and (self.low > 1 or self.high < 1):
            return REPEATED if (self.low > 1) == above else NOT_REPEATED
        return UNDECIDED


class Finding(NamedTuple):
    """One claim, put to one depth (or one pair of stages)."""

    claim: str
    where: str
    trace: Ratio
    top: Ratio
    loss: Ratio
    verdict: str


def read(path: pathlib.Path = ROWS) -> list[Row]:
    """The rows that are kept, without those that say where they were measured."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{**row, "norms": tuple(row["norms"])} for row in map(json.loads, lines) if "depth" in row]


def _at_the_end(rows: Iterable[Row], learned: float) -> dict[tuple, Row]:
    """By depth, norms, shortcuts and seed, the row of the last checkpoint, and whether it has learned."""
    last: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        key = row["depth"], row["norms"], row["shortcuts"], row["seed"]
        last[key] = {**row, "learned": row["accuracy"] >= learned}
    return last


def trace_of(row: Row) -> float:
    return row["trace"][0]


def top_of(row: Row) -> float:
    return row["ends"][0]


def loss_of(row: Row) -> float:
    return row["loss"]


def ratio(last: dict[tuple, Row], changed: tuple, base: tuple, of: Callable[[Row], float]) -> Ratio:
    """`of` the changed network over that of the base, seed by seed, where both have learned."""
    seeds = {key[3] for key in last if key[:3] == changed} & {key[3] for key in last if key[:3] == base}
    pairs = [(last[*changed, seed], last[*base, seed]) for seed in sorted(seeds)]
    logs = [math.log(of(a) / of(b)) for a, b in pairs if a["learned"] and b["learned"]]
    if not logs:
        return Ratio(math.nan, 0.0, math.inf, 0)
    mean, half = statistics.fmean(logs), math.inf
    if len(logs) > 1:
        half = STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700)), len(logs))


def _finding(last: dict, claim: str, where: str, changed: tuple, base: tuple, above: bool) -> Finding:
    trace, top, loss = (ratio(last, changed, base, of) for of in (trace_of, top_of, loss_of))
    return Finding(claim, where, trace, top, loss, trace.verdict(above))


def findings(rows: Iterable[Row], learned: float = LEARNED) -> list[Finding]:
    """Every claim, at every depth that it speaks of and that was measured, at the last checkpoint."""
    last = _at_the_end(rows, learned)
    depths = sorted({key[0] for key in last})
    found = []
    for depth in depths:
        claim = "Shallow without BatchNorm: flatter" if depth <= 20 else "Deep without BatchNorm: sharper"
        pair = (depth, NONE, True), (depth, ALL, True)
        found.append(_finding(last, claim, f"ResNet-{depth}", *pair, depth > 20))
    for depth in depths:
        pair = (depth, ALL, False), (depth, ALL, True)
        found.append(_finding(last, "Without shortcuts: sharper", f"ResNet-{depth}", *pair, True))
    for depth in depths:
        last_stage = (depth, (True, True, False), True)
        for other, norms in ((1, (False, True, True)), (2, (True, False, True))):
            base = (depth, norms, True)
            if {last_stage, base} <= {key[:3] for key in last}:
                where = f"ResNet-{depth}, stage 3 against stage {other}"
                found.append(
                    _finding(
                        last, "Of BatchNorm the last stage's matters most", where, last_stage, base, True
                    )
                )
    return found


def overall(found: Iterable[Finding]) -> dict[str, str]:
    """Each claim as a whole: repeated where it is in every part, not repeated where one part contradicts."""
    parts: dict[str, list[str]] = {}
    for finding in found:
        parts.setdefault(finding.claim, []).append(finding.verdict)
    return {claim: _whole(verdicts) for claim, verdicts in parts.items()}


def _whole(verdicts: list[str]) -> str:
    if NOT_REPEATED in verdicts:
        return NOT_REPEATED
    return REPEATED if set(verdicts) == {REPEATED} else UNDECIDED


def markdown(rows: Iterable[Row]) -> str:
    """The table of claims."""
    found = findings(rows)
    if not found:
        return "No result is kept yet: `python notebooks/studies/batch_norm.py` measures it.\n"
    lines = ["| claim | where | trace, times | loss, times | |", "|---|---|---:|---:|---|"]
    lines += [f"| {x.claim} | {x.where} | {x.trace} | {x.loss} | {x.verdict} |" for x in found]
    return "\n".join(lines) + "\n"
