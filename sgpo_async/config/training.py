"""Sections of the configuration that say how the policy is trained: algorithm, optim, learner, sft."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.config.rules import INFINITE, PATH, require, require_one_of, require_patterns

CorrectionMode = Literal["none", "token", "token-mask", "prefix", "sequence", "sequence-geometric", "clip"]
CLIP = "clip"  # of the policy gradient: PPO with the behaviour policy as its old policy
TRACKERS = ("tensorboard", "wandb", "mlflow")
OTHER = "other"  # the class of tokens that belong to none of learner.token_classes
BANDS = ("token-mask", "sequence-geometric")  # modes that mask every ratio outside [1/bound, bound]
Objective = Literal[
    "sgpo", "grpo", "sft", "luffy", "hpt", "opsd", "sdpo", "kdrl", "rlsd", "rlcsd", "iw-opd", "pi-distill", "pope"
]  # fmt: skip
GUIDED = ("sgpo", "pi-distill", "pope")  # objectives that train guided rollouts
DISTILLED = ("opsd", "sdpo", "kdrl")  # a teacher with a context is distilled on autonomous rollouts
CREDITED = ("rlsd", "rlcsd", "iw-opd")  # a teacher with a context gives each token of them an advantage of its own


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Off-policy correction of one loss term (see `sgpo_async.algorithm.correction`)."""

    mode: CorrectionMode = "token"  # how a token is weighted (docs/algorithm.md)
    # >= 1; .inf: weights are not bounded. mode=clip: the ratio above which tokens of negative advantage are clipped
    # (dual clip; 3 is usual). That of grpo_correction also bounds the ratios of pass_rates=corrected.
    bound: float = field(default=2.0, metadata=INFINITE)


@dataclass(frozen=True, kw_only=True)
class Rlsd:
    """RLSD: the teacher scales the advantage of each token (docs/algorithm.md)."""

    clip: float = 0.2  # the factor is kept in [1 - clip, 1 + clip]
    weight: float = 0.5  # lambda at the first step: the share of the scaled advantage; the rest is GRPO's
    steps: int = 50  # in which lambda falls to 0; 0: it stays as it is

    def __post_init__(self) -> None:
        require(0 < self.clip < 1, "algorithm.rlsd.clip", "must be in (0, 1)", self.clip)
        require(0 <= self.weight <= 1, "algorithm.rlsd.weight", "must be in [0, 1]", self.weight)
        require(self.steps >= 0, "algorithm.rlsd.steps", "must be >= 0", self.steps)


@dataclass(frozen=True, kw_only=True)
class Rlcsd:
    """RLCSD: a right and a wrong context shift the advantage of each token (docs/algorithm.md)."""

    tau: float = 0.02  # nats in which the evidence of a token saturates
    scale: float = 0.5  # of the shift
    threshold: float = 0.02  # a token is shifted if |shift| is larger
    weight: float = 1.0  # of the shifted tokens
    wrong: int = 4  # most wrong contexts of a rollout

    def __post_init__(self) -> None:
        for name in ("tau", "scale", "weight"):
            require(getattr(self, name) > 0, f"algorithm.rlcsd.{name}", "must be > 0", getattr(self, name))
        require(self.threshold >= 0, "algorithm.rlcsd.threshold", "must be >= 0", self.threshold)
        require(self.wrong >= 1, "algorithm.rlcsd.wrong", "must be >= 1", self.wrong)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The training objective; docs/algorithm.md gives every equation and explains the defaults.

    The default is anchored SGPO: the paper's SGPO (arXiv 2606.24064) with a frozen teacher, without masking, and with
    twice the paper's alpha. Loading builtin:paper after a configuration restores the paper's setting. Keys of
    features that are switched off are ignored: without distillation the teacher's keys, with `divergence=sft` the
    limiter's.
    """

    objective: Objective = "sgpo"  # docs/algorithm.md compares them
    # sgpo, pi-distill: false trains without Eq. 1 on the autonomous rollouts
    policy_gradient: bool = True
    # What the rewards less their mean in the group are divided by: std: Eq. 1; mean: MaxRL; none: Dr. GRPO. luffy: std.
    advantage: Literal["std", "mean", "none"] = "std"
    # Clip range of Eq. 1. It is used by grpo_correction.mode=clip, where r_t = pi/mu. With other modes r_t is always 1,
    # as the learner takes one step per batch, and nothing is clipped.
    eps_low: float = 0.2
    eps_high: float = 0.28
    grpo_correction: Correction = field(default_factory=Correction)
    # Weight of (log pi - log pi_0)^2 / 2 on each token of the policy gradient, where pi_0 are the weights at the start:
    # in the mean its gradient is that of KL(pi || pi_0). It needs a copy of these weights and a forward pass.
    reference_kl: float = 0.0

    # How the student is drawn to the teacher, in all objectives that distil one except pi-distill, which has both KLs.
    # sft, in sgpo only: the plain likelihood of the target's tokens.
    divergence: Literal["forward", "reverse", "jensen-shannon", "sft"] = "forward"  # Eq. 3: forward
    # divergence=forward: the most that one token of the vocabulary may add to d_t, in nats; OPSD: 0.05
    kl_clip: float = field(default=math.inf, metadata=INFINITE)
    target: Literal["reachable", "all"] = (
        "reachable"  # sgpo: Eq. 4; all: the mean over all correct guided rollouts (Eq. 2)
    )
    limiter: Literal["mask", "clamp", "smooth", "quantile", "none"] = "none"  # mask: Eq. 5 masks tokens of d_t > delta
    delta: float = 1.0  # limiter=mask, clamp, smooth: the bound of d_t in nats
    quantile: float = 0.95  # limiter=quantile: mask tokens whose d_t exceeds this quantile of the d_t in their target
    # Importance weights towards the teacher's distribution of Eq. 3. In mode prefix, the product of T factors of up to
    # c grows with c^T; with c = 1, as in V-trace, no prefix weighs more than 1.
    kl_correction: Correction = field(default_factory=lambda: Correction(mode="none", bound=1.0))

    # The weights that teach. self: the present ones (Eq. 3); ema: their running average; snapshot: a copy of them,
    # renewed every teacher_every steps; frozen: those at the start of the run; behaviour, sgpo only: those that sampled
    # the rollout, known by the likeliest tokens that the engine reported, which needs neither a copy of the weights nor
    # another forward pass
    teacher: Literal["self", "ema", "snapshot", "frozen", "behaviour"] = "frozen"
    teacher_decay: float = 0.99  # ema: the fraction of the average that each step keeps
    teacher_every: int = 20  # snapshot: steps between two copies
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"  # of the copy; ema needs float32
    # Below 1, the student is drawn to a sharper distribution than the teacher's: softmax(logits / teacher_temperature),
    # both at the sampling temperature. A teacher that errs as it samples, but seldom in what it prefers, errs less so.
    teacher_temperature: float = 1.0
    teacher_top_k: int = 16  # behaviour: tokens with known probabilities; all other tokens are merged into one outcome

    # sgpo: alpha(q), the weight of distillation
    weight: Literal["adaptive", "fixed", "group-advantage"] = "adaptive"  # Eq. 6, the constant `alpha`, or Eq. 8
    alpha: float = 1.0  # weight=fixed; the weight of distillation in opsd, sdpo, kdrl and pi-distill
    alpha0: float = 1.0  # the paper: 0.5
    gamma: float = 0.1  # in Eq. 6, which is alpha0 (p_guide - p_auto + gamma) / (p_auto + gamma), up to alpha_max
    alpha_max: float = 1.6  # the paper: 0.8
    # Pass rates in Eq. 6: observed means over the rollouts, or means corrected to the present weights, which needs one
    # more forward pass.
    pass_rates: Literal["observed", "corrected"] = "observed"
    guide_gate: float = 0.0  # a problem is distilled only if its observed guided pass rate is at least this

    # opsd, kdrl: the autonomous rollouts that are distilled: all, the wrong ones, or those with a positive advantage
    distilled: Literal["all", "wrong", "advantage"] = "all"
    # sgpo, opsd, sdpo, kdrl: tokens at the start of a completion that are not distilled, where a teacher may speak of
    # its context; SDFT: 3
    distil_skip: int = 0
    rlsd: Rlsd = field(default_factory=Rlsd)
    rlcsd: Rlcsd = field(default_factory=Rlcsd)
    iw_gamma: float = 0.5  # iw-opd: the first token weighs 1 + iw_gamma, the last one nearly 1
    luffy_gamma: float = 0.1  # luffy: a token of the demonstration has the weight f(p) = p / (p + luffy_gamma)
    hpt_gate: int = 0  # hpt: with at most this many correct autonomous rollouts, train on the demonstration instead

    def __post_init__(self) -> None:
        for name in ("delta", "gamma", "eps_low", "eps_high", "luffy_gamma", "kl_clip", "teacher_temperature"):
            require(getattr(self, name) > 0, f"algorithm.{name}", "must be > 0", getattr(self, name))
        for name in ("alpha", "alpha0", "alpha_max", "hpt_gate", "reference_kl", "distil_skip", "iw_gamma"):
            require(getattr(self, name) >= 0, f"algorithm.{name}", "must be >= 0", getattr(self, name))
        for name in ("guide_gate", "quantile", "teacher_decay"):
            require(0 <= getattr(self, name) <= 1, f"algorithm.{name}", "must be in [0, 1]", getattr(self, name))
        for name in ("teacher_every", "teacher_top_k"):
            require(getattr(self, name) >= 1, f"algorithm.{name}", "must be >= 1", getattr(self, name))
        self._check_corrections()
        require(
            self.policy_gradient or self.objective in ("sgpo", "pi-distill"),
            "algorithm.policy_gradient",
            f"must be true with algorithm.objective={self.objective}: only sgpo and pi-distill can train without it",
            self.policy_gradient,
        )
        self._check_divergence()
        require(
            self.reference_kl == 0 or self.has_policy_gradient,
            "algorithm.reference_kl",
            f"must be 0 with algorithm.objective={self.objective} without a policy gradient, to which it is added",
            self.reference_kl,
        )
        self._check_context()
        require(
            self.pass_rates == "observed" or (self.objective == "sgpo" and self.weight == "adaptive"),
            "algorithm.pass_rates",
            "must be observed unless algorithm.objective=sgpo and algorithm.weight=adaptive, where Eq. 6 uses them",
            self.pass_rates,
        )
        self._check_teacher()

    def _check_corrections(self) -> None:
        """Check mode and bound of the importance weights of both terms."""
        for name in ("grpo_correction", "kl_correction"):
            correction: Correction = getattr(self, name)
            require(correction.bound >= 1, f"algorithm.{name}.bound", "must be >= 1", correction.bound)
            require(
                correction.mode not in BANDS or correction.bound > 1,
                f"algorithm.{name}.bound",
                f"must be > 1 with mode {correction.mode}, which masks every ratio outside [1/bound, bound] and "
                "would mask nearly all at 1",
                correction.bound,
            )
        require(
            self.grpo_correction.mode != CLIP or self.grpo_correction.bound > 1,
            "algorithm.grpo_correction.bound",
            "must be > 1 with mode clip, which would clip every negative advantage at the ratio 1",
            self.grpo_correction.bound,
        )
        require(
            self.kl_correction.mode != CLIP,
            "algorithm.kl_correction.mode",
            "must not be clip, which needs advantages: it is a mode of algorithm.grpo_correction",
            self.kl_correction.mode,
        )

    def _check_divergence(self) -> None:
        """Check that `kl_clip` fits divergence, teacher and objective."""
        require(
            self.kl_clip == math.inf or self.divergence == "forward",
            "algorithm.kl_clip",
            f"must be .inf with algorithm.divergence={self.divergence}: it bounds the terms of the forward KL",
            self.kl_clip,
        )
        require(
            self.kl_clip == math.inf or (self.teacher != "behaviour" and self.objective != "pi-distill"),
            "algorithm.kl_clip",
            "must be .inf with algorithm.teacher=behaviour, of which only the likeliest tokens are known, and with "
            "algorithm.objective=pi-distill, which has the reverse KL, too",
            self.kl_clip,
        )

    def _check_teacher(self) -> None:
        """Check the keys of the weights that teach and of their distribution."""
        require(
            self.teacher_temperature == 1 or (self.teacher != "behaviour" and self.kl_correction.mode == "none"),
            "algorithm.teacher_temperature",
            "must be 1 with algorithm.teacher=behaviour, of which only the likeliest tokens are known, and unless "
            "algorithm.kl_correction.mode=none, whose importance ratios are those of the teacher as it samples",
            self.teacher_temperature,
        )
        require(
            self.teacher != "ema" or self.teacher_dtype == "float32",
            "algorithm.teacher_dtype",
            "must be float32 with algorithm.teacher=ema: bfloat16 would round away what a step adds to the average",
            self.teacher_dtype,
        )

    def _check_context(self) -> None:
        """Check the keys of objectives whose teacher reads autonomous rollouts with a context."""
        name = self.objective
        if not self.reads_in_context and name != "pi-distill":
            return
        require(
            self.teacher != "behaviour",
            "algorithm.teacher",
            f"must not be behaviour with algorithm.objective={name}: engines report likely tokens for sgpo alone",
            self.teacher,
        )
        require(
            self.teacher == "self" or name != "pi-distill",
            "algorithm.teacher",
            "must be self with algorithm.objective=pi-distill, which trains teacher and student in the same weights",
            self.teacher,
        )
        require(
            self.divergence != "sft" or name in CREDITED,
            "algorithm.divergence",
            f"must not be sft with algorithm.objective={name}: it does not compare with the teacher",
            self.divergence,
        )
        require(
            self.kl_correction.mode == "none",
            "algorithm.kl_correction.mode",
            f"must be none with algorithm.objective={name}: it corrects towards the teacher, for guided rollouts",
            self.kl_correction.mode,
        )
        require(
            self.grpo_correction.mode != "none" or name != "pi-distill",
            "algorithm.grpo_correction.mode",
            "must not be none with algorithm.objective=pi-distill, whose student learns from the teacher's rollouts by "
            "the ratio of the two",
            self.grpo_correction.mode,
        )
        require(
            self.alpha <= 1 or name != "sdpo",
            "algorithm.alpha",
            "must be <= 1 with algorithm.objective=sdpo, where 1 - alpha is the weight of GRPO",
            self.alpha,
        )

    @property
    def copies_teacher(self) -> bool:
        """Whether the learner keeps a copy of the weights as the teacher."""
        return self.asks_teacher and self.teacher not in ("self", "behaviour")

    @property
    def copies_reference(self) -> bool:
        """Whether the learner keeps a second copy of the weights, those at the start of the run."""
        return self.reference_kl > 0 and not (self.copies_teacher and self.teacher == "frozen")

    @property
    def top_logprobs_num(self) -> int:
        """How many likely tokens the engine reports for each token of a guided rollout."""
        return self.teacher_top_k if self.compares_with_teacher and self.teacher == "behaviour" else 0

    @property
    def compares_with_teacher(self) -> bool:
        """Whether the loss compares the student's distributions with a teacher's."""
        return self.objective in DISTILLED or (self.objective in ("sgpo", "pi-distill") and self.divergence != "sft")

    @property
    def has_policy_gradient(self) -> bool:
        """Whether some rollouts are trained by a policy gradient."""
        if self.objective == "sgpo":
            return self.policy_gradient
        return self.objective not in ("sft", "opsd") and (self.objective != "sdpo" or self.alpha < 1)

    @property
    def reads_in_context(self) -> bool:
        """Whether a teacher reads autonomous rollouts after a prompt with a context."""
        return self.objective in DISTILLED + CREDITED

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher runs at all: for its distributions, or for its probabilities of the sampled tokens."""
        return self.compares_with_teacher or self.objective in CREDITED

    @property
    def needs_responses(self) -> bool:
        """Whether the objective trains on the problems' own responses."""
        return self.objective in ("sft", "luffy", "hpt")


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

    # Problems with responses, in a form of tasks.path; default: tasks.path without held-out problems.
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
