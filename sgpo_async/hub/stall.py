"""Notices a run that makes no progress, and names who holds it up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LOOK_S = 1.0  # how often the hub checks whether the run makes progress
SHOWN = 3  # most names in one line


@dataclass
class StallWatch:
    """The time without progress, in seconds of the core's clock."""

    limit_s: float  # without progress; then the run is stalled
    moved_at: float  # time of the last progress
    stalled: str = ""  # who holds up the run; empty while it makes progress
    _progress: tuple[object, ...] = ()
    _looked_at: float = 0.0

    def look(self, status: Callable[[], Mapping[str, Any]], *, now: float) -> bool:
        """Look whether the run makes progress, if a look is due; whether it was found stalled just now."""
        if now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        known = status()
        progress = progress_of(known)
        if progress != self._progress:
            self._progress, self.moved_at, self.stalled = progress, now, ""
        elif not self.stalled and now - self.moved_at >= self.limit_s:
            self.stalled = f"nothing has moved for {now - self.moved_at:.0f} s: {culprit(known)}"
            return True
        return False


def progress_of(status: Mapping[str, Any]) -> tuple[object, ...]:
    """Values of which one changes at any progress: steps, weights, tokens, evaluations, members and their states."""
    actors = status["actors"]
    return (
        *(status[key] for key in ("step", "published", "tokens_generated", "evaluating", "joined", "left")),
        tuple((actor["name"], actor["tokens"], actor["state"]) for actor in actors),
        tuple(status["learner"][key] for key in ("ranks", "requested", "parts", "training")),
    )


def culprit(status: Mapping[str, Any]) -> str:
    """Whom the run waits for, in one line with the remedy. `status` is the hub's."""
    learner, actors, step = status["learner"], status["actors"], status["step"]
    if learner["training"] is not None:
        return f"the learner has had the batch of step {step} all this time: see its log and its stacks"
    if not learner["ranks"]:
        return "no learner is connected: start one, or see the log of torchrun"
    if status["published"] < 0:
        return "the learner has published no weights yet: see its log and its stacks"
    missing = learner["world_size"] - len(learner["requested"])
    if missing and status["buffer"] and not _leased(actors):
        ranks = _names(str(rank) for rank in range(learner["world_size"]) if rank not in learner["requested"])
        return f"no request for the batch of step {step} from rank {ranks} of the learner: see its stacks"
    if not actors:
        return "no actor is connected: start one with sgpo-async actor --hub ADDRESS"
    if working := [actor["name"] for actor in actors if actor["leases"]]:
        return f"leases but no tokens from {_names(working)}: see the log and the stacks"
    waiting = [actor["name"] for actor in actors if actor["version"] < status["published"] or actor["version"] < 0]
    if waiting:
        return f"version {status['published']} of the weights is not loaded by {_names(waiting)}: see the log"
    return f"no request for leases from {_names(actor['name'] for actor in actors)}: see the log and the stacks"


def _leased(actors: Iterable[Mapping[str, Any]]) -> bool:
    return any(actor["leases"] for actor in actors)


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
