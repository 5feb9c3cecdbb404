"""Find the steps in metrics.jsonl in which the mismatch between engine and learner exceeds its bound.

The learner writes the measured mismatch and the bound into each line (`sgpo_async.learner.mismatch`). The log, the live
display, the report and the summary all use these functions to decide whether a line is an alarm, so they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPANS = ("first", "later")
WHERE = {"first": "in first spans", "later": "after an update in flight"}
CAUSES = {"first": "precision, kernels or sampling", "later": "old keys and values that the engine kept"}


@dataclass(frozen=True, kw_only=True)
class Excess:
    """One step above the bound; if both kinds of spans exceed it, the kind with the larger mean."""

    step: int
    span: str  # of SPANS
    mean: float  # |log pi - log mu| in nats
    bound: float

    @property
    def text(self) -> str:
        """The alarm in one line: step, mean, kind of span, bound and possible cause."""
        return (
            f"step {self.step}: engine and learner differ by {self.mean:.2g} nats per token at lag 0 "
            f"{WHERE[self.span]}, bound {self.bound:g} (learner.mismatch_bound); possible cause: {CAUSES[self.span]}"
        )


def excess(line: Mapping[str, Any]) -> Excess | None:
    """Return the mismatch above the bound in this step, or None if there is none or no mean was judged."""
    mean, span = max(_judged(line), default=(0.0, ""))
    bound = line.get("mismatch_bound")
    if bound is None or mean <= bound:
        return None
    return Excess(step=line["step"], span=span, mean=mean, bound=bound)


def mismatch_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the final mismatch metrics of a run, or {} if its lines have none.

    Keys: bound (of the last step), judged (number of steps with a judged mean), mean (largest judged mean), max
    (largest |log pi - log mu| of one token), alarms (number of steps above the bound), worst_step and worst_span (step
    and kind of span of the largest alarm). Means and maxima are at lag 0, in nats.
    """
    if not any("mismatch_bound" in line for line in lines):
        return {}
    judged = [max(means) for line in lines if (means := [mean for mean, _ in _judged(line)])]
    token_maxima = [line.get(f"mismatch_max_lag0_{span}") for line in lines for span in SPANS]
    found = alarms(lines)
    worst = max(found, key=lambda alarm: alarm.mean, default=None)
    return {
        "bound": next(line["mismatch_bound"] for line in reversed(lines) if "mismatch_bound" in line),
        "judged": len(judged),
        "mean": max(judged, default=None),
        "max": max((value for value in token_maxima if value is not None), default=None),
        "alarms": len(found),
        "worst_step": worst and worst.step,
        "worst_span": worst and worst.span,
    }


def alarms(lines: Iterable[Mapping[str, Any]]) -> list[Excess]:
    """Return every step above its bound."""
    return [found for line in lines if (found := excess(line))]


def _judged(line: Mapping[str, Any]) -> list[tuple[float, str]]:
    found = [(line.get(f"mismatch_judged_{span}"), span) for span in SPANS]
    return [(mean, span) for mean, span in found if mean is not None]
