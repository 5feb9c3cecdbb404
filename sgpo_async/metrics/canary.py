"""What the lines of metrics.jsonl say about the canary: the hub's alarms about the weights that engines serve.

The log, the live display, the report and the summary use these functions, so they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KINDS = {
    "differs": "log-probabilities that are not the learner's",
    "stuck": "weights that do not move with the versions",
    "moved": "weights that move without a version",
}
"""What each alarm of `hub.served_weights` is about."""


def alarm_text(alarms: Mapping[str, int] | None) -> str:
    """The alarms so far in one line; empty if there are none."""
    raised = [f"{KINDS.get(kind, kind)} ({count})" for kind, count in (alarms or {}).items() if count]
    return f"weights alarm: engines serve {', '.join(raised)}; the hub's log names them" if raised else ""


def canary_summary(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The final metrics of a run's canary, or {} if its lines have none.

    Keys: mean (over the steps, of the mean over the engines) and max, in nats per token; None if no engine could be
    compared. alarms: by kind, the largest number in any line, since a hub that begins anew counts from zero.
    """
    found = [line for line in lines if "canary_alarms" in line]
    if not found:
        return {}
    means = [line["canary_mean"] for line in found if line.get("canary_mean") is not None]
    return {
        "mean": sum(means) / len(means) if means else None,
        "max": max((line["canary_max"] for line in found if line.get("canary_max") is not None), default=None),
        "alarms": {kind: max(line["canary_alarms"].get(kind, 0) for line in found) for kind in KINDS},
    }
