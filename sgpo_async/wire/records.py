"""Every message between hub, actors and learner. The in-memory transport and ZeroMQ use the same records.

    actor ──▶ hub     Hello  Ready  Progress  Rollout  Release  SenderUp  SenderDown  Heartbeat  Canary  Goodbye
    hub ──▶ actor     Welcome | Refused  Lease  Ack  Revoked  OpenSender  CloseSender  Stop
    learner ──▶ hub   Hello  BatchRequest  Commit  Published  Evaluate  SnapshotRequest  Restore  Finish  Heartbeat
    hub ──▶ learner   Welcome | Refused  Pending  Shard | NoBatch  Committed  Evaluated  Snapshot  Restored  Stop
    any process ──▶ hub    StatusRequest  SettingsRequest      hub ──▶ that process    Status  Settings

A record is a frozen dataclass. The codec sends array fields (`Tokens`, `Floats`, `Ints`, `Digests`) and `bytes` as raw
little-endian bytes in a second frame, and all other fields in the MessagePack header. `None` means absent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

PROTOCOL = 14  # raise it whenever a record changes

Tokens = Annotated[np.ndarray, "<i4"]  # token ids, 1-d
Ints = Annotated[np.ndarray, "<i4"]
Floats = Annotated[np.ndarray, "<f4"]
Digests = Annotated[np.ndarray, "<i8"]  # short digests, see `weights.short_digest`

Purpose = Literal["train", "evaluate"]

Road = Literal["rpc", "sockets", "folder"]
"""How weights reach an actor. rpc: both processes of a session connect to each other, by Torch RPC; sockets: only the
weight receiver connects, by ZeroMQ; folder: it reads from hub.weight_folder."""

State = Literal["", "joining", "serving", "training"]
"""What a member does. joining: an actor without weights; serving: one with weights; training: a rank of the learner."""

OBSERVED = -1
"""As the weight version of a span: an environment wrote these tokens, not the policy. They are read and never trained;
their log-probability and the digest of their span are 0."""


def oldest(versions: np.ndarray) -> int:
    """The lowest weight version of these spans, of which at least one is no observation."""
    return int(versions[versions != OBSERVED].min())


def span_lengths(ends: np.ndarray) -> np.ndarray:
    """The number of tokens of each span. (np.diff takes ten times as long with the few spans of a rollout.)"""
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    return lengths


def sampled_by_policy(versions: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether the policy has sampled each token of these spans, [T] bool; an environment wrote the others."""
    return np.repeat(versions != OBSERVED, span_lengths(ends))


def is_correct(reward: float, solved_at: float) -> bool:
    """The one rule by which a reward, which may be any finite number, says whether the problem is solved."""
    return reward >= solved_at


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of a member; the hub answers with Welcome or Refused."""

    role: Literal["actor", "learner"]
    name: str  # unique among living members, e.g. "actor-3f2a", "learner-0"
    tokenizer: str = ""  # fingerprint; the hub refuses a member whose tokenizer differs from the learner's
    rank: int = 0  # learner only
    world_size: int = 1  # learner only
    vocabulary: int = 0  # learner only: number of token ids that the model knows
    bfloat16: bool = False  # learner only: whether its matrix products are in bfloat16
    # Actor only: the leases on which it still works after a lost connection, as [task, attempt, task, attempt, ...].
    # The hub leases all others of this member to other actors.
    holds: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    # Actor only: it may read the weight store of another actor on its machine, or others may read its own (`machine` as
    # `weights.store_file.machine`, "": neither), and it can serve weights to actors on other machines.
    machine: str = ""
    store: str = ""
    serves: bool = False
    road: Road = "rpc"  # actor: how it can get weights
    direct: bool = False  # actor: it could not get weights from another actor, so it must have them from the hub
    token: str = field(default="", repr=False)  # learner of a hub without keys: the content of its hub.token


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The hub accepts a member; the fields hold what the member needs to take part."""

    session_host: str = ""  # actor: address of its weight sender, which waits for the weight receiver
    session_port: int = 0
    session_secret: bytes = field(default=b"", repr=False)  # that authenticates what both processes of the session send
    source: str = ""  # actor: name of the actor that serves it; "": the hub
    run_id: str = ""  # actor: identifies the run; leases and weight versions of another run are void
    folder: str = ""  # actor: URL of the folder with the weights of this run, in place of a session
    # Actor: path of the source's weight store on the same machine, in place of a session. Learner: path of the
    # shared-memory weight store into which it publishes ...
    store: str = ""
    machine: str = ""  # ... on this machine (`weights.store_file.machine`); another one publishes into its own store
    version: int = 0  # learner: version of its first publication
    begun: bool = False  # learner: an earlier learner of this run has published weights


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The hub refuses this member; `reason` is one line with a remedy."""

    reason: str
    final: bool = False  # permanent; retrying cannot help


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The actor holds a verified weight version and can take `tasks` more leases than it has now."""

    tasks: int
    version: int


@dataclass(frozen=True, kw_only=True)
class PartialRollout:
    """n consecutive tokens of a completion whose rollout is not finished."""

    slot: int
    start: int  # position of the first of these tokens in the completion
    tokens: Tokens  # [n]
    logprobs: Floats  # [n] behaviour log-probabilities
    versions: Ints  # [S] weight version of each span
    digests: Digests  # [S] of the weights that sampled each span, which the engine has verified after loading them
    ends: Ints  # [S] end (exclusive) of each span within these tokens; the last is n
    top_tokens: Tokens | None = None  # [n * k], if the lease asks for the likeliest tokens of this rollout
    top_logprobs: Floats | None = None  # [n * k]
    kept: Tokens | None = None  # as those of `Rollout`
    kept_sizes: Ints | None = None  # [n]
    finish: Literal["", "stop", "length"] = ""  # how the completion ended, if only its verdict is missing


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The hub asks for one group: `autonomous` rollouts of the plain prompt, `guided` of the prompt with the strategy.

    The lease holds everything that determines a rollout, except the prompt's style and the model, because training and
    benchmarks may sample and judge differently.

    The hub reissues a lost lease with the next attempt number and with everything that it has of the group: the
    finished rollouts and the tokens of the others. So no rollout starts again, and no length is favoured.
    """

    task: int
    attempt: int
    purpose: Purpose
    problem: str
    answer: str
    verifier: str  # what judges the completions, in the text form of `sgpo_async.tasks.rewards`; or an environment
    strategy: str | None
    autonomous: int
    guided: int
    min_version: int  # no token may come from an older weight version
    seed: int
    temperature: float
    top_p: float  # sample from the fewest likeliest tokens with this probability together; 1: from all
    max_new_tokens: int
    top_k: int = 0  # sample from at most this many of the likeliest tokens; 0: no limit
    top_logprobs_num: int = 0  # likeliest tokens to report for each token of a correct guided rollout
    unguided_scores: bool = False  # whether correct guided rollouts carry `unguided_logprob`, for Eq. 4
    solved_at: float = 1.0  # a rollout is correct if its reward is at least this
    cut_scores: bool = True  # whether a completion that max_new_tokens has cut is judged; else its reward is 0
    turns: int = 0  # most completions of an episode with an environment; 0: no environment
    report_s: float = 1.0  # seconds between two reports of an actor, of all its leases; the newest lease decides
    columns: str = ""  # the other columns of the problem's record as a JSON object, if the verifier is the user's own
    finished: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # slots whose rollouts the hub has already
    partial: tuple[PartialRollout, ...] = ()  # what earlier attempts sampled of the other slots; each from position 0

    @property
    def reports_kept(self) -> bool:
        """Whether its rollouts must report the tokens that were kept: importance ratios need them."""
        return self.purpose == "train" and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the running rollouts of one lease have sampled since the actor's last report.

    If the actor is lost, other actors continue the rollouts from there; see `rollout.partial`.
    """

    task: int
    attempt: int
    purpose: Purpose
    partial: tuple[PartialRollout, ...]


@dataclass(frozen=True, kw_only=True)
class Revoked:
    """The actor must stop to work on this lease, which the hub has taken back."""

    task: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class OpenSender:
    """The actor must start a weight sender on its store for another actor; it answers SenderUp or SenderDown."""

    sender: int  # id
    name: str  # of the other actor
    road: Road = "rpc"  # of the other actor


@dataclass(frozen=True, kw_only=True)
class CloseSender:
    """The actor must end a weight sender; an unknown one is ignored."""

    sender: int


@dataclass(frozen=True, kw_only=True)
class SenderUp:
    """The weight sender of an actor waits at this address for who knows the secret."""

    sender: int
    host: str
    port: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class SenderDown:
    """The weight sender of an actor has ended."""

    sender: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One finished rollout. Identity: (task, attempt, slot); slots below `autonomous` are unguided."""

    task: int
    attempt: int
    slot: int
    purpose: Purpose
    guided: bool
    prompt: Tokens  # with the strategy, if guided
    tokens: Tokens  # [T] sampled tokens, with the end token if there is one, and those of an environment between them
    logprobs: Floats  # [T] behaviour log-probability of each token, under the distribution it was sampled from
    versions: Ints  # [S] weight version of each span, or OBSERVED; the first is a version
    digests: Digests  # [S] of the weights that sampled each span, which the engine has verified; 0 if OBSERVED
    ends: Ints  # [S] end (exclusive) of each span in `tokens`; the last is T
    reward: float  # any finite number
    finish: Literal["stop", "length"]
    # Only if it may be distilled, and only what the lease asks for: the sum of log pi(token | plain prompt), for Eq. 4;
    # the k likeliest tokens at each position with their log-probabilities, position by position, likeliest first.
    unguided_logprob: float | None = None
    top_tokens: Tokens | None = None  # [T * k]
    top_logprobs: Floats | None = None  # [T * k]
    # Only if top_p or top_k truncated the distribution in training: the other tokens that were kept beside the sampled
    # one, position by position, and their number. `logprobs` are then renormalised over the kept tokens.
    kept: Tokens | None = None  # [sum of kept_sizes]
    kept_sizes: Ints | None = None  # [T]; 0 for a token that an environment wrote
    solved_at: float = 1.0  # of its lease

    @property
    def correct(self) -> bool:
        """Whether the problem is solved. Pass rates, alpha (Eq. 6) and the targets (Eq. 2, 4) use only this."""
        return is_correct(self.reward, self.solved_at)

    @property
    def may_be_distilled(self) -> bool:
        """Whether this is a possible target o+: of training, guided, correct and complete.

        A verifier may find an answer in a completion that was cut, but its end must not be learned.
        """
        return self.purpose == "train" and self.guided and self.correct and self.finish == "stop"

    @property
    def oldest_version(self) -> int:
        """The weight version of the oldest token that the policy has sampled."""
        return oldest(self.versions)

    def token_versions(self) -> np.ndarray:
        """Weight version of each token, or OBSERVED, [T] int32."""
        return np.repeat(self.versions, span_lengths(self.ends))

    def without_older(self, oldest: int) -> Rollout:
        """The same rollout, in which what versions below `oldest` have sampled counts as written by an environment."""
        if self.oldest_version >= oldest:
            return self
        older = self.versions < oldest
        return replace(
            self,
            versions=np.where(older, np.int32(OBSERVED), self.versions),
            digests=np.where(older, np.int64(0), self.digests),
        )

    def without_first(self, tokens: int) -> Rollout:
        """The same rollout, in which the first `tokens` >= 0 tokens count as written by an environment."""
        if not tokens:
            return self
        left = self.ends > tokens
        first = min(tokens, len(self.tokens))
        return replace(
            self,
            versions=np.concatenate(([OBSERVED], self.versions[left]), dtype=np.int32),
            digests=np.concatenate(([0], self.digests[left]), dtype=np.int64),
            ends=np.concatenate(([first], self.ends[left]), dtype=np.int32),
        )

    @property
    def sampled(self) -> np.ndarray:
        """Whether the policy has sampled each token, [T] bool."""
        return sampled_by_policy(self.versions, self.ends)


@dataclass(frozen=True, kw_only=True)
class Ack:
    """The hub has this rollout, received now or before: the actor may forget it."""

    task: int
    attempt: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """The actor returns an unfinished lease."""

    task: int
    attempt: int
    reason: str
    servable: bool = True  # False: no actor can complete it, e.g. the prompt is longer than the model's context


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Shows that a member is alive. The counters of an actor are cumulative since its start."""

    state: State = ""
    version: int = -1
    digest: int = 0  # short digest of the weights that the engine serves, verified after they were loaded; 0: none
    running: int = 0  # sequences in the engine at the moment
    tokens: int = 0  # generated tokens
    busy_s: float = 0.0  # time in which the engine had work
    weights_s: float = 0.0  # time in which it had none because it loaded weights, or its leases need newer ones
    wall_s: float = 0.0
    tasks: Ints = field(default_factory=lambda: np.empty(0, np.int32))  # leases in progress, whose timeouts start anew


@dataclass(frozen=True, kw_only=True)
class Canary:
    """An engine, or one server of an engine, has scored the canary (`model.canary`) with the weights that it serves."""

    engine: str = ""  # which server; "" if the actor has only one engine
    version: int
    digest: int  # short digest
    logprobs: Floats  # of the canary's tokens at temperature 1, in nats


@dataclass(frozen=True, kw_only=True)
class Goodbye:
    """A member leaves intentionally."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run is over: the hub asks every member to leave, and answers the learner's Finish."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A learner rank asks for its shard of a part of the batch of `step` (`learner.parts`).

    If it has to stop, it says why in `stopping`. If the hub has not yet formed this part, it then answers all ranks
    with NoBatch, so that they stop at the same step.
    """

    step: int
    part: int = 0
    stopping: str = ""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """The hub cannot answer a repeated BatchRequest or an Evaluate yet, and made progress `idle_s` seconds ago."""

    idle_s: float


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share of a part of a batch: whole groups. Empty only if the part has fewer groups than ranks."""

    step: int
    part: int = 0
    version: int  # the learner's present version; the lag of a token is this minus the token's version
    problems: int  # problems in the whole batch, over all ranks: P in Eq. 7
    rollouts: tuple[Rollout, ...]  # group after group; rollouts of a group are ordered by slot


@dataclass(frozen=True, kw_only=True)
class NoBatch:
    """Answer to BatchRequest if the learner or the run stops: no rank gets a batch of `step`, or the rest of it."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Rank 0 has done the optimiser step on the batch of `step`; the hub counts its rollouts as trained."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Committed:
    """Answer to Commit: the hub's part of the metrics of this step."""

    step: int
    status: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Rank 0 has written the whole of `version` into the weight store."""

    version: int
    digest: int = 0  # short digest of what is published
    canary: Floats | None = None  # log-probabilities of the canary under exactly these weights; None: not measured
    # The path at which rank 0 has the store open, for a hub that starts again. tcp://HOST:PORT: rank 0 is on another
    # machine, where a weight sender serves its own store; the hub has the version when it has pulled it.
    store: str = ""
    secret: bytes = field(default=b"", repr=False)  # of the session with that weight sender

    @property
    def is_elsewhere(self) -> bool:
        """Whether the store is on another machine than the hub."""
        return self.store.startswith("tcp://")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Rank 0 asks for pass rates of `version`, or newer, on the held-out problems; the hub answers with Evaluated."""

    version: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """One benchmark in one evaluation round: avg@k and pass@k with intervals, and the results of each problem."""

    name: str
    avg: float | None  # None: the actors could serve no problem
    low: float | None
    high: float | None
    samples: int  # k
    problems: int  # problems that the actors could serve
    pass_at: dict[str, Any] = field(default_factory=dict)  # {"1", "2", "4", ...: {mean, low, high}}
    results: dict[str, Any] = field(default_factory=dict)  # by problem: id -> `metrics.problems.ProblemResult`, plain

    def metrics(self) -> dict[str, Any]:
        """All fields except `results`, as plain data."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "results"}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Pass rates on held-out problems, and scores on benchmarks."""

    version: int  # the requested version
    pass_auto: float
    pass_guided: float
    problems: int  # held-out problems
    served_oldest: int  # oldest weight version of a token: `version` or newer
    served_newest: int  # newest weight version of a token
    lag: float  # mean over tokens of: learner's version when the round ended, minus the token's version
    benchmarks: tuple[BenchmarkScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SnapshotRequest:
    """Rank 0 asks for the hub's state, which it stores in a checkpoint."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The hub's state at one step. The learner stores it without reading it."""

    step: int
    state: bytes


@dataclass(frozen=True, kw_only=True)
class Restore:
    """Rank 0 resumes from a checkpoint and asks the hub to restore the state stored in it.

    The hub carries out a request with the same `id` once, and answers each repetition.
    """

    state: bytes
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """Answer to Restore; the learner publishes the resumed weights as `version`."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Rank 0 ends the run; the hub answers with Stop, and stops the actors and then itself."""

    reason: str = "finished"


@dataclass(frozen=True, kw_only=True)
class StatusRequest:
    """Asks for the state of the run. The sender need not be a member."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of the run; `sgpo_async.hub.status.status` defines the keys."""

    status: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SettingsRequest:
    """Asks for the configuration of the run. The sender need not be a member: an actor asks before its Hello.

    It may need long to load the model, and a member that is silent for so long would count as dead.
    """


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Answer to SettingsRequest: the run's configuration as plain data (`config.to_plain`)."""

    settings: dict[str, Any]


Message = (
    Hello | Welcome | Refused | Ready | Lease | Revoked | Progress | OpenSender | CloseSender | SenderUp | SenderDown
    | Rollout | Ack | Release | Heartbeat | Canary | Goodbye | Stop | BatchRequest | Pending | Shard | NoBatch | Commit
    | Committed | Published | Evaluate | Evaluated | SnapshotRequest | Snapshot | Restore | Restored | Finish
    | StatusRequest | Status | SettingsRequest | Settings
)  # fmt: skip


Record = TypeVar("Record")


def without_secrets(record: Record) -> Record:
    """This message, or another record, with its secrets empty: the fields that its `repr` does not show."""
    assert is_dataclass(record) and not isinstance(record, type)
    secrets = {one.name: value for one in fields(record) if not one.repr and (value := getattr(record, one.name))}
    return replace(record, **{name: type(value)() for name, value in secrets.items()}) if secrets else record
