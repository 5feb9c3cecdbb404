"""Sections of the configuration that say which processes serve the run: hub, engine, local."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.config.rules import INFINITE, PATH, host_of, is_loopback, listen_address, require


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The hub's address, its timeouts, and how stale a rollout may be."""

    address: str = "tcp://127.0.0.1:5757"  # at which actors and learner reach the hub
    keys: str = field(
        default="", metadata=PATH
    )  # folder of CURVE keys (`sgpo-async keys DIR`); required beyond loopback
    # eta: a token is stale if it is more versions old than this; 0 is synchronous. Rollouts are begun only when they
    # should end before their tokens are stale. Those that take longer are treated as hub.stale says, so that the lag in
    # the metrics can be above this.
    max_lag: int = 2
    # What becomes of stale tokens, the first ones of long rollouts. correct: they are trained as others, with the
    # weights of grpo_correction; mask: they are not trained; drop: their whole groups are dropped, so long rollouts are
    # lost, and what is trained is biased to short ones (docs/results: 35 % of the groups of a cluster, 78 % of tokens).
    stale: Literal["correct", "mask", "drop"] = "correct"
    # Which groups a batch takes. complete: the first that are complete; begun: those that were begun first, so it waits
    # for the longest rollouts.
    batch_from: Literal["complete", "begun"] = "complete"
    # Batches of tasks that may be in flight or buffered; 0: max_lag + 1. More are useful with stale=correct or mask:
    # then running groups that have stale tokens already, those of long rollouts, do not keep new ones from being begun.
    batches_in_flight: int = 0
    heartbeat_s: float = 1.0
    # How often an actor reports what its running rollouts have sampled. If it is killed, other actors continue them
    # from there, so at most the tokens of this time are lost. SGLang's rollouts are delivered with these reports. With
    # more than 32 actors the hub asks for fewer reports of each: 32 a second of all together.
    progress_s: float = 1.0
    # The hub gives a lease up after this time without a message about it, and an actor after this time without a
    # heartbeat. The limit is long because an actor may be loading weights; the hub notices a dead actor at once, by the
    # end of its connection.
    lease_timeout_s: float = 120.0
    stall_s: float = 300.0  # when nothing has moved for so long, the hub names who holds up the run
    journal: bool = True  # keep the hub's state in runs/NAME/hub.journal, so that a killed hub goes on after a restart
    # Whether actors pull a version as the difference to the one that they have: a hundredth of the bytes at small
    # learning rates in bfloat16. auto: those on other machines; on the hub's own machine a copy is faster.
    weight_deltas: Literal["auto", "always", "never"] = "auto"
    # How many actors the hub, and each actor in its turn, sends the weights to. With more actors than that, actors get
    # them from each other. 0: every actor gets them from the hub.
    weight_fanout: int = 2
    # Folder into which the hub copies every version, for actors with `--weights-by folder`: any URL of fsspec, such as
    # s3://bucket/run or file:///mnt/run. Who can write there decides what these actors serve.
    weight_folder: str = ""
    # Every engine scores the canary (docs/durability.md) after each update and every canary_s seconds. The hub raises
    # an alarm if it differs from the learner's by more nats per token than canary_tolerance. 0: 0.001 if everything is
    # in float32, else 0.1; .inf: never.
    canary_s: float = 60.0
    canary_tolerance: float = field(default=0.0, metadata=INFINITE)
    max_message_mb: int = 512  # the largest message is the hub's state in a checkpoint
    # A member that sends more messages a second than this, on average over 10 s, is expelled; one of several MB counts
    # for as many. 0: no limit.
    max_messages_per_s: int = 10_000
    max_leases: int = 4096  # that an actor may have and ask for, a lease being the rollouts of one problem
    # HOST:PORT at which a dashboard beside the hub shows the run in a browser (docs/dashboard.md); "": none. Beyond
    # loopback, who looks at it needs the token in runs/NAME/dashboard.token.
    dashboard: str = ""

    def __post_init__(self) -> None:
        host = host_of("hub.address", self.address)
        require(
            bool(self.keys) or is_loopback(host.strip("[]")),
            "hub.keys",
            f"must name a folder of keys when the hub listens beyond loopback ({host})",
            self.keys,
            "create keys with: sgpo-async keys DIR",
        )
        require(
            host not in ("0.0.0.0", "*", "[::]"),
            "hub.address",
            "must name the one address at which actors reach this machine, because the hub sends it to the actors and "
            "Torch RPC listens there",
            self.address,
        )
        require(
            not self.weight_folder or "://" in self.weight_folder,
            "hub.weight_folder",
            "must be a URL, for example s3://bucket/run or file:///mnt/run",
            self.weight_folder,
        )
        if self.dashboard:
            listen_address("hub.dashboard", self.dashboard)
        require(self.max_messages_per_s >= 0, "hub.max_messages_per_s", "must be >= 0", self.max_messages_per_s)
        require(1 <= self.max_leases <= 2**15, "hub.max_leases", "must be in [1, 32768]", self.max_leases)
        require(self.weight_fanout >= 0, "hub.weight_fanout", "must be >= 0 (0: no limit)", self.weight_fanout)
        require(self.max_lag >= 0, "hub.max_lag", "must be >= 0", self.max_lag)
        require(
            self.batches_in_flight == 0 or self.batches_in_flight > self.max_lag,
            "hub.batches_in_flight",
            f"must be 0 or > hub.max_lag = {self.max_lag}",
            self.batches_in_flight,
        )
        require(self.heartbeat_s > 0, "hub.heartbeat_s", "must be > 0", self.heartbeat_s)
        require(self.progress_s > 0, "hub.progress_s", "must be > 0", self.progress_s)
        require(self.canary_s > 0, "hub.canary_s", "must be > 0", self.canary_s)
        require(self.canary_tolerance >= 0, "hub.canary_tolerance", "must be >= 0", self.canary_tolerance)
        require(self.stall_s > 0, "hub.stall_s", "must be > 0", self.stall_s)
        require(
            self.lease_timeout_s >= 3 * self.heartbeat_s,
            "hub.lease_timeout_s",
            f"must be >= 3 * hub.heartbeat_s = {3 * self.heartbeat_s:g}",
            self.lease_timeout_s,
        )

    @property
    def most_batches(self) -> int:
        """Batches of tasks that may be in flight or buffered."""
        return self.batches_in_flight or self.max_lag + 1


@dataclass(frozen=True, kw_only=True)
class Sglang:
    """The SGLang servers of each actor, for engine.kind=sglang. They run in a Python environment of their own."""

    # Of that environment (docs/sglang.md; on a CPU: `make sglang-cpu`).
    python: str = field(default=".venv-sglang/bin/python", metadata=PATH)
    servers: int = 1  # servers that an actor launches: data parallel
    tp: int = 1  # tensor parallel ranks of each server
    urls: list[str] = field(default_factory=list)  # servers to attach to instead of launching; for one actor only
    args: str = ""  # further arguments for the command line of `sglang.launch_server`
    radix_cache: bool = True  # compute a prompt once for its whole group
    stream_interval: int = 16  # tokens between two messages of a running generation
    # How a new weight version reaches the servers: through a folder, in HTTP requests, or by a collective with the
    # learner's weight sender. auto: a folder for servers that an actor launches or if `folder` is set, else HTTP.
    transport: Literal["auto", "disk", "tensor", "distributed"] = "auto"
    # transport=disk: folder from which servers read versions; default: in shared memory (/dev/shm) if there is room
    # for three versions, else in the temporary folder.
    folder: str = field(default="", metadata=PATH)
    # What happens to running generations when a new version arrives. abort-resume: they stop and continue under the new
    # version from the tokens that they have; retract: SGLang keeps them and recomputes their keys and values;
    # in-place: they continue with the old keys and values.
    in_flight: Literal["abort-resume", "retract", "in-place"] = "abort-resume"
    start_timeout_s: float = 600.0  # for a server to load the model
    # For each phase of a weight update. Loading a version is one of them: raise it for a model that takes longer.
    phase_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("servers", "tp", "stream_interval"):
            require(getattr(self, name) >= 1, f"engine.sglang.{name}", "must be >= 1", getattr(self, name))
        for name in ("start_timeout_s", "phase_timeout_s"):
            require(getattr(self, name) > 0, f"engine.sglang.{name}", "must be > 0", getattr(self, name))
        for url in self.urls:
            require(url.startswith("http://"), "engine.sglang.urls", "must look like http://HOST:PORT", url)
        require(
            not self.urls or self.transport != "disk" or bool(self.folder),
            "engine.sglang.folder",
            "must name a folder that servers attached by URL can read when engine.sglang.transport=disk",
            self.folder,
        )
        require(
            self.in_flight != "in-place" or not self.radix_cache,
            "engine.sglang.in_flight",
            "must be abort-resume or retract unless engine.sglang.radix_cache=false: in-place would leave old keys and "
            "values in the prefix cache, where they serve later requests",
            self.in_flight,
        )

    @property
    def used_transport(self) -> Literal["disk", "tensor", "distributed"]:
        """The transport that `transport` stands for."""
        if self.transport != "auto":
            return self.transport
        return "tensor" if self.urls and not self.folder else "disk"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The inference engine of each actor."""

    kind: Literal["embedded", "sglang"] = "embedded"  # in the actor's process, or servers (docs/sglang.md)
    slots: int = 64  # sequences decoded together
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU
    deterministic: bool = False  # decode one sequence at a time, so that results do not depend on other requests
    sglang: Sglang = field(default_factory=Sglang)

    def __post_init__(self) -> None:
        require(self.slots >= 1, "engine.slots", "must be >= 1", self.slots)
        require(
            not (self.deterministic and self.kind == "sglang"),
            "engine.deterministic",
            "must be false with engine.kind=sglang, whose servers batch requests freely and ignore sampling seeds on "
            "a CPU",
            self.deterministic,
        )

    @property
    def broadcasts(self) -> bool:
        """Whether servers receive weights by collectives with the weight sender, not through the weight receiver."""
        return self.kind == "sglang" and self.sglang.transport == "distributed"

    @property
    def broadcasts_on_gpus(self) -> bool:
        """Whether these collectives may use NCCL, so that a GPU beside the learner takes part."""
        return self.broadcasts and self.device != "cpu"


@dataclass(frozen=True, kw_only=True)
class Local:
    """The processes that `sgpo-async local` starts on this machine."""

    actors: int = 2  # inference nodes
    ranks: int = 2  # torchrun --nproc-per-node

    def __post_init__(self) -> None:
        require(self.actors >= 1, "local.actors", "must be >= 1", self.actors)
        require(self.ranks >= 1, "local.ranks", "must be >= 1", self.ranks)
