"""The whole configuration as frozen dataclasses. Every setting has exactly one key.

    rules.py        the checks and the text of their errors
    algorithm.py    algorithm
    training.py     optim, learner, sft
    processes.py    hub, engine, local
    schema.py       the run, model, tasks, rollout, evaluation; exports every section

Each class is one section of the YAML file. A setting that names a file or a folder has the metadata PATH, and load.py
expands ~ in it. A rule about one section is checked in the `__post_init__` of its class, by `require`; rules across
sections, and that numbers are finite, are checked in `Run.__post_init__`. No other module validates the configuration,
except against what only a loaded model, an experiment file or the machine can tell.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from sgpo_async.config.algorithm import BANDS, CREDITED, GUIDED, Algorithm, Correction, CorrectionMode, Rlcsd, Rlsd
from sgpo_async.config.processes import Engine, Hub, Local, Sglang
from sgpo_async.config.rules import PATH, host_of, require, require_finite
from sgpo_async.config.training import TRACKERS, Learner, Lora, Optim, Sft

__all__ = [
    "BANDS",
    "BYTES_PER_TOKEN",
    "CHECKPOINTS",
    "COLUMNS",
    "CREDITED",
    "HELD_OUT",
    "TRACKERS",
    "WARMUP_CHECKPOINTS",
    "Algorithm",
    "BenchmarkFile",
    "Context",
    "Correction",
    "CorrectionMode",
    "Engine",
    "Evaluation",
    "Hub",
    "Learner",
    "Local",
    "Lora",
    "Model",
    "Optim",
    "Rlcsd",
    "Rlsd",
    "Rollout",
    "Run",
    "Sft",
    "Sglang",
    "Tasks",
    "host_of",
    "require",
]

Context = Literal["strategy", "response", "partial-response", "answer", "other-strategy", "none", "sibling"]
UNGUIDED = ("none", "sibling")  # contexts that no rollout is guided by

CHECKPOINTS = "checkpoints"  # subfolder of the run's folder
WARMUP_CHECKPOINTS = "warmup-checkpoints"  # subfolder for checkpoints of `sgpo-async sft`
HELD_OUT = "held-out"  # name of the run's own held-out problems among the benchmarks
COLUMNS = ("problem", "answer", "strategy", "response")  # of a problem's record
BYTES_PER_TOKEN = 8  # of a rollout: token id and log-probability; each reported likely token adds as many
MAX_TOP_K = 2048  # SGLang reports at most 4,096 kept tokens, and those as likely as the last one of top_k are kept too
# Mean number of other tokens that top_p and top_k keep, for estimates. It depends on the model and its prompts: with
# top_p 0.95 at temperature 1, SmolLM2-135M keeps 24 tokens on average in arithmetic, and 200 in stories.
OTHERS_KEPT = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """The policy."""

    # The built-in base policy, a Hugging Face folder, or a hub name.
    path: str = field(default="builtin:cues", metadata=PATH)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that are sent to the engines


def is_own_name(name: str) -> bool:
    """Whether `name` has the form MODULE:NAME."""
    return bool(re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name))


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """The source of the problems, and how a prompt is built from a problem."""

    source: Literal["cues", "chains", "file"] = "cues"  # cues, chains: the built-in domains; file: tasks.path
    path: str = field(default="", metadata=PATH)  # source=file: JSONL, CSV, Parquet, or a Hugging Face dataset
    dataset_config: str = ""  # configuration of a Hugging Face dataset, e.g. main
    split: str = ""  # split of a Hugging Face dataset; "": train
    columns: dict[str, str] = field(default_factory=dict)  # our names -> those of the file, e.g. {problem: question}
    answer_after: str = ""  # the answer follows this text in its column, e.g. "####"; "": the whole column
    held_out: int = 200  # problems set aside for evaluation
    prompt: str = "plain"  # plain, chat (the tokenizer's template), or module:function
    system: str = ""  # prompt=chat: the system message
    template_args: dict[str, Any] = field(default_factory=dict)  # prompt=chat: e.g. {enable_thinking: false}
    # What stands in guided prompts, and what a teacher reads with the problem. strategy, response, answer: those of the
    # problem; partial-response: the first quarter of its response; other-strategy: that of another problem, for
    # contrast; none: nothing; sibling: a correct rollout of the same group. The last two are for teachers alone.
    context: Context = "strategy"
    strategy_place: Literal["user", "system"] = "user"  # prompt=chat: the message that holds the strategy or context
    suffix: str = ""  # text directly after the problem, e.g. "\nPut the answer into \\boxed{}."
    reward: Any = (
        ""  # math, ..., module:function, or {name: weight, ...}; "": the source's verifier (docs/own-tasks.md)
    )
    solved_at: float = 1.0  # a rollout is correct if its reward is at least this
    # module:Class of an environment, which replies to completions until the episode is over and gives the reward; "": a
    # completion is judged by itself. rollout.max_new_tokens is the limit of an episode, with the replies.
    environment: str = ""
    max_turns: int = 8  # most completions in an episode
    reply_role: Literal["user", "tool"] = "user"  # prompt=chat: the role of the environment's replies
    reward_workers: int = 2  # processes of each actor that judge completions
    reward_limit_s: float = 3.0  # a completion that takes longer to judge has reward 0
    reward_memory_mb: int = 2048  # limit of each of these processes; a completion that needs more has reward 0; 0: none

    def __post_init__(self) -> None:
        self._check_file()
        require(self.held_out >= 1, "tasks.held_out", "must be >= 1", self.held_out)
        require(self.reward_workers >= 1, "tasks.reward_workers", "must be >= 1", self.reward_workers)
        require(self.reward_limit_s > 0, "tasks.reward_limit_s", "must be > 0", self.reward_limit_s)
        require(
            self.reward_memory_mb == 0 or self.reward_memory_mb >= 256,
            "tasks.reward_memory_mb",
            "must be 0 or >= 256",
            self.reward_memory_mb,
        )
        require(
            0 < self.solved_at < math.inf,
            "tasks.solved_at",
            "must be > 0 and finite: the reward 0 of a completion that exceeds a limit must not count as correct",
            self.solved_at,
        )
        require(
            bool(self.reward) or self.solved_at <= 1,
            "tasks.solved_at",
            "must be <= 1 without tasks.reward, because verifiers give 1 or 0",
            self.solved_at,
        )
        require(self.max_turns >= 1, "tasks.max_turns", "must be >= 1", self.max_turns)
        require(
            not (self.environment and self.reward),
            "tasks.reward",
            "must be empty with tasks.environment, which gives the rewards",
            self.reward,
        )
        require(
            not self.environment or is_own_name(self.environment),
            "tasks.environment",
            "must be MODULE:CLASS",
            self.environment,
        )
        self._check_reward()
        self._check_prompt()
        unknown = sorted(self.columns.keys() - set(COLUMNS))
        require(not unknown, "tasks.columns", f"must map only {', '.join(COLUMNS)}", ", ".join(unknown))

    def changed(self, *names: str) -> dict[str, Any]:
        """Those of these settings that differ from their defaults."""
        defaults = {item.name: {} if item.default is MISSING else item.default for item in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def _check_file(self) -> None:
        require(
            self.source != "file" or bool(self.path),
            "tasks.path",
            "must name the problems when tasks.source=file",
            self.path,
        )
        of_file = self.changed("path", "dataset_config", "split", "columns", "answer_after")
        for key, value in of_file.items() if self.source != "file" else ():
            require(False, f"tasks.{key}", f"is for tasks.source=file only, which is {self.source} here", value)

    def _check_reward(self) -> None:
        reward = self.reward
        mapping = isinstance(reward, dict) and bool(reward)
        named = mapping and all(isinstance(name, str) and bool(name) for name in reward)
        weighted = named and all(type(one) in (int, float) and math.isfinite(one) for one in reward.values())
        require(
            isinstance(reward, str) or weighted,
            "tasks.reward",
            "must be the name of a verifier, MODULE:FUNCTION, or a mapping from such names to weights",
            reward,
        )

    def _check_prompt(self) -> None:
        own = is_own_name(self.prompt)
        require(
            self.prompt in ("plain", "chat") or own,
            "tasks.prompt",
            "must be plain, chat, or MODULE:FUNCTION",
            self.prompt,
        )
        chat = self.changed("system", "template_args", "strategy_place")
        for key, value in chat.items() if self.prompt != "chat" else ():
            require(False, f"tasks.{key}", "is for tasks.prompt=chat only", value)
        require(
            not (own and self.suffix),
            "tasks.suffix",
            "must be empty with tasks.prompt=MODULE:FUNCTION, which builds the whole prompt",
            self.suffix,
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a problem is sampled: G1 rollouts of the plain prompt and G2 of the prompt with the problem's strategy."""

    autonomous: int = 8  # G1
    guided: int = 4  # G2
    max_new_tokens: int = 64  # limit of a completion, or of a whole episode
    temperature: float = 1.0  # T; training uses softmax(z/T), too
    # Sample from the fewest likeliest tokens with the probability top_p together, and from at most top_k (0: no limit).
    # Training then uses the probabilities renormalised over these tokens, which every rollout reports.
    top_p: float = 1.0
    top_k: int = 0
    # The reward of a completion that max_new_tokens has cut. score: as the verifier judges it; zero: 0; mask: 0, and
    # it is left out: neither its tokens nor its reward count. It is never a target of sgpo.
    cut: Literal["score", "zero", "mask"] = "score"

    def __post_init__(self) -> None:
        require(self.autonomous >= 1, "rollout.autonomous", "must be >= 1", self.autonomous)
        require(self.guided >= 0, "rollout.guided", "must be >= 0", self.guided)
        require(self.max_new_tokens >= 1, "rollout.max_new_tokens", "must be >= 1", self.max_new_tokens)
        require(self.temperature > 0, "rollout.temperature", "must be > 0", self.temperature)
        require(0 < self.top_p <= 1, "rollout.top_p", "must be in (0, 1]", self.top_p)
        require(
            self.top_k == 0 or 2 <= self.top_k <= MAX_TOP_K,
            "rollout.top_k",
            f"must be 0 or in [2, {MAX_TOP_K}]",
            self.top_k,
        )
        require(
            self.top_p == 1 or self.top_k > 0,
            "rollout.top_k",
            "must be > 0 with rollout.top_p below 1, because every rollout reports the tokens that were kept, and "
            "top_k bounds their number; 1024 excludes few tokens",
            self.top_k,
        )

    @property
    def is_truncated(self) -> bool:
        """Whether rollouts report the tokens that top_p and top_k kept."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def size(self) -> int:
        """Rollouts per problem, G1 + G2."""
        return self.autonomous + self.guided


@dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """A benchmark in a file; docs/evaluation.md describes the layouts."""

    path: str = field(metadata=PATH)  # JSONL, CSV or Parquet
    samples: int = 0  # completions of each problem, the k of avg@k; 0: evaluation.samples

    def __post_init__(self) -> None:
        require(self.samples >= 0, "evaluation.benchmarks: samples", "must be >= 0", self.samples)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Pass rates on held-out problems and benchmarks, measured by the actors during training."""

    every: int = 10  # steps; version 0 and the last version are always evaluated
    samples: int = 1  # rollouts per held-out problem and mode (autonomous, guided)
    share: float = 0.5  # of the actors' leases that evaluation may hold while there is training to do
    temperature: float = 1.0  # the paper's benchmarks: 0.6
    top_p: float = 1.0  # the paper's benchmarks: 0.95
    benchmarks: dict[str, BenchmarkFile] = field(default_factory=dict)  # by name, e.g. {math500: {path: FILE}}

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", "must be >= 1", self.every)
        require(self.samples >= 1, "evaluation.samples", "must be >= 1", self.samples)
        require(0 < self.share <= 1, "evaluation.share", "must be in (0, 1]", self.share)
        require(self.temperature > 0, "evaluation.temperature", "must be > 0", self.temperature)
        require(0 < self.top_p <= 1, "evaluation.top_p", "must be in (0, 1]", self.top_p)
        for name in self.benchmarks:
            require(
                bool(re.fullmatch(r"[\w.-]+", name)) and name != HELD_OUT,
                "evaluation.benchmarks",
                "must have names of letters, digits and . _ - "
                f"other than {HELD_OUT}, which names the run's own held-out problems",
                name,
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str = "run"  # names the run's folder
    out: str = field(default="runs", metadata=PATH)  # everything the run writes is below out/name
    seed: int = 0  # of generated problems, their order, splits, and sampling
    steps: int = 100  # optimiser steps
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
        require_finite(self)
        require(bool(self.name) and "/" not in self.name, "name", "must be a folder name without /", self.name)
        require(self.steps >= 1, "steps", "must be >= 1", self.steps)
        self._check_context()
        require(
            self.algorithm.objective != "hpt" or self.algorithm.hpt_gate < self.rollout.autonomous,
            "algorithm.hpt_gate",
            f"must be < rollout.autonomous = {self.rollout.autonomous}",
            self.algorithm.hpt_gate,
            "to train on demonstrations alone, set algorithm.objective=sft",
        )
        require(
            self.learner.problems_per_step >= self.local.ranks,
            "learner.problems_per_step",
            f"must be >= local.ranks = {self.local.ranks}, so that every rank trains on a problem",
            self.learner.problems_per_step,
        )
        require(
            not (self.engine.deterministic and self.local.actors > 1),
            "local.actors",
            "must be 1 when engine.deterministic=true",
            self.local.actors,
        )
        require(
            self.learner.batch_timeout_s >= 3 * self.hub.heartbeat_s,
            "learner.batch_timeout_s",
            f"must be >= 3 * hub.heartbeat_s = {3 * self.hub.heartbeat_s:g}",
            self.learner.batch_timeout_s,
        )
        require(
            self.engine.kind != "sglang" or self.rollout.temperature == 1.0 or not self.algorithm.unguided_scores,
            "rollout.temperature",
            "must be 1.0 with engine.kind=sglang, algorithm.objective=sgpo and algorithm.target=reachable: SGLang "
            "scores given tokens (Eq. 4) only at temperature 1",
            self.rollout.temperature,
        )
        if self.learner.lora.rank:
            require(
                self.algorithm.teacher == "frozen" or not self.algorithm.copies_teacher,
                "algorithm.teacher",
                "must be frozen, self or behaviour with learner.lora.rank > 0",
                self.algorithm.teacher,
            )
            require(
                not self.engine.broadcasts,
                "engine.sglang.transport",
                "must be tensor or disk with learner.lora.rank > 0, because each node adds the adapters to its model",
                self.engine.sglang.transport,
            )
        require(
            self.state_mb <= self.hub.max_message_mb,
            "hub.max_message_mb",
            f"must be >= {self.state_mb}, to hold the hub's state: up to {self.state_mb} MB of completions in this run",
            self.hub.max_message_mb,
            "raise it, or lower learner.problems_per_step, rollout.max_new_tokens, hub.max_lag or "
            "hub.batches_in_flight",
        )

    def _check_context(self) -> None:
        """Check that the objective has the rollouts and the context that it trains on."""
        objective, context = self.algorithm.objective, self.tasks.context
        require(
            context not in UNGUIDED or objective not in GUIDED,
            "tasks.context",
            f"must not be {context} with algorithm.objective={objective}, which trains guided rollouts",
            context,
        )
        require(
            objective not in GUIDED or self.rollout.guided >= 1,
            "rollout.guided",
            f"must be >= 1 when algorithm.objective={objective}",
            self.rollout.guided,
        )
        require(
            context not in UNGUIDED or self.rollout.guided == 0,
            "rollout.guided",
            f"must be 0 with tasks.context={context}, which no rollout can be guided by",
            self.rollout.guided,
        )
        require(
            context != "sibling" or self.algorithm.reads_in_context,
            "tasks.context",
            f"must not be {context} with algorithm.objective={objective}, whose teacher reads no autonomous rollouts",
            context,
        )
        require(
            context in ("strategy", "sibling") or objective != "rlcsd",
            "tasks.context",
            "must be strategy or sibling with algorithm.objective=rlcsd, which needs a right and a wrong one",
            context,
        )
        require(
            context != "none" or not self.algorithm.reads_in_context or self.algorithm.teacher != "self",
            "algorithm.teacher",
            "must not be self with tasks.context=none: teacher and policy would be equal, and nothing learned",
            self.algorithm.teacher,
        )
        require(
            context not in UNGUIDED or not self.learner.quoted_words,
            "learner.quoted_words",
            f"must be 0 with tasks.context={context}: such a prompt has nothing of its own that could be quoted",
            self.learner.quoted_words,
        )
        require(
            context != "sibling" or self.rollout.autonomous >= 2,
            "rollout.autonomous",
            "must be >= 2 with tasks.context=sibling",
            self.rollout.autonomous,
        )

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of one optimiser step, P (G1 + G2)."""
        return self.learner.problems_per_step * self.rollout.size

    @property
    def needs_strategies(self) -> bool:
        """Whether the objective needs problems with a strategy, or with the text of another context."""
        guided = self.algorithm.objective in GUIDED
        return guided or (self.algorithm.reads_in_context and self.tasks.context not in UNGUIDED)

    @property
    def copies_teacher(self) -> bool:
        """Whether the learner keeps a copy of the weights as the teacher; with adapters, the model itself is kept."""
        return self.algorithm.copies_teacher and not self.learner.lora.rank

    @property
    def copies_reference(self) -> bool:
        """Whether the learner keeps a second copy, of the weights at the start; with adapters, the model is kept."""
        return self.algorithm.copies_reference and not self.learner.lora.rank

    @property
    def state_mb(self) -> int:
        """Upper bound of the rollouts in the hub's state, in MB, rounded up: every completion has its full length.

        The hub holds as many batches as may be in flight or buffered, and the batch in training. Prompts are not
        counted, because their length is not known here. With top_p or top_k it is an estimate, of `OTHERS_KEPT`.
        """
        batches = self.hub.most_batches + 1
        per_token = self.rollout.size + self.rollout.guided * self.algorithm.top_logprobs_num
        if self.rollout.is_truncated:  # token ids and their number, of 4 bytes each
            per_token += -(-self.rollout.size * (1 + min(OTHERS_KEPT, self.rollout.top_k - 1)) // 2)
        tokens = batches * self.learner.problems_per_step * self.rollout.max_new_tokens
        return -(-tokens * per_token * BYTES_PER_TOKEN // 2**20)

    @property
    def folder(self) -> str:
        """The folder into which this run writes: `out/name`."""
        return f"{self.out}/{self.name}"
