"""The losses of the methods near SGPO, sequence by sequence and token by token, from the papers' equations.

OPSD arXiv 2601.18734, SDFT 2601.19897, SDPO 2601.20802, KDRL 2506.02208, RLSD 2604.03128, RLCSD 2606.11709, IW-OPD
2606.22600, POPE 2601.18779, pi-Distill 2602.04942. The teacher's prompts are those of `learner_cases.contexts`.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sgpo_async.wire.records import Rollout
from tests.reference.learner_cases import contexts
from tests.reference.problem import Problem, divergence, sampled

ZERO = torch.zeros((), dtype=torch.float64)


def distances(problem: Problem, rollout: Rollout, student: np.ndarray, teacher: np.ndarray, kind: str) -> list[Tensor]:
    """The divergence at each token that the policy sampled, between the two prompts.

    Which terms of the forward KL are above `kl_clip` is decided by the model `at`, as what a limiter removes is.
    """
    log_q, log_q_at = (problem.all_log_probs(model, student, rollout.tokens) for model in (problem.model, problem.at))
    log_p = problem.teaches(teacher, rollout.tokens)
    clip, found = problem.rule.kl_clip, []
    for t in sampled(rollout):
        terms = log_p[t].exp() * (log_p[t] - log_q[t])
        within = (log_p[t].exp() * (log_p[t] - log_q_at[t])).detach() <= clip
        clipped = [term if keep else ZERO + clip for term, keep in zip(terms, within.tolist(), strict=True)]
        found.append(torch.stack(clipped).sum() if kind == "forward" else divergence(log_p[t], log_q[t], kind))
    return found


def on_own_rollouts(problem: Problem, chosen: list[Rollout]) -> Tensor:
    """The sum over the chosen rollouts of the mean divergence, divided by the size of the group."""
    total, known = ZERO, contexts(problem.autonomous)
    for rollout in chosen:
        d = (
            distances(problem, rollout, rollout.prompt, known[rollout.slot].right, problem.rule.divergence)
            if (rollout.slot in known)
            else []
        )
        places = sampled(rollout)
        d = [value for value, place in zip(d, places, strict=False) if place >= problem.rule.distil_skip]
        if d:
            total = total + torch.stack(d).mean()
    return total / len(problem.autonomous)


def opsd(problem: Problem) -> Tensor:
    chosen = problem.autonomous
    if problem.rule.distilled == "wrong":
        chosen = [r for r in chosen if r.reward < 1]
    if problem.rule.distilled == "advantage":
        pairs = zip(chosen, problem.advantages(chosen), strict=True)
        chosen = [rollout for rollout, advantage in pairs if advantage > 0]
    return problem.rule.alpha * on_own_rollouts(problem, chosen)


def sdpo(problem: Problem, grpo: Tensor) -> Tensor:
    alpha = problem.rule.alpha
    return (1 - alpha) * grpo + alpha * on_own_rollouts(problem, problem.autonomous)


def teacher_log_p(problem: Problem, rollout: Rollout, prompt: np.ndarray) -> list[float]:
    own = problem.sampled_log_pi(problem.teacher, replace(rollout, prompt=prompt))
    return [own[t].item() for t in sampled(rollout)]


def policy_log_p(problem: Problem, rollout: Rollout) -> list[float]:
    own = problem.sampled_log_pi(problem.at, rollout)
    return [own[t].item() for t in sampled(rollout)]


def by_tokens(problem: Problem, advantages: dict[int, list[float]], *, plain: bool) -> Tensor:
    """GRPO with an advantage for each token; a rollout without has its own (`plain`) or is left out."""
    total = ZERO
    for rollout, own in zip(problem.autonomous, problem.advantages(problem.autonomous), strict=True):
        found = advantages.get(rollout.slot)
        if found is not None:
            total = total - problem.surrogate(rollout, torch.tensor(found, dtype=torch.float64)).mean()
        elif plain:
            total = total - problem.surrogate(rollout, own).mean()
    return total / len(problem.autonomous)


def rlsd(problem: Problem) -> Tensor:
    """Eq. 15 with the mixture: A ((1 - lambda) + lambda clip(w_t)), w_t = (p/pi)^sign(A); lambda of the first step."""
    rule, found = problem.rule.rlsd, {}
    share = rule.weight
    pairs = zip(problem.autonomous, problem.advantages(problem.autonomous), strict=True)
    for rollout, a in pairs:
        context = contexts(problem.autonomous).get(rollout.slot)
        if context is None or a == 0:
            continue
        tokens = []
        for p, q in zip(teacher_log_p(problem, rollout, context.right), policy_log_p(problem, rollout), strict=True):
            w = math.exp(p) / math.exp(q) if a > 0 else math.exp(q) / math.exp(p)
            tokens.append(a * ((1 - share) + share * min(max(w, 1 - rule.clip), 1 + rule.clip)))
        found[rollout.slot] = tokens
    return by_tokens(problem, found, plain=True)


def rlcsd(problem: Problem) -> Tensor:
    rule, found = problem.rule.rlcsd, {}
    pairs = zip(problem.autonomous, problem.advantages(problem.autonomous), strict=True)
    for rollout, a in pairs:
        context = contexts(problem.autonomous).get(rollout.slot)
        if context is None or a == 0:
            continue
        right = teacher_log_p(problem, rollout, context.right)
        wrong = [teacher_log_p(problem, rollout, prompt) for prompt in context.wrong]
        shifts = []
        for t, p in enumerate(right):
            mean = sum(math.exp(w[t]) for w in wrong) / len(wrong)
            shifts.append(rule.scale * math.tanh((p - math.log(mean)) / rule.tau))
        selected = [t for t, r in enumerate(shifts) if abs(r) > rule.threshold]
        others = [t for t in range(len(shifts)) if t not in selected]
        tokens = [0.0] * len(shifts)
        for t in others:
            tokens[t] = a * len(shifts) / len(others)
        for t in selected:
            shifted = max(a + shifts[t], 0) if a > 0 else min(a + shifts[t], 0)
            tokens[t] = rule.weight * shifted * len(shifts) / len(selected)
        found[rollout.slot] = tokens
    return by_tokens(problem, found, plain=False)


def iw_opd(problem: Problem) -> Tensor:
    found = {}
    for rollout in problem.autonomous:
        context = contexts(problem.autonomous).get(rollout.slot)
        if context is None:
            continue
        p, q = teacher_log_p(problem, rollout, context.right), policy_log_p(problem, rollout)
        a = [x - y for x, y in zip(p, q, strict=True)]
        whole = sum(abs(x) for x in a) + 1e-8  # as in the authors' code
        found[rollout.slot] = [
            (1 + problem.rule.iw_gamma * (1 - sum(abs(x) for x in a[:t]) / whole)) * a[t] for t in range(len(a))
        ]
    return by_tokens(problem, found, plain=False)


def pope(problem: Problem) -> Tensor:
    total, count = ZERO, len(problem.autonomous) + len(problem.guided)
    for group in (problem.autonomous, problem.guided):
        for rollout, advantage in zip(group, problem.advantages(group), strict=True):
            total = total - problem.surrogate(rollout, advantage).mean()
    return total / count


def pi_distill(problem: Problem) -> Tensor:
    """-(J_T + J_S)/2 on the guided rollouts."""
    total, beta = ZERO, problem.rule.alpha
    for rollout, advantage in zip(problem.guided, problem.advantages(problem.guided), strict=True):
        j_teacher = problem.surrogate(rollout, advantage).mean()
        j_student = problem.surrogate(rollout, advantage, problem.plain).mean()
        to_student = distances(problem, rollout, rollout.prompt, problem.plain, "reverse")
        to_teacher = distances(problem, rollout, problem.plain, rollout.prompt, "forward")
        total = total - j_teacher + beta * torch.stack(to_student).mean()
        total = total - j_student + beta * torch.stack(to_teacher).mean()
    return total / 2 / len(problem.guided)
