"""The loss of every objective, computed sequence by sequence with full logits and plain loops.

Transcribed from the papers: SGPO https://arxiv.org/abs/2606.24064, LUFFY https://arxiv.org/abs/2504.14945v1 (Eq. 4, 5),
HPT https://arxiv.org/abs/2509.04419. Quantities under a stop-gradient, sg[.], are computed with the model `at`, so that
the loss can be differentiated both by autograd and by finite differences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sgpo_async.config.schema import Algorithm, Correction, Run
from sgpo_async.wire.records import Rollout
from tests.reference import sgpo
from tests.reference.learner_cases import log_probs

Responses = Callable[[int], np.ndarray | None]


def reference_loss(
    model: PreTrainedModel,
    groups: list[list[Rollout]],
    run: Run,
    *,
    teacher: PreTrainedModel | None = None,
    responses: Responses = lambda _: None,
    at: PreTrainedModel | None = None,
) -> Tensor:
    """The mean over problems of the objective's loss."""
    at = at or model
    losses = []
    for group in groups:
        autonomous, guided = ([r for r in group if r.guided == flag] for flag in (False, True))
        problem = Problem(model, at, teacher or at, run, autonomous, guided, responses(group[0].task))
        losses.append(OBJECTIVES[run.algorithm.objective](problem))
    return torch.stack(losses).sum() / len(groups)


@dataclass(frozen=True)
class Problem:
    """One problem with its rollouts, and the three models from which its loss is computed."""

    model: PreTrainedModel
    at: PreTrainedModel
    teacher: PreTrainedModel
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

    def surrogate(self, rollout: Rollout, advantage: float) -> Tensor:
        """[C], c_t times the clipped surrogate of Eq. 1 for the tokens that the policy sampled."""
        own = sampled(rollout)
        log_pi = self.sampled_log_pi(self.model, rollout)[own]
        log_prox = self.sampled_log_pi(self.at, rollout).detach()[own]
        ratio = (log_pi - log_prox).exp()
        low, high = 1 - self.rule.eps_low, 1 + self.rule.eps_high
        clipped = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        return correction(log_prox, rollout, self.rule.grpo_correction) * clipped


def sampled(rollout: Rollout) -> list[int]:
    """The positions of the tokens that the policy sampled; an environment wrote the others."""
    spans = zip(rollout.versions.tolist(), [0, *rollout.ends.tolist()], rollout.ends.tolist(), strict=False)
    return [position for version, start, end in spans for position in range(start, end) if version >= 0]


ADVANTAGES = {"std": sgpo.advantages, "mean": sgpo.maxrl_advantages, "none": sgpo.centred_rewards}


def grpo(problem: Problem) -> Tensor:
    rewards = np.array([[r.reward for r in problem.autonomous]])
    advantages = ADVANTAGES[problem.rule.advantage](rewards)[0]
    total = torch.zeros((), dtype=torch.float64)
    for rollout, advantage in zip(problem.autonomous, advantages, strict=True):
        total = total - problem.surrogate(rollout, float(advantage)).mean()
    return total / len(problem.autonomous)


def sft(problem: Problem) -> Tensor:
    if problem.response is None:
        return torch.zeros((), dtype=torch.float64)
    return -problem.log_pi(problem.model, problem.plain, problem.response).mean()


def luffy(problem: Problem) -> Tensor:
    if problem.response is None:
        return grpo(problem)
    rewards = np.array([[*(r.reward for r in problem.autonomous), 1.0]])
    *advantages, response_advantage = sgpo.advantages(rewards)[0]
    p = problem.log_pi(problem.model, problem.plain, problem.response).exp()
    total = (p / (p + problem.rule.luffy_gamma) * response_advantage).sum()
    for rollout, advantage in zip(problem.autonomous, advantages, strict=True):
        total = total + problem.surrogate(rollout, float(advantage)).sum()
    return -total / (len(problem.response) + sum(len(sampled(r)) for r in problem.autonomous))


def hpt(problem: Problem) -> Tensor:
    correct = sum(r.reward == 1 for r in problem.autonomous)
    return sft(problem) if problem.response is not None and correct <= problem.rule.hpt_gate else grpo(problem)


def sgpo_(problem: Problem) -> Tensor:
    rule = problem.rule
    loss = grpo(problem) if rule.policy_gradient else torch.zeros((), dtype=torch.float64)
    successes = [r for r in problem.guided if r.reward == 1]
    if not successes or len(successes) / len(problem.guided) < rule.guide_gate:
        return loss
    if rule.target == "reachable":
        successes = [max(successes, key=lambda r: r.unguided_logprob)]
    losses = [likelihood(problem, o) if rule.divergence == "sft" else distillation(problem, o) for o in successes]
    return loss + alpha(problem) * torch.stack(losses).mean()


OBJECTIVES: dict[str, Callable[[Problem], Tensor]] = {
    "sgpo": sgpo_,
    "grpo": grpo,
    "sft": sft,
    "luffy": luffy,
    "hpt": hpt,
}


def likelihood(problem: Problem, target: Rollout) -> Tensor:
    return -problem.log_pi(problem.model, problem.plain, target.tokens)[sampled(target)].mean()


def distillation(problem: Problem, target: Rollout) -> Tensor:
    """Eq. 5 with the divergence and the clipping (`limiter`) of the run."""
    rule, own = problem.rule, sampled(target)
    log_p = problem.all_log_probs(problem.teacher, target.prompt, target.tokens).detach()
    log_q, log_q_at = (problem.all_log_probs(m, problem.plain, target.tokens) for m in (problem.model, problem.at))
    chosen = problem.sampled_log_pi(problem.teacher, target).detach()
    if rule.teacher == "behaviour":
        listed = target.top_tokens.reshape(len(target.tokens), -1).tolist()
        log_p = torch.from_numpy(reported(target))
        log_q, log_q_at = (merged(q, listed) for q in (log_q, log_q_at))
        chosen = torch.from_numpy(target.logprobs.astype(np.float64))
    log_p, log_q, log_q_at, chosen = (values[own] for values in (log_p, log_q, log_q_at, chosen))
    d = torch.stack([divergence(p, q, rule.divergence) for p, q in zip(log_p, log_q, strict=True)])
    values = np.array([divergence(p, q, rule.divergence).item() for p, q in zip(log_p, log_q_at.detach(), strict=True)])
    factors = sgpo.limited_gradient_factors(values, rule.limiter, rule.delta, rule.quantile)
    return (correction(chosen, target, rule.kl_correction) * torch.tensor(factors, dtype=torch.float64) * d).mean()


def reported(target: Rollout) -> np.ndarray:
    """The log-probabilities that the engine reported at each token and, last, that of all other tokens: [T, k + 1]."""
    known = [[math.exp(x) for x in row] for row in target.top_logprobs.reshape(len(target.tokens), -1).tolist()]
    return np.log(np.array([[*row, 1 - sum(row)] for row in known]))


def merged(log_q: Tensor, listed: list[list[int]]) -> Tensor:
    """The student's log-probabilities of the listed tokens and, last, of all other tokens together: [T, k + 1]."""
    rows = []
    for row, tokens in zip(log_q.exp(), listed, strict=True):
        others = sum(q for v, q in enumerate(row) if v not in tokens)
        rows.append(torch.stack([*(row[v] for v in tokens), others]).log())
    return torch.stack(rows)


def divergence(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """The divergence between two distributions over the vocabulary."""
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    if kind == "forward":
        return (p * (log_p - log_q)).sum()
    if kind == "reverse":
        return (q * (log_q - log_p)).sum()
    return (p * (log_p - log_m)).sum() / 2 + (q * (log_q - log_m)).sum() / 2


def alpha(problem: Problem) -> float:
    """alpha(q): Eq. 6, Eq. 8 or a constant."""
    rule, rewards = problem.rule, [[r.reward for r in part] for part in (problem.autonomous, problem.guided)]
    if rule.weight == "fixed":
        return rule.alpha
    if rule.weight == "group-advantage":
        return sgpo.group_advantage_weight(np.array(rewards[0]), rule.alpha_max)
    rates = [float(np.mean(part)) for part in rewards]
    if rule.pass_rates == "corrected":
        rates = corrected_rates(problem)
    return sgpo.adaptive_weight(*rates, rule.alpha0, rule.gamma, rule.alpha_max)


def corrected_rates(problem: Problem) -> list[float]:
    """The pass rates p_auto and p_guide under the model `at`."""
    rates = []
    for part in (problem.autonomous, problem.guided):
        log_pi = [problem.sampled_log_pi(problem.at, r)[sampled(r)].sum().item() for r in part]
        rho = [math.exp(x - float(r.logprobs.astype(np.float64).sum())) for x, r in zip(log_pi, part, strict=True)]
        rewards = np.array([r.reward for r in part])
        rates.append(sgpo.corrected_mean(rewards, np.array(rho), problem.rule.grpo_correction.bound))
    return rates


def correction(log_pi: Tensor, rollout: Rollout, rule: Correction) -> Tensor:
    mu = [math.exp(x) for x in rollout.logprobs[sampled(rollout)].astype(np.float64)]
    mask = np.ones(len(mu), bool)
    pi = log_pi.detach().exp().numpy()
    return torch.from_numpy(sgpo.correction_weights(pi, np.array(mu), mask, rule.mode, rule.bound))
