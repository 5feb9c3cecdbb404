"""Sections of the configuration that say how the policy is trained: optim, learner, sft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.config.rules import INFINITE, PATH, require, require_one_of, require_patterns

TRACKERS = ("tensorboard", "wandb", "mlflow")
OTHER = "other"  # the class of tokens that belong to none of learner.token_classes


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW and its schedule."""

    lr: float = 1e-6  # the learning rate after the warm-up
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    weight_decay: float = 0.0  # of AdamW, on matrices only
    grad_clip: float = field(default=1.0, metadata=INFINITE)  # of the gradient's norm; .inf: not clipped
    warmup_steps: int = 0  # of linear increase from 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; linear, cosine: down to 0
    # What AdamW's two moments are stored in: 8, 4 or 2.03 bytes for each parameter in both together.
    state: Literal["float32", "bfloat16", "int8"] = "float32"

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", "must be > 0", self.lr)
        require(self.weight_decay >= 0, "optim.weight_decay", "must be >= 0", self.weight_decay)
        require(self.grad_clip > 0, "optim.grad_clip", "must be > 0", self.grad_clip)
        require(self.warmup_steps >= 0, "optim.warmup_steps", "must be >= 0", self.warmup_steps)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "must be in [0, 1)", getattr(self, name))

    @property
    def state_bytes(self) -> float:
        """Bytes of AdamW's two moments for each parameter."""
        return {"float32": 8, "bfloat16": 4, "int8": 2 + 2 * 4 / 256}[self.state]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha/rank B A instead of W, where only A and B are trained.

    Only the adapters travel to the inference nodes, which add them to their own copy of the model. `teacher=frozen` is
    then the model without its adapters, and takes no memory.
    """

    rank: int = 0  # of A [rank, inputs] and B [outputs, rank]; 0: no adapters, all weights are trained
    alpha: float = 32.0  # the adapters count alpha/rank
    # Last names of the linear layers that get adapters, such as q_proj; []: all of every decoder layer.
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(self.rank >= 0, "learner.lora.rank", "must be >= 0", self.rank)
        require(self.alpha > 0, "learner.lora.alpha", "must be > 0", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of B A; 0 without adapters."""
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The learner: the processes that torchrun starts, one per rank."""

    problems_per_step: int = 16  # the batch: every optimiser step trains on exactly this many problems
    # The batch is requested and trained in this many parts, each as soon as its rollouts are there; the optimiser steps
    # after the last one, on the sum of their gradients. 1: at once, when all rollouts are there.
    parts: int = 1
    row_tokens: int = 2048  # most tokens of one packed row, which is the micro-batch of one rank
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of matrix products; auto: bfloat16 on GPUs that support it
    )
    # The ranks that divide weights, gradients and AdamW among them. node: those of one node; then every node has all of
    # them, and a step moves only its gradient between nodes. auto: node, if nodes have more than one rank.
    shard_over: Literal["auto", "node", "world"] = "auto"
    # Recompute the activations of every n-th layer: up to a third more work, memory for much longer sequences.
    # 1: of all layers; 0: of none.
    recompute: int = 0
    lora: Lora = field(default_factory=Lora)
    # Keep the inputs of the recomputed layers in host memory between forward and backward. Needs recompute >= 1.
    offload_activations: bool = False
    # Keep weights, gradients, AdamW's moments and the teacher's copy in host memory. The weights of a layer are copied
    # to the GPU when it computes, and the optimiser runs on the CPU.
    offload_weights: bool = False
    # Compile the layers of policy and teacher by torch.compile. Each start then takes minutes longer.
    compile: bool = False
    # Of the autonomous rollouts of a problem, if all have the same reward, train only one: their advantages are 0, so
    # the gradient is the same for less work. In the entropy this one stands for all of them.
    skip_uniform: bool = True
    checkpoint_every: int = 0  # steps; 0: only at the end, by checkpoint_minutes, and when the run is interrupted
    checkpoint_minutes: float = 10.0  # since the last checkpoint; 0: only by checkpoint_every
    keep_checkpoints: int = 2  # how many of the newest checkpoints are kept; older ones are deleted
    # Continue from the newest whole checkpoint of this run. auto: if torchrun has restarted this job, or the job has
    # the --rdzv-id of the one that began the run. false: begin anew, and move the checkpoints of an earlier run aside.
    resume: Literal["auto", True, False] = "auto"
    batch_timeout_s: float = 600.0  # how long the run may make no progress while the learner waits for a batch
    # Log an alarm when |log pi - log mu| at lag 0, where engine and learner hold the same weights, has a larger mean
    # over many tokens than this, in nats. 0: 1e-4 where both compute in float32, 0.05 where one of them computes in
    # bfloat16; .inf: never.
    mismatch_bound: float = field(default=0.0, metadata=INFINITE)
    # Score the canary (docs/durability.md) at the first step and at one of every `canary_every` steps: not at each,
    # because it is 8 % of the learner's work of a step of the demo's tiny model. With a usual size, 1 costs little.
    canary_every: int = 4
    # Regular expressions by name. The metric `patterns` has the share of the autonomous completions in which each is
    # found, e.g. {leak: "(?i)\\b(hint|strategy)\\b"}: whether the policy speaks of a context that it does not have.
    patterns: dict[str, str] = field(default_factory=dict)
    # A completion without the strategy quotes a context if it contains this many consecutive words of it that are not
    # in its own prompt, e.g. 3. The metric `quotes` has the share that quotes the context of its problem, and that of
    # another problem; 0: not measured.
    quoted_words: int = 0
    # Regular expressions by name, for whole tokens, e.g. {numbers: "\\s*\\d+"}. The metric `kl_classes` has the mean KL
    # on the distilled tokens of each class; a token belongs to the first class that it matches.
    token_classes: dict[str, str] = field(default_factory=dict)
    samples: int = 1  # problems of a step whose completions are kept in runs/NAME/samples.jsonl; 0: none
    # Where the metrics go beside metrics.jsonl: tensorboard, wandb, mlflow (docs/trackers.md); []: nowhere.
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str = "sgpo-async"  # W&B's project, and MLflow's experiment
    samples_mb: int = 16  # when the file is larger, every second of its steps is deleted, and half as many are added

    def __post_init__(self) -> None:
        require(self.problems_per_step >= 1, "learner.problems_per_step", "must be >= 1", self.problems_per_step)
        require(
            1 <= self.parts <= self.problems_per_step,
            "learner.parts",
            f"must be in [1, {self.problems_per_step}], the last being learner.problems_per_step",
            self.parts,
        )
        require(self.recompute >= 0, "learner.recompute", "must be >= 0", self.recompute)
        require(
            self.recompute >= 1 or not self.offload_activations,
            "learner.offload_activations",
            "must be false with learner.recompute=0: it keeps the inputs of recomputed layers in host memory",
            self.offload_activations,
        )
        require(self.row_tokens >= 1, "learner.row_tokens", "must be >= 1", self.row_tokens)
        require(self.checkpoint_every >= 0, "learner.checkpoint_every", "must be >= 0", self.checkpoint_every)
        require(self.checkpoint_minutes >= 0, "learner.checkpoint_minutes", "must be >= 0", self.checkpoint_minutes)
        require(self.keep_checkpoints >= 1, "learner.keep_checkpoints", "must be >= 1", self.keep_checkpoints)
        require(self.mismatch_bound >= 0, "learner.mismatch_bound", "must be >= 0", self.mismatch_bound)
        require(self.canary_every >= 1, "learner.canary_every", "must be >= 1", self.canary_every)
        require(bool(self.project), "learner.project", "must not be empty", self.project)
        for name in self.trackers:
            require_one_of("learner.trackers", name, TRACKERS)
            require(self.trackers.count(name) == 1, "learner.trackers", "must name each tracker once", name)
        require_patterns("learner.patterns", self.patterns)
        require(self.quoted_words >= 0, "learner.quoted_words", "must be >= 0", self.quoted_words)
        require_patterns("learner.token_classes", self.token_classes)
        rule = f"must have no class named {OTHER}, the name of all other tokens"
        require(OTHER not in self.token_classes, "learner.token_classes", rule, self.token_classes)
        require(self.samples >= 0, "learner.samples", "must be >= 0", self.samples)
        require(self.samples_mb >= 1, "learner.samples_mb", "must be >= 1", self.samples_mb)

    def shards(self, *, ranks: int, here: int) -> int:
        """Return how many ranks divide the parameters among them, of `ranks` in all and `here` on each node."""
        return here if self.shard_over == "node" or (self.shard_over == "auto" and here > 1) else ranks


@dataclass(frozen=True, kw_only=True)
class Sft:
    """`sgpo-async sft`: supervised warm-up on the problems' own responses before reinforcement learning.

    With learner.lora.rank > 0 it trains adapters, and exports the model with them added.

    Defaults are the paper's constants. The warm-up also reads model, tasks.prompt, AdamW's betas, learner.row_tokens
    and learner.precision from the other sections.
    """

    # Problems with responses, in a form of tasks.path but with our names of columns; default: tasks.path without its
    # held-out problems.
    path: str = field(default="", metadata=PATH)
    validation: str = field(default="", metadata=PATH)  # a separate validation file; default: a random part of `path`
    validation_share: float = 0.1  # without `validation`: the share of the problems that is that part
    problems: int = 1024  # of a built-in domain: how many are generated
    # The share of the problems whose prompt has their strategy, as that of a guided rollout does. Teaches a model to
    # follow strategies, without which SGPO has nothing to distil.
    guided_share: float = 0.0
    epochs: int = 10  # how often the problems are trained on
    batch: int = 64  # sequences per optimiser step
    lr: float = 1e-5  # the learning rate after the warm-up
    warmup_ratio: float = 0.1  # of all steps
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # inferred: the paper names no schedule
    # Of prompt and response; longer examples, or examples beyond the model's positions, are dropped and counted.
    max_tokens: int = 16384
    validate_every: int = 0  # steps; 0: at the end of each epoch

    def __post_init__(self) -> None:
        for name in ("problems", "epochs", "batch"):
            require(getattr(self, name) >= 1, f"sft.{name}", "must be >= 1", getattr(self, name))
        require(self.lr > 0, "sft.lr", "must be > 0", self.lr)
        require(self.max_tokens >= 2, "sft.max_tokens", "must be >= 2", self.max_tokens)
        require(self.validate_every >= 0, "sft.validate_every", "must be >= 0", self.validate_every)
        require(0 <= self.warmup_ratio <= 1, "sft.warmup_ratio", "must be in [0, 1]", self.warmup_ratio)
        require(0 < self.validation_share < 1, "sft.validation_share", "must be in (0, 1)", self.validation_share)
        require(0 <= self.guided_share <= 1, "sft.guided_share", "must be in [0, 1]", self.guided_share)
