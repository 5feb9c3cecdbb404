"""The whole configuration as frozen dataclasses: one knob per fact, everything else is derived.

Each class is one section of the YAML file. A rule that concerns one section stands in its `__post_init__`
(through `require`); rules across sections stand in `Run.__post_init__`. No other module validates configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.errors import ConfigError

CorrectionMode = Literal["none", "token", "token-mask", "prefix", "sequence", "sequence-geometric"]
BANDS = ("token-mask", "sequence-geometric")  # modes that mask what lies outside of [1/bound, bound]

CHECKPOINTS = "checkpoints"  # below the run's folder
WARMUP_CHECKPOINTS = "warmup-checkpoints"  # not those of the run that starts from the warm-up
HELD_OUT = "held-out"  # the name of the run's own held-out problems among benchmarks
BYTES_PER_TOKEN = 8  # of a rollout: the token and its log-probability; as much again for each likely token beside it


def require(holds: bool, path: str, rule: str, value: object) -> None:
    """Raise `ConfigError` naming `path`, `rule` and `value` unless the rule holds."""
    if not holds:
        raise ConfigError(f"{path}: {rule}, got {value!r}")


def host_of(path: str, address: str) -> str:
    """HOST of tcp://HOST:PORT. Raises ConfigError, naming `path`, for what is no such address."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    whole = address.startswith("tcp://") and bool(host) and port.isdigit() and int(port) < 65536
    require(whole, path, "looks like tcp://HOST:PORT", address)
    return host


@dataclass(frozen=True, kw_only=True)
class Model:
    """The policy."""

    path: str = "builtin:cues"  # the shipped base policy, a Hugging Face folder, or a hub name
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that travel to the engines


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Where problems come from and how a prompt is made of them."""

    source: Literal["cues", "file"] = "cues"
    path: str = ""  # source=file: JSONL, Parquet, or a Hugging Face dataset
    held_out: int = 200  # problems set aside for evaluation
    prompt: Literal["plain", "chat"] = "plain"
    reward_workers: int = 2  # processes of each actor that judge completions
    reward_limit_s: float = 3.0  # a completion that takes longer to judge counts as incorrect

    def __post_init__(self) -> None:
        require(
            self.source != "file" or bool(self.path),
            "tasks.path",
            "names the problems when tasks.source=file",
            "",
        )
        require(self.held_out >= 1, "tasks.held_out", "is at least 1", self.held_out)
        require(self.reward_workers >= 1, "tasks.reward_workers", "is at least 1", self.reward_workers)
        require(self.reward_limit_s > 0, "tasks.reward_limit_s", "is above 0", self.reward_limit_s)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a problem is rolled out: G1 times alone and G2 times with its strategy."""

    autonomous: int = 8  # G1
    guided: int = 4  # G2
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require(self.autonomous >= 1, "rollout.autonomous", "is at least 1", self.autonomous)
        require(self.guided >= 0, "rollout.guided", "is at least 0", self.guided)
        require(self.max_new_tokens >= 1, "rollout.max_new_tokens", "is at least 1", self.max_new_tokens)
        require(self.temperature > 0, "rollout.temperature", "is above 0", self.temperature)
        require(
            self.top_p == 1.0,
            "rollout.top_p",
            "is 1.0: engines report log-probabilities of the whole vocabulary, so a truncated sampler makes "
            "every importance ratio wrong",
            self.top_p,
        )

    @property
    def size(self) -> int:
        """Rollouts per problem, G1 + G2."""
        return self.autonomous + self.guided


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Off-policy correction of one loss term (see `sgpo_async.algorithm.correction`)."""

    mode: CorrectionMode = "token"
    bound: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What is trained; docs/algorithm.md has every equation and explains the defaults.

    The default is anchored SGPO: the paper's (arXiv 2606.24064) with a frozen teacher, nothing masked, and twice its
    alpha. configs/paper.yaml, laid over a configuration, makes it the paper's. A key of something that is not in use is
    not read: no distillation, no teacher; `divergence=sft`, no limiter.
    """

    objective: Literal["sgpo", "grpo", "sft", "luffy", "hpt"] = "sgpo"
    policy_gradient: bool = True  # sgpo: whether autonomous rollouts are trained (Eq. 1), or distillation is all
    # Eq. 1's clip. The learner takes one optimiser step per batch, so that r_t is 1 and these bound nothing, nor touch
    # the gradient: under lag it is grpo_correction that bounds what a stale token counts.
    eps_low: float = 0.2
    eps_high: float = 0.28
    grpo_correction: Correction = field(default_factory=Correction)

    # sgpo: what pulls the student to the target, and which target; sft is the plain likelihood of its tokens
    divergence: Literal["forward", "reverse", "jensen-shannon", "sft"] = "forward"  # Eq. 3: forward
    target: Literal["reachable", "all"] = "reachable"  # Eq. 4; all: the mean over all correct guided rollouts (Eq. 2)
    limiter: Literal["mask", "clamp", "smooth", "quantile", "none"] = "none"  # mask: Eq. 5, d_t > delta is masked
    delta: float = 1.0
    quantile: float = 0.95  # limiter=quantile: larger d_t than this quantile of their own target are masked
    # Towards the teacher's distribution of Eq. 3. In mode prefix a product of factors of up to c grows with c^T; with
    # c = 1, as in V-trace, no prefix weighs more than 1.
    kl_correction: Correction = field(default_factory=lambda: Correction(mode="none", bound=1.0))

    # sgpo: whose guided distribution is distilled. self: the present weights (Eq. 3); ema: their running average;
    # snapshot: a copy of them that is renewed now and then; frozen: the weights that the run began with; behaviour:
    # those that sampled, by what the engine told of its likeliest tokens, without a copy or a forward
    teacher: Literal["self", "ema", "snapshot", "frozen", "behaviour"] = "frozen"
    teacher_decay: float = 0.99  # ema: share of the average that a step keeps
    teacher_every: int = 20  # snapshot: steps between two copies
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"  # of the copy; ema needs float32
    teacher_top_k: int = 16  # behaviour: likeliest tokens that are known one by one; all others are one outcome

    # sgpo: alpha(q), how much is distilled
    weight: Literal["adaptive", "fixed", "group-advantage"] = "adaptive"  # Eq. 6, `alpha` as it is, or Eq. 8
    alpha: float = 1.0  # weight=fixed
    alpha0: float = 1.0  # the paper: 0.5
    gamma: float = 0.1
    alpha_max: float = 1.6  # the paper: 0.8
    # Of Eq. 6: means over the rollouts as they were sampled, or corrected to the present weights, for a forward more.
    pass_rates: Literal["observed", "corrected"] = "observed"
    guide_gate: float = 0.0  # a problem is distilled if its guided pass rate, as observed, is at least this

    luffy_gamma: float = 0.1  # luffy: a token of the demonstration counts f(p) = p / (p + luffy_gamma)
    hpt_gate: int = 0  # hpt: with at most so many correct autonomous rollouts, the demonstration is trained instead

    def __post_init__(self) -> None:
        for name in ("delta", "gamma", "eps_low", "eps_high", "luffy_gamma"):
            require(getattr(self, name) > 0, f"algorithm.{name}", "is above 0", getattr(self, name))
        for name in ("alpha", "alpha0", "alpha_max", "hpt_gate"):
            require(getattr(self, name) >= 0, f"algorithm.{name}", "is at least 0", getattr(self, name))
        for name in ("guide_gate", "quantile", "teacher_decay"):
            require(0 <= getattr(self, name) <= 1, f"algorithm.{name}", "lies in [0, 1]", getattr(self, name))
        for name in ("teacher_every", "teacher_top_k"):
            require(getattr(self, name) >= 1, f"algorithm.{name}", "is at least 1", getattr(self, name))
        for name in ("grpo_correction", "kl_correction"):
            rule: Correction = getattr(self, name)
            require(rule.bound >= 1, f"algorithm.{name}.bound", "is at least 1", rule.bound)
            require(
                rule.mode not in BANDS or rule.bound > 1,
                f"algorithm.{name}.bound",
                f"is above 1 with mode {rule.mode}, which masks all ratios outside [1/bound, bound]: at 1, nearly all",
                rule.bound,
            )
        require(
            self.policy_gradient or self.objective == "sgpo",
            "algorithm.policy_gradient",
            f"is true with algorithm.objective={self.objective}; sgpo alone can do without",
            self.policy_gradient,
        )
        require(
            self.pass_rates == "observed" or (self.objective == "sgpo" and self.weight == "adaptive"),
            "algorithm.pass_rates",
            "is observed unless algorithm.objective=sgpo and algorithm.weight=adaptive, where Eq. 6 uses them",
            self.pass_rates,
        )
        require(
            self.teacher != "ema" or self.teacher_dtype == "float32",
            "algorithm.teacher_dtype",
            "is float32 with algorithm.teacher=ema: bfloat16 would round away what a step adds to the average",
            self.teacher_dtype,
        )

    @property
    def copies_teacher(self) -> bool:
        """Whether a copy of the weights is kept to teach."""
        return self._compares and self.teacher not in ("self", "behaviour")

    @property
    def top_logprobs_num(self) -> int:
        """How many likely tokens are asked for beside each one of a guided rollout."""
        return self.teacher_top_k if self._compares and self.teacher == "behaviour" else 0

    @property
    def _compares(self) -> bool:
        """Whether the student is compared with a teacher's distributions."""
        return self.objective == "sgpo" and self.divergence != "sft"

    @property
    def needs_responses(self) -> bool:
        """Whether the objective trains on the problems' own responses."""
        return self.objective in ("sft", "luffy", "hpt")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "is above 0", self.lr)
        require(self.grad_clip > 0, "optim.grad_clip", "is above 0", self.grad_clip)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "is at least 0", self.warmup_steps)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "lies in [0, 1)", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The torchrun side."""

    problems_per_step: int = 16  # the batch; every optimiser step trains exactly so many problems
    row_tokens: int = 2048  # capacity of one packed row, the micro-batch of one rank
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of matrix products; auto: bfloat16 on GPUs that have it
    )
    recompute: bool = False  # activations, layer by layer: a third more work, memory for much longer sequences
    # Leave rollouts of advantage 0 (all of their group solved the problem, or none did) out of the forward: the same
    # gradient for less work. Entropy, lag and mismatch are then those of the others alone.
    skip_uniform: bool = False
    checkpoint_every: int = 0  # steps; 0: only at the end
    keep_checkpoints: int = 2  # the newest so many; older ones are deleted
    resume: bool = False  # continue from the newest checkpoint of this run, if there is one
    batch_timeout_s: float = 600.0  # how long to wait for a batch before giving up
    # Alarm when |log pi - log mu| at lag 0, where engine and learner hold the same weights, exceeds this in the mean of
    # many tokens, in nats. 0: 1e-4 where both compute in float32, 0.05 where one of them does in bfloat16; .inf: never.
    mismatch_bound: float = 0.0

    def __post_init__(self) -> None:
        require(self.problems_per_step >= 1, "learner.problems_per_step", "is at least 1", self.problems_per_step)
        require(self.row_tokens >= 1, "learner.row_tokens", "is at least 1", self.row_tokens)
        require(self.checkpoint_every >= 0, "learner.checkpoint_every", "is at least 0", self.checkpoint_every)
        require(self.keep_checkpoints >= 1, "learner.keep_checkpoints", "is at least 1", self.keep_checkpoints)
        require(self.mismatch_bound >= 0, "learner.mismatch_bound", "is at least 0", self.mismatch_bound)


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Supervised warm-up on the problems' own responses, before reinforcement: `sgpo-async sft`. The paper's constants.

    The other sections say what they say everywhere: model, prompt style, AdamW's betas, row_tokens, precision.
    """

    path: str = ""  # problems with responses, as tasks.path; default: those of tasks.path that are not held out
    validation: str = ""  # a file of its own; default: a random part of `path`
    validation_share: float = 0.1
    problems: int = 1024  # tasks.source=cues: how many are generated
    epochs: int = 10
    batch: int = 64  # sequences per optimiser step
    lr: float = 1e-5
    warmup_ratio: float = 0.1  # of all steps
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # inferred: the paper names none
    max_tokens: int = 16384  # of prompt and response; longer ones are left out, and counted
    validate_every: int = 0  # steps; 0: at the end of each epoch

    def __post_init__(self) -> None:
        for name in ("problems", "epochs", "batch"):
            require(getattr(self, name) >= 1, f"sft.{name}", "is at least 1", getattr(self, name))
        require(self.lr > 0, "sft.lr", "is above 0", self.lr)
        require(self.max_tokens >= 2, "sft.max_tokens", "is at least 2", self.max_tokens)
        require(self.validate_every >= 0, "sft.validate_every", "is at least 0", self.validate_every)
        require(0 <= self.warmup_ratio <= 1, "sft.warmup_ratio", "lies in [0, 1]", self.warmup_ratio)
        require(0 < self.validation_share < 1, "sft.validation_share", "lies in (0, 1)", self.validation_share)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The front door, and how stale a rollout may be."""

    address: str = "tcp://127.0.0.1:5757"
    keys: str = ""  # folder of CURVE keys (`sgpo-async keys DIR`); needed beyond loopback
    max_lag: int = 2  # eta: a batch holds no token older than this many versions; 0 is synchronous
    heartbeat_s: float = 1.0
    # A lease without news, or an actor without a heartbeat, is given up after so long: it may be loading weights. An
    # actor that is dead is noticed at once, by its link.
    lease_timeout_s: float = 120.0
    max_message_mb: int = 512  # the largest message is the hub's state in a checkpoint

    def __post_init__(self) -> None:
        host = host_of("hub.address", self.address)
        require(
            bool(self.keys) or host in ("127.0.0.1", "localhost", "[::1]"),
            "hub.keys",
            f"names a folder of keys when the hub listens beyond loopback ({host}); make one: sgpo-async keys DIR",
            self.keys,
        )
        require(
            host not in ("0.0.0.0", "*", "[::]"),
            "hub.address",
            "names the one address by which actors reach this machine: they are told it, and Torch RPC listens there",
            self.address,
        )
        require(self.max_lag >= 0, "hub.max_lag", "is at least 0", self.max_lag)
        require(self.heartbeat_s > 0, "hub.heartbeat_s", "is above 0", self.heartbeat_s)
        require(
            self.lease_timeout_s >= 3 * self.heartbeat_s,
            "hub.lease_timeout_s",
            "is at least three heartbeats",
            self.lease_timeout_s,
        )


@dataclass(frozen=True, kw_only=True)
class Sglang:
    """SGLang servers of each actor, for engine.kind=sglang. They live in an environment of their own."""

    python: str = ".venv-sglang/bin/python"  # of that environment (on a CPU: `make sglang-cpu`)
    servers: int = 1  # that an actor launches: data parallel
    tp: int = 1  # tensor parallel ranks of each
    urls: list[str] = field(default_factory=list)  # servers to use instead of launching; one actor's alone
    args: str = ""  # more words for the command line of `sglang.launch_server`
    radix_cache: bool = True  # prompts are computed once for a group
    stream_interval: int = 16  # tokens between two messages of a running generation
    # How a new version reaches the servers: in HTTP requests, by a collective with the learner, or through a folder.
    transport: Literal["tensor", "distributed", "disk"] = "tensor"
    folder: str = ""  # transport=disk: where servers find versions; default: a temporary folder of this machine
    # What becomes of running generations: they end and go on under the new version from the tokens that they have;
    # SGLang keeps them and computes their keys and values anew; or it goes on with the old keys and values.
    in_flight: Literal["abort-resume", "retract", "in-place"] = "abort-resume"
    start_timeout_s: float = 600.0  # for a server to load the model
    phase_timeout_s: float = 60.0  # for each phase of a weight update

    def __post_init__(self) -> None:
        for name in ("servers", "tp", "stream_interval"):
            require(getattr(self, name) >= 1, f"engine.sglang.{name}", "is at least 1", getattr(self, name))
        for name in ("start_timeout_s", "phase_timeout_s"):
            require(getattr(self, name) > 0, f"engine.sglang.{name}", "is above 0", getattr(self, name))
        for url in self.urls:
            require(url.startswith("http://"), "engine.sglang.urls", "are like http://HOST:PORT", url)
        require(
            not self.urls or self.transport != "disk" or bool(self.folder),
            "engine.sglang.folder",
            "names a folder that servers attached by URL can read when engine.sglang.transport=disk",
            self.folder,
        )
        require(
            self.in_flight != "in-place" or not self.radix_cache,
            "engine.sglang.in_flight",
            "is in-place only with engine.sglang.radix_cache=false: old keys and values would stay in the prefix cache "
            "and serve later requests",
            self.in_flight,
        )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The inference engine of each actor."""

    kind: Literal["embedded", "sglang"] = "embedded"
    slots: int = 64  # sequences decoded together
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # one slot: results do not depend on what else is running
    sglang: Sglang = field(default_factory=Sglang)

    def __post_init__(self) -> None:
        require(self.slots >= 1, "engine.slots", "is at least 1", self.slots)
        require(
            not (self.deterministic and self.kind == "sglang"),
            "engine.deterministic",
            "is false with engine.kind=sglang, whose servers batch as they like and ignore sampling seeds on a CPU",
            self.deterministic,
        )

    @property
    def broadcasts(self) -> bool:
        """Whether weights travel by collectives with the learner's end, and not by way of the node."""
        return self.kind == "sglang" and self.sglang.transport == "distributed"

    @property
    def broadcasts_on_gpus(self) -> bool:
        """Whether that may be by NCCL, so that a GPU beside the learner takes part."""
        return self.broadcasts and self.device != "cpu"


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """A benchmark in a file; docs/evaluation.md has the layouts."""

    path: str  # JSONL or Parquet
    samples: int = 0  # completions of each problem, the k of avg@k; 0: evaluation.samples

    def __post_init__(self) -> None:
        require(self.samples >= 0, "evaluation.benchmarks: samples", "is at least 0", self.samples)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Pass rates on held-out problems and benchmarks, measured by the actors while training goes on."""

    every: int = 10  # steps; version 0 and the last version are always evaluated
    samples: int = 1  # rollouts per held-out problem and mode (autonomous, guided)
    temperature: float = 1.0  # the paper's benchmarks: 0.6
    top_p: float = 1.0  # the paper's benchmarks: 0.95
    benchmarks: dict[str, BenchmarkFile] = field(default_factory=dict)  # by name, e.g. {math500: {path: FILE}}

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", "is at least 1", self.every)
        require(self.samples >= 1, "evaluation.samples", "is at least 1", self.samples)
        require(self.temperature > 0, "evaluation.temperature", "is above 0", self.temperature)
        require(0 < self.top_p <= 1, "evaluation.top_p", "is above 0 and at most 1", self.top_p)
        for name in self.benchmarks:
            require(
                bool(re.fullmatch(r"[\w.-]+", name)) and name != HELD_OUT,
                "evaluation.benchmarks",
                f"have names of letters, digits and . _ -, and none is {HELD_OUT}, which are the run's own",
                name,
            )


@dataclass(frozen=True, kw_only=True)
class Local:
    """What `launch/local.py` starts on this machine."""

    actors: int = 2
    ranks: int = 2  # torchrun --nproc-per-node

    def __post_init__(self) -> None:
        require(self.actors >= 1, "local.actors", "is at least 1", self.actors)
        require(self.ranks >= 1, "local.ranks", "is at least 1", self.ranks)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str = "run"
    out: str = "runs"  # everything the run writes is below out/name
    seed: int = 0
    steps: int = 100
    model: Model = field(default_factory=Model)
    tasks: Tasks = field(default_factory=Tasks)
    rollout: Rollout = field(default_factory=Rollout)
    algorithm: Algorithm = field(default_factory=Algorithm)
    optim: Optim = field(default_factory=Optim)
    learner: Learner = field(default_factory=Learner)
    sft: Sft = field(default_factory=Sft)
    hub: Hub = field(default_factory=Hub)
    engine: Engine = field(default_factory=Engine)
    evaluation: Evaluation = field(default_factory=Evaluation)
    local: Local = field(default_factory=Local)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", "is a folder's name", self.name)
        require(self.steps >= 1, "steps", "is at least 1", self.steps)
        require(
            self.algorithm.objective != "sgpo" or self.rollout.guided >= 1,
            "rollout.guided",
            "is at least 1 when algorithm.objective=sgpo",
            self.rollout.guided,
        )
        require(
            self.algorithm.objective != "hpt" or self.algorithm.hpt_gate < self.rollout.autonomous,
            "algorithm.hpt_gate",
            f"is below rollout.autonomous={self.rollout.autonomous}; all of it would be algorithm.objective=sft",
            self.algorithm.hpt_gate,
        )
        require(
            self.learner.problems_per_step >= self.local.ranks,
            "learner.problems_per_step",
            f"gives every one of the {self.local.ranks} ranks at least one problem",
            self.learner.problems_per_step,
        )
        require(
            not (self.engine.deterministic and self.local.actors > 1),
            "local.actors",
            "is 1 when engine.deterministic=true",
            self.local.actors,
        )
        require(
            self.engine.kind != "sglang" or self.rollout.temperature == 1.0 or self.rollout.guided == 0,
            "rollout.temperature",
            "is 1.0 with engine.kind=sglang and guided rollouts: SGLang scores given tokens (Eq. 4) at temperature 1 "
            "alone",
            self.rollout.temperature,
        )
        require(
            self.state_mb <= self.hub.max_message_mb,
            "hub.max_message_mb",
            f"holds the hub's state, up to {self.state_mb} MB of completions in this run (raise it, or lower "
            "learner.problems_per_step, rollout.max_new_tokens or hub.max_lag)",
            self.hub.max_message_mb,
        )

    @property
    def state_mb(self) -> int:
        """How large the rollouts in the hub may become, in MB, rounded up: every completion at its full length.

        It holds a batch for each version that the lag admits, the one in training and the one that is forming.
        Prompts are not counted: their length is unknown here.
        """
        batches = self.hub.max_lag + 2
        per_token = self.rollout.size + self.rollout.guided * self.algorithm.top_logprobs_num
        tokens = batches * self.learner.problems_per_step * self.rollout.max_new_tokens
        return -(-tokens * per_token * BYTES_PER_TOKEN // 2**20)

    @property
    def folder(self) -> str:
        """Where this run writes: `out/name`."""
        return f"{self.out}/{self.name}"
