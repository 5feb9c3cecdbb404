"""What the lines of metrics.jsonl say about engine against learner: where the bound was exceeded, and by how much.

The learner writes what was measured and the bound beside it (`sgpo_async.learner.mismatch`); whether that is an alarm
is read from the line, so that log, live picture, report and summary cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPANS = ("first", "later")
WHERE = {"first": "in first spans", "later": "after an update in flight"}
CAUSES = {"first": "precision, kernels or sampling", "later": "old keys and values kept"}


@dataclass(frozen=True, kw_only=True)
class Excess:
    """One step above the bound; of its two kinds of spans the one that is further from it."""

    step: int
    span: str  # of SPANS
    mean: float  # |log pi - log mu| in nats
    bound: float

    @property
    def text(self) -> str:
        """One line: where, what, how much, and what to look for."""
        return (
            f"step {self.step}: engine and learner differ by {self.mean:.2g} nats per token at lag 0 "
            f"{WHERE[self.span]}, bound {self.bound:g} (learner.mismatch_bound); {CAUSES[self.span]}?"
        )


def excess(line: Mapping[str, Any]) -> Excess | None:
    """What is above the bound in this step; None if nothing is, or nothing was judged."""
    mean, span = max(_judged(line), default=(0.0, ""))
    bound = line.get("mismatch_bound")
    if bound is None or mean <= bound:
        return None
    return Excess(step=line["step"], span=span, mean=mean, bound=bound)


def mismatch_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The closing figures, {} for lines without any.

    bound of the last step; steps in which tokens were judged, and the largest judged mean; largest |log pi - log mu| of
    one token; steps in alarm, and of the worst of them number and kind of span. Means and maxima are at lag 0, in nats.
    """
    if not any("mismatch_bound" in line for line in lines):
        return {}
    judged = [max(means) for line in lines if (means := [mean for mean, _ in _judged(line)])]
    single = [line.get(f"mismatch_max_lag0_{span}") for line in lines for span in SPANS]
    found = alarms(lines)
    worst = max(found, key=lambda one: one.mean, default=None)
    return {
        "bound": next(line["mismatch_bound"] for line in reversed(lines) if "mismatch_bound" in line),
        "judged": len(judged),
        "mean": max(judged, default=None),
        "max": max((value for value in single if value is not None), default=None),
        "alarms": len(found),
        "worst_step": worst and worst.step,
        "worst_span": worst and worst.span,
    }


def alarms(lines: Iterable[Mapping[str, Any]]) -> list[Excess]:
    """Every step above its bound."""
    return [found for line in lines if (found := excess(line))]


def _judged(line: Mapping[str, Any]) -> list[tuple[float, str]]:
    found = [(line.get(f"mismatch_judged_{span}"), span) for span in SPANS]
    return [(mean, span) for mean, span in found if mean is not None]
