"""The section `algorithm` of the configuration: what is learned from a batch (docs/algorithm.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from sgpo_async.config.rules import INFINITE, require

CorrectionMode = Literal["none", "token", "token-mask", "prefix", "sequence", "sequence-geometric", "clip"]
CLIP = "clip"  # of the policy gradient: PPO with the behaviour policy as its old policy
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

    The default is sharp SGPO: the paper's SGPO (arXiv 2606.24064) with a frozen teacher whose distribution is
    sharpened, without masking, without distillation of the first token, and with twice the paper's alpha. Loading
    builtin:paper after a configuration restores the paper's setting. Keys of features that are switched off are
    ignored: without distillation the teacher's keys, with `divergence=sft` the limiter's.
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
    # sgpo: the correct guided rollout that is likeliest without the strategy (Eq. 4), or the mean over all (Eq. 2)
    target: Literal["reachable", "all"] = "reachable"
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
    teacher_temperature: float = 0.5
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
    # its context; SDFT: 3; 0 if completions may begin with their answer
    distil_skip: int = 1
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
            "must be true unless algorithm.objective=sgpo or pi-distill, which can train without it",
            self.policy_gradient,
        )
        self._check_divergence()
        require(
            self.reference_kl == 0 or self.has_policy_gradient,
            "algorithm.reference_kl",
            "must be 0 unless the objective has a policy gradient, to which it is added",
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
            "must be .inf unless algorithm.divergence=forward, whose terms it bounds",
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
            self.teacher_temperature == 1
            or not self.compares_with_teacher
            or (self.teacher != "behaviour" and self.kl_correction.mode == "none"),
            "algorithm.teacher_temperature",
            "must be 1 with algorithm.teacher=behaviour, of which only the likeliest tokens are known, and with "
            "algorithm.kl_correction.mode other than none, whose ratios are those of the teacher as it samples",
            self.teacher_temperature,
            "add algorithm.teacher_temperature=1",
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
    def unguided_scores(self) -> bool:
        """Whether actors score correct guided rollouts without their strategy: Eq. 4 takes the likeliest of them."""
        return self.objective == "sgpo" and self.target == "reachable"

    @property
    def needs_responses(self) -> bool:
        """Whether the objective trains on the problems' own responses."""
        return self.objective in ("sft", "luffy", "hpt")
