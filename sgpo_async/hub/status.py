"""The state of the run as plain data, for displays, metrics and tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any, Protocol

from sgpo_async.config import Run
from sgpo_async.hub.actors import Actors
from sgpo_async.hub.evaluation import Evaluation
from sgpo_async.hub.learner_ranks import LearnerRanks
from sgpo_async.hub.served_weights import ActorScores, ServedWeights
from sgpo_async.hub.stall import StallWatch
from sgpo_async.hub.training import Training
from sgpo_async.wire.records import Evaluated, Heartbeat

NO_BATCH_YET = {
    "lag": {"mean": 0.0, "max": 0, "histogram": {}},
    "pass_auto": None,
    "pass_guided": None,
    "reward_auto": None,
    "reward_guided": None,
    "uniform": None,
    "cut": None,
    "length_auto": None,
    "length_guided": None,
}


class CoreState(Protocol):
    """The attributes of `HubCore` that the status is made from; `hub.core` documents them."""

    run: Run
    training: Training
    evaluation: Evaluation
    actors: Actors
    learner_ranks: LearnerRanks
    published: int
    served: ServedWeights
    rejected: Counter[str]
    last_rejection: str
    refused: int
    quarantined: dict[tuple[bytes, str], str]
    restarts: int
    moved: int
    stall: StallWatch
    closing: tuple[str, float] | None
    started: float
    now: float


def status(core: CoreState) -> dict[str, Any]:
    """The status. Times are in seconds and shares in [0, 1]; None stands for a value that is not known yet."""
    training, evaluation, actors = core.training, core.evaluation, core.actors
    waits = core.learner_ranks.all_wait_for(training.step, training.next_part)
    tables = (training.leases, evaluation.leases)
    leases_of = Counter(lease.member for table in tables for lease in table.running.values())
    scores_of = core.served.by_actor()
    return {
        "step": training.step,
        "steps": core.run.steps,
        "version": training.version,
        "published": core.published,  # the newest version that actors can have; -1: none
        "actors": [
            a.plain(version=training.version, leases=leases_of[a.member], source=actors.source_of(a))
            | {"canary": scores.difference, "servers": scores.servers}
            for a in actors.values()
            for scores in [scores_of.get(a.name) or ActorScores()]
        ],
        "learner": {
            "ranks": len(core.learner_ranks.ranks),
            "world_size": core.learner_ranks.size,
            "requested": sorted(core.learner_ranks.requested),  # ranks that wait for a batch, or have it
            "parts": training.next_part,  # of the next batch, that are formed
            # The step on whose batch, or on a part of it, the learner is working.
            "training": training.step if training.batch and not waits else None,
        },
        "ledger": training.leases.plain(),
        "evaluation_ledger": evaluation.leases.plain(),
        "buffer": len(training.leases.complete),  # groups
        **NO_BATCH_YET,
        **training.settled.metrics(),  # what is trained against what was sampled
        **training.last,  # lag, pass rates and rewards of the last batch
        **core.served.metrics(),
        "tokens_generated": sum(table.tokens for table in tables),
        "tokens_trained": training.tokens_trained,
        "tokens_per_s": sum(actor.meter.tokens_per_s for actor in actors.values()),
        "running": sum((actor.meter.last or Heartbeat()).running for actor in actors.values()),  # sequences
        "engine_idle": actors.idle,
        "engine_waits": actors.waits,
        "rejected": core.rejected.total(),
        "rejected_reasons": dict(core.rejected),
        "last_rejection": core.last_rejection,
        "duplicates": sum(table.duplicates for table in tables),
        "leases_reissued": sum(table.reissued for table in tables),
        "evaluations": [_without_problem_results(result) for result in evaluation.results],
        "evaluating": evaluation.current,  # version of the running round
        "joined": actors.joined,
        "left": actors.left,
        "refused": core.refused,
        "quarantined": {name: reason for (_, name), reason in core.quarantined.items()},
        "hub_restarts": core.restarts,
        "leases_moved": core.moved,
        "uptime_s": core.now - core.started,
        "stalled": core.stall.stalled,  # who holds up the run, if there was no progress for hub.stall_s
        "closing": core.closing[0] if core.closing else "",  # why the run is ending
    }


def _without_problem_results(result: Evaluated) -> dict[str, Any]:
    own = {one.name: getattr(result, one.name) for one in fields(result)}
    return own | {"benchmarks": [score.metrics() for score in result.benchmarks]}
