"""One problem with its rollouts and models, and what the reference losses of all objectives share."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sgpo_async.config.schema import Algorithm, Correction, Run
from sgpo_async.wire.records import Rollout
from tests.reference import sgpo
from tests.reference.learner_cases import log_probs

ADVANTAGES = {"std": sgpo.advantages, "mean": sgpo.maxrl_advantages, "none": sgpo.centred_rewards}


@dataclass(frozen=True)
class Problem:
    """One problem with its rollouts, and the three models from which its loss is computed."""

    model: PreTrainedModel
    at: PreTrainedModel
    teacher: PreTrainedModel
    start: PreTrainedModel | None
    run: Run
    autonomous: list[Rollout]
    guided: list[Rollout]
    response: np.ndarray | None

    @property
    def rule(self) -> Algorithm:
        return self.run.algorithm

    @property
    def plain(self) -> np.ndarray:
        return self.autonomous[0].prompt

    def all_log_probs(self, model: PreTrainedModel, prompt: np.ndarray, tokens: np.ndarray) -> Tensor:
        return log_probs(model, prompt, tokens, self.run.rollout.temperature)

    def teaches(self, prompt: np.ndarray, tokens: np.ndarray) -> Tensor:
        """[T, V], log of the distribution that the student is drawn to: p^(1/tau) of the teacher, normalised."""
        p = self.all_log_probs(self.teacher, prompt, tokens).detach().exp() ** (1 / self.rule.teacher_temperature)
        return (p / p.sum(-1, keepdim=True)).log()

    def log_pi(self, model: PreTrainedModel, prompt: np.ndarray, tokens: np.ndarray) -> Tensor:
        return self.all_log_probs(model, prompt, tokens)[range(len(tokens)), tokens.tolist()]

    def sampled_log_pi(self, model: PreTrainedModel, rollout: Rollout) -> Tensor:
        """[T], log pi of a rollout's tokens under the distribution they were sampled from: over what was kept."""
        log_pi = self.all_log_probs(model, rollout.prompt, rollout.tokens)
        own = log_pi[range(len(rollout.tokens)), rollout.tokens.tolist()]
        if rollout.kept is None or rollout.kept_sizes is None:
            return own
        kept, start = [], 0
        for token, size in zip(rollout.tokens.tolist(), rollout.kept_sizes.tolist(), strict=True):
            kept.append([token, *rollout.kept[start : start + size].tolist()])
            start += size
        return own - torch.stack([row[ids].exp().sum().log() for row, ids in zip(log_pi, kept, strict=True)])

    def advantages(self, rollouts: list[Rollout]) -> list[float]:
        """Eq. 1, or an alternative, within this group."""
        return [float(a) for a in ADVANTAGES[self.rule.advantage](np.array([[r.reward for r in rollouts]]))[0]]

    def drift(self, rollout: Rollout) -> Tensor:
        """The weighted mean over tokens of c_t (log pi - log pi_0)^2 / 2."""
        if self.start is None:
            return torch.zeros((), dtype=torch.float64)
        own = sampled(rollout)
        log_pi = self.sampled_log_pi(self.model, rollout)[own]
        log_0 = self.sampled_log_pi(self.start, rollout).detach()[own]
        rule = self.rule.grpo_correction
        rule = replace(rule, mode="token") if rule.mode == "clip" else rule
        c = correction(self.sampled_log_pi(self.at, rollout)[own], rollout, rule)
        return self.rule.reference_kl * (c * (log_pi - log_0) ** 2 / 2).mean()

    def surrogate(self, rollout: Rollout, advantage: float | Tensor, prompt: np.ndarray | None = None) -> Tensor:
        """[C], c_t times the clipped surrogate of Eq. 1 for the tokens that the policy sampled.

        `advantage` is that of the rollout, or of each token: [C]. `prompt` is by default that of the rollout.
        """
        rollout = rollout if prompt is None else replace(rollout, prompt=prompt)
        own = sampled(rollout)
        log_pi = self.sampled_log_pi(self.model, rollout)[own]
        log_prox = self.sampled_log_pi(self.at, rollout).detach()[own]
        low, high = 1 - self.rule.eps_low, 1 + self.rule.eps_high
        if self.rule.grpo_correction.mode == "clip":  # PPO: the old policy is the one that sampled
            ratio = (log_pi - torch.from_numpy(rollout.logprobs[own].astype(np.float64))).exp()
            least = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
            advantage = torch.as_tensor(advantage, dtype=torch.float64)
            most = torch.maximum(least, self.rule.grpo_correction.bound * advantage)
            return torch.where(advantage < 0, most, least)
        ratio = (log_pi - log_prox).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        return correction(log_prox, rollout, self.rule.grpo_correction) * clipped


def sampled(rollout: Rollout) -> list[int]:
    """The positions of the tokens that the policy sampled; an environment wrote the others."""
    spans = zip(rollout.versions.tolist(), [0, *rollout.ends.tolist()], rollout.ends.tolist(), strict=False)
    return [position for version, start, end in spans for position in range(start, end) if version >= 0]


def divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """The divergence between two distributions over the vocabulary."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    if kind == "forward":
        return (p * (log_p - log_q)).sum()
    if kind == "reverse":
        return (q * (log_q - log_p)).sum()
    return (p * (log_p - log_m)).sum() / 2 + (q * (log_q - log_m)).sum() / 2


def correction(log_pi: Tensor, rollout: Rollout, rule: Correction, places: list[int] | None = None) -> Tensor:
    """The weights of the tokens at `places`, by default of all that the policy sampled; `log_pi` is of these."""
    places = sampled(rollout) if places is None else places
    mu = [math.exp(x) for x in rollout.logprobs[places].astype(np.float64)]
    mask = np.ones(len(mu), bool)
    pi = log_pi.detach().exp().numpy()
    return torch.from_numpy(sgpo.correction_weights(pi, np.array(mu), mask, rule.mode, rule.bound))
