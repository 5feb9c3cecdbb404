"""Who holds up a run that makes no progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 3  # most names in one line


def progress_of(status: Mapping[str, Any]) -> tuple[object, ...]:
    """Values of which one changes at any progress: steps, weights, tokens, evaluations, members and their states."""
    actors = status["actors"]
    return (
        *(status[key] for key in ("step", "published", "tokens_generated", "evaluating", "joined", "left")),
        tuple((actor["name"], actor["tokens"], actor["state"]) for actor in actors),
        tuple(status["learner"][key] for key in ("ranks", "requested", "training")),
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
