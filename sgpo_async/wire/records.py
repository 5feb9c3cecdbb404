"""Every message that crosses a process boundary by ZeroMQ, defined once for memory and wire.

    actor ──▶ hub     Hello  Ready  Rollout  Release  Heartbeat  Goodbye
    hub ──▶ actor     Welcome | Refused  Lease  Ack  Stop
    learner ──▶ hub   Hello  BatchRequest  Commit  Published  Evaluate  SnapshotRequest  Restore  Finish  Heartbeat
    hub ──▶ learner   Welcome | Refused  Shard  Committed  Evaluated  Snapshot  Restored
    anyone ──▶ hub    StatusRequest  SettingsRequest      hub ──▶ anyone    Status  Settings

A record is a frozen dataclass. Its array fields (`Tokens`, `Floats`, `Ints`) and `bytes` travel as raw
little-endian buffers in frames of their own; everything else travels in the MessagePack header. `None` means absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import numpy as np

PROTOCOL = 3  # raised by every change of a record

Tokens = Annotated[np.ndarray, "<i4"]  # token ids, 1-d
Ints = Annotated[np.ndarray, "<i4"]
Floats = Annotated[np.ndarray, "<f4"]

Purpose = Literal["train", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a member; answered by Welcome or Refused."""

    role: Literal["actor", "learner"]
    name: str  # unique among living members, e.g. "actor-3f2a", "learner-0"
    tokenizer: str = ""  # fingerprint; the hub refuses a member that differs from the learner
    rank: int = 0  # learner only
    world_size: int = 1  # learner only


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The hub accepts a member and tells it what it needs to know."""

    session_host: str = ""  # actor: where its link process waits for the Torch RPC world of two
    session_port: int = 0
    store: str = ""  # learner: path of the shared-memory weight store to publish into
    version: int = 0  # learner: the version its first publication carries


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The hub does not take this member, and why (one line with remedy)."""

    reason: str
    final: bool = False  # nothing that time brings can change it


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Credit: the actor holds a verified version and can take `tasks` more leases than it has now."""

    tasks: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The hub asks for one whole group: `autonomous` rollouts of the plain prompt, `guided` of the strategy's.

    It holds all that makes a rollout what it is, but the prompt's style and the model: training and benchmarks may be
    sampled and judged differently.

    All or nothing: a lease that is lost is reissued as a whole under the next attempt, since keeping the rollouts
    that happened to finish would favour short ones.
    """

    task: int
    attempt: int
    purpose: Purpose
    problem: str
    answer: str
    verifier: str  # name in `sgpo_async.tasks.verify.VERIFIERS`
    strategy: str | None
    autonomous: int
    guided: int
    min_version: int  # no token may be older
    seed: int
    temperature: float
    top_p: float  # 1 for training: a truncated sampler's log-probabilities fit no importance ratio
    max_new_tokens: int
    top_logprobs_num: int = 0  # likeliest tokens told beside each token of a correct guided rollout


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One finished rollout. Identity: (task, attempt, slot); slots below `autonomous` are unguided."""

    task: int
    attempt: int
    slot: int
    purpose: Purpose
    guided: bool
    prompt: Tokens  # with the strategy, if guided
    tokens: Tokens  # [T] sampled, with the end token if there is one
    logprobs: Floats  # [T] behaviour log-probability of each token at the sampling temperature
    versions: Ints  # [S] weight version of each span
    ends: Ints  # [S] end (exclusive) of each span in `tokens`; the last is T
    reward: float
    finish: Literal["stop", "length"]
    # Of correct guided rollouts only: Eq. 4, the sum of log pi(token | plain prompt); and, if the lease asks for them,
    # the k likeliest tokens at each place with their log-probabilities, place by place, the likeliest first.
    unguided_logprob: float | None = None
    top_tokens: Tokens | None = None  # [T * k]
    top_logprobs: Floats | None = None  # [T * k]

    @property
    def oldest_version(self) -> int:
        """The version of the stalest token."""
        return int(self.versions.min())

    def token_versions(self) -> np.ndarray:
        """Weight version of each token, [T] int32."""
        return np.repeat(self.versions, np.diff(self.ends, prepend=0))


@dataclass(frozen=True, kw_only=True)
class Ack:
    """The hub has this rollout (new or already known): the actor may forget it."""

    task: int
    attempt: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """The actor gives a lease back unfinished."""

    task: int
    attempt: int
    reason: str
    servable: bool = True  # False: no actor ever can, e.g. the prompt is longer than the model's context


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Sign of life, with the counters of an actor (all cumulative since its start)."""

    state: str = ""  # "joining", "serving", "draining", ...
    version: int = -1
    running: int = 0  # sequences now in the engine
    tokens: int = 0  # generated
    busy_s: float = 0.0  # time in which the engine had work
    wall_s: float = 0.0
    tasks: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # leases it is working on: keeps them alive


@dataclass(frozen=True, kw_only=True)
class Goodbye:
    """A member leaves on purpose."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run is over: an actor leaves."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A learner rank asks for its shard of the batch of `step`."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of a batch: whole groups. Empty only if the batch has fewer groups than ranks."""

    step: int
    version: int  # the learner's version now; lag of a token = this - its version
    problems: int  # in the whole batch, over all ranks: the P of Eq. 7
    rollouts: tuple[Rollout, ...]  # groups one after another, each group ordered by slot


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Rank 0: the optimiser step on the batch of `step` is done; its rollouts count as trained."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Answer to Commit: the hub's side of this step's metrics."""

    step: int
    status: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Rank 0: `version` stands whole in the weight store."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Rank 0 asks for pass rates on the held-out problems by `version` or newer; answered by Evaluated."""

    version: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """One benchmark in one evaluation round: avg@k and pass@k with intervals, and what they are made of."""

    name: str
    avg: float | None  # None: no problem could be served
    low: float | None
    high: float | None
    samples: int  # k
    problems: int  # that could be served
    pass_at: dict[str, Any] = field(default_factory=dict)  # {"1", "2", "4", ...: {mean, low, high}}
    results: dict[str, Any] = field(default_factory=dict)  # by problem: id -> `metrics.problems.ProblemResult`, plain

    def figures(self) -> dict[str, Any]:
        """All but the problems, as plain data."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "results"}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Pass rates on held-out problems, and scores on benchmarks."""

    version: int  # asked for
    pass_auto: float
    pass_guided: float
    problems: int  # held out
    served_oldest: int  # of the tokens' versions: that asked for, or newer ones
    served_newest: int
    lag: float  # mean over tokens: the learner's version when the round ended, minus the token's
    benchmarks: tuple[BenchmarkScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SnapshotRequest:
    """Rank 0 asks for the hub's state, to be stored in a checkpoint."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The hub's state at one step: opaque to the learner."""

    step: int
    state: bytes


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Rank 0 resumes from a checkpoint: the hub goes back to the state stored in it."""

    state: bytes


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Answer to Restore; `version` is what the resumed weights are published as."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Rank 0: the run is over; the hub stops its actors and itself."""

    reason: str = "finished"


@dataclass(frozen=True, kw_only=True)
class StatusRequest:
    """Anyone may ask how the run stands, without being a member."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the run stands: see `hub.core.HubCore.status` for the keys."""

    status: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SettingsRequest:
    """An actor asks what run it would join, before it says Hello: loading the model may take long."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The run's configuration as plain data (`config.to_plain`)."""

    settings: dict[str, Any]


Message = (
    Hello | Welcome | Refused | Ready | Lease | Rollout | Ack | Release | Heartbeat | Goodbye | Stop | BatchRequest
    | Shard | Commit | Committed | Published | Evaluate | Evaluated | SnapshotRequest | Snapshot | Restore | Restored
    | Finish | StatusRequest | Status | SettingsRequest | Settings
)  # fmt: skip
