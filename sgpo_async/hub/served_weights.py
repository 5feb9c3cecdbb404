"""Which weights exist, and whether the engines serve them: the hub's part of the proof that goes with every token.

    Published ─▶ publish ─▶ (version, digest) of everything that a token may come from, with the learner's canary
    Rollout, Progress ─▶ objection: a span of weights that were never published is impossible
    Canary ─▶ judge: three alarms, none of which believes what the engine says of itself

A digest shows what an engine has verified, the canary what it computes with (`model.canary`): an engine whose update
was only half applied, or that keeps serving old weights, may report any digest, but not log-probabilities that it
cannot compute.

An alarm never ends the work of an actor. Precision and kernels differ between engines by amounts that no one bound
covers, and a bound that is too low would quarantine every actor and end the run; the user decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.metrics.canary import KINDS
from sgpo_async.weights.short_digest import digest_text
from sgpo_async.wire.records import OBSERVED, Canary

Weights = tuple[int, int]
"""Version and short digest. After the learner has resumed, a version may exist with two digests."""

Alarm = Literal["differs", "stuck", "moved"]  # the keys of `metrics.canary.KINDS`

# Measured differences of correct engines, in nats per token: docs/log.md, "canary".
FLOAT32_TOLERANCE, BFLOAT16_TOLERANCE = 1e-3, 0.1
MOVED = 1e-3  # nats per token by which the learner's canary must have moved before an engine's must have moved, too
STUCK = 0.1  # an engine is stuck if its canary moved by less than this share of the learner's

MAX_ENGINES = 256  # of one actor
SILENT = 5.0  # times hub.canary_s: an engine without a score for so long is forgotten

UNKNOWN_DIGEST = "digest of a span is not one that the learner has published under its version"


def tolerance_of(run: Run, *, learner_bfloat16: bool) -> float:
    """The bound of the alarms in nats per token: `hub.canary_tolerance` or, if that is 0, one for the precision."""
    bfloat16 = learner_bfloat16 or run.model.dtype == "bfloat16"
    return run.hub.canary_tolerance or (BFLOAT16_TOLERANCE if bfloat16 else FLOAT32_TOLERANCE)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two canaries, in nats per token."""
    return float(np.abs(one.astype(np.float64) - other).mean())


@dataclass
class Scores:
    """What one engine, or one server of an engine, has scored."""

    last: Canary
    at: float = 0.0  # time of the last score
    difference: float | None = None  # to the learner's canary, of the last score that could be compared
    moved: tuple[np.ndarray, np.ndarray] | None = None  # own and learner's canary when the engine last moved
    alarms: set[str] = field(default_factory=set)  # raised by the last score


@dataclass
class ActorScores:
    """What the last scores of an actor's engines say."""

    difference: float | None = None  # the largest to the learner's canary; None if none could be compared
    servers: list[dict[str, Any]] = field(default_factory=list)  # what each serves; empty with only one engine


@dataclass
class ServedWeights:
    """The weights that may still occur, and the scores of every engine."""

    published: dict[Weights, np.ndarray | None] = field(default_factory=dict)  # with the learner's canary
    engines: dict[tuple[str, str], Scores] = field(default_factory=dict)  # by name of the actor and of the server
    alarms: Counter[str] = field(default_factory=Counter)  # number of scores that raised each
    length: int = 0  # of the learner's canary; 0: not known

    def publish(self, version: int, digest: int, canary: np.ndarray | None, *, oldest: int) -> None:
        """Remember these weights, and forget those of versions older than `oldest`, of which no token can come."""
        if canary is None:
            canary = self.published.get((version, digest))
        else:
            self.length = len(canary)
        known = self.published | {(version, digest): canary}
        self.published = {weights: own for weights, own in known.items() if weights[0] >= oldest}

    def awaits(self, spans: Sequence[np.ndarray]) -> bool:
        """Whether one of these versions has no digest, though it is no older than all that are remembered."""
        known = {version for version, _ in self.published}
        oldest = min(known, default=0)
        return any(version >= oldest and version not in known for versions in spans for version in versions.tolist())

    def objection(self, versions: np.ndarray, digests: np.ndarray) -> str | None:
        """Why these spans cannot have been sampled by weights that the learner has published; None if they can.

        `awaits` is false of them.
        """
        for version, digest in zip(versions.tolist(), digests.tolist(), strict=True):
            if (digest != 0) if version == OBSERVED else (version, digest) not in self.published:
                return UNKNOWN_DIGEST
        return None

    def canary_objection(self, actor: str, canary: Canary) -> str | None:
        """Why this score is impossible; None if it is not. The weights may be older than all that are remembered."""
        others = [engine for name, engine in self.engines if name == actor and engine != canary.engine]
        if len(others) >= MAX_ENGINES:
            return f"canary: an actor has at most {MAX_ENGINES} engines"
        oldest = min((version for version, _ in self.published), default=0)
        if canary.version >= oldest and (canary.version, canary.digest) not in self.published:
            return f"canary: {UNKNOWN_DIGEST}"
        if not np.isfinite(canary.logprobs).all() or (self.length and len(canary.logprobs) != self.length):
            return "canary: logprobs must be finite and as many as the learner's"
        return None

    def judge(self, actor: str, canary: Canary, *, tolerance: float, now: float = 0.0) -> list[str]:
        """Compare a score with the learner's and with the engine's earlier ones; one line for each new alarm."""
        scores = self.engines.get((actor, canary.engine))
        before = scores.last if scores else None
        scores = self.engines.setdefault((actor, canary.engine), Scores(canary))
        scores.last, scores.at = canary, now
        found: dict[Alarm, str] = {}
        # Their lengths may differ before the learner's is known.
        if before and _weights_and_length(before) == _weights_and_length(canary):
            moved = distance(canary.logprobs, before.logprobs)
            if moved > tolerance:
                found["moved"] = (
                    f"its canary moved by {moved:.2g} nats per token while its version and digest did not: something "
                    "else changed its weights; find out what, or start it again"
                )
        expected = self.published.get((canary.version, canary.digest))
        if expected is not None:
            scores.difference = distance(canary.logprobs, expected)
            if scores.difference > tolerance:
                found["differs"] = (
                    f"its canary differs from the learner's by {scores.difference:.2g} nats per token, tolerance "
                    f"{tolerance:g} (hub.canary_tolerance): it serves other weights than it says, or its precision "
                    "or kernels are to blame; start it again, compare its model and engine with those of the others"
                )
            if stuck := self._stuck(scores, canary.logprobs, expected):
                found["stuck"] = stuck
        lines = [self._line(actor, canary, text) for kind, text in found.items() if kind not in scores.alarms]
        scores.alarms = set(found)
        self.alarms.update(found.keys())
        return lines

    def _stuck(self, scores: Scores, own: np.ndarray, learners: np.ndarray) -> str:
        """Why the engine does not follow the learner's versions; "" if it does, or if the learner hardly moved."""
        if scores.moved is None:
            scores.moved = own, learners
            return ""
        theirs, its = distance(learners, scores.moved[1]), distance(own, scores.moved[0])
        if theirs < MOVED:
            return ""
        if its >= STUCK * theirs:
            scores.moved = own, learners
            return ""
        return (
            f"the learner's canary moved by {theirs:.2g} nats per token, but that of the engine by {its:.2g}: it does "
            "not load the weights whose version it reports; start it again, and check its weight transport"
        )

    def _line(self, actor: str, canary: Canary, text: str) -> str:
        server = f" ({canary.engine})" if canary.engine else ""
        weights = f"version {canary.version}, digest {digest_text(canary.digest)}"
        return f"weights alarm: {actor}{server} at {weights}: {text}"

    def leave(self, actor: str) -> None:
        """Forget the scores of an actor that has left."""
        self.engines = {key: scores for key, scores in self.engines.items() if key[0] != actor}

    def forget_silent(self, moment: float) -> None:
        """Forget engines that have sent no score since `moment`: a server that is started again has another URL."""
        self.engines = {key: scores for key, scores in self.engines.items() if scores.at >= moment}

    def by_actor(self) -> dict[str, ActorScores]:
        """The last scores of every actor that has any, by its name, in one pass: the status asks for all of them."""
        found: dict[str, ActorScores] = defaultdict(ActorScores)
        for (name, url), own in sorted(self.engines.items()):
            actor = found[name]
            if own.difference is not None:
                actor.difference = max(own.difference, actor.difference or 0.0)
            if url:
                digest = digest_text(own.last.digest)
                actor.servers.append(
                    {"url": url, "version": own.last.version, "digest": digest, "canary": own.difference}
                )
        return dict(found)

    def metrics(self) -> dict[str, Any]:
        """Mean and maximum over the engines of their difference to the learner's canary, and the alarms so far.

        None while no engine could be compared. In nats per token.
        """
        found = [own.difference for own in self.engines.values() if own.difference is not None]
        return {
            "canary_mean": sum(found) / len(found) if found else None,
            "canary_max": max(found, default=None),
            "canary_alarms": {kind: self.alarms[kind] for kind in KINDS},
        }


def _weights_and_length(canary: Canary) -> tuple[int, int, int]:
    return canary.version, canary.digest, len(canary.logprobs)


def newest(spans: Sequence[np.ndarray]) -> int:
    """The newest version of these spans; OBSERVED if there are none."""
    return max((max(versions.tolist(), default=OBSERVED) for versions in spans), default=OBSERVED)
