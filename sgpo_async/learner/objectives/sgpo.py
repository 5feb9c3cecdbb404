"""SGPO: GRPO on the autonomous rollouts, and distillation of correct guided rollouts (Eq. 7 of arXiv 2606.24064).

    target k:   plain prompt + o+  (student)      weight alpha(q)/P, or alpha(q)/(P n) of each of n targets
                guided prompt + o+ (teacher)      no gradient

With alpha(q) = 0 this is exactly GRPO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgpo_async.algorithm import (
    adaptive_weight,
    corrected_pass_rate,
    group_advantage_weight,
    select_reachable,
)
from sgpo_async.config.schema import Algorithm
from sgpo_async.errors import DataError
from sgpo_async.learner.objectives.base import Distillation, Likelihood, TaskGroup, Trained, rollout_after
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.wire.records import Rollout


def sgpo(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train the autonomous rollouts like GRPO, unless this is disabled, and the targets with weights from alpha(q)."""
    targets = _targets(group, algorithm)
    metrics = _metrics(group, algorithm, found=bool(targets)) if group.guided else {"alpha": 0.0}
    weight = metrics["alpha"] / group.problems / max(len(targets), 1)
    cut = (target.without_first(algorithm.distil_skip) for target in targets if weight)
    targets = [target for target in cut if target.sampled.any()]
    plain = group.plain_prompt
    as_text = algorithm.divergence == "sft"
    return Trained(
        policy_gradient=grpo(group, algorithm).policy_gradient if algorithm.policy_gradient else [],
        distillation=[] if as_text else [Distillation(target, plain, target.prompt, weight) for target in targets],
        likelihood=[Likelihood(rollout_after(plain, target), weight) for target in targets] if as_text else [],
        metrics=metrics,
    )


def _targets(group: TaskGroup, algorithm: Algorithm) -> list[Rollout]:
    """Select the reachable o+ (Eq. 4) or all correct guided rollouts (Eq. 2); none below `guide_gate`."""
    if not group.guided or group.correct(guided=True).mean() < algorithm.guide_gate:
        return []
    if algorithm.target == "all":
        return [rollout for rollout in group.guided if rollout.may_be_distilled]
    possible = torch.tensor([[rollout.may_be_distilled for rollout in group.guided]])
    sums = torch.tensor([[_score(rollout) for rollout in group.guided]], dtype=torch.float64)
    index, found = select_reachable(sums, possible)
    return [group.guided[int(index)]] if found else []


def _score(rollout: Rollout) -> float:
    """The summed log-probability after the plain prompt. Raises DataError if a possible target has none."""
    if rollout.unguided_logprob is None and rollout.may_be_distilled:
        raise DataError(
            f"task {rollout.task}: its correct guided rollouts must have the score that algorithm.target=reachable "
            "needs, got none; resume with the algorithm.objective and algorithm.target of the run's start"
        )
    return rollout.unguided_logprob or 0.0


def _metrics(group: TaskGroup, algorithm: Algorithm, *, found: bool) -> dict[str, float]:
    """Compute the PROBLEM_METRICS of this problem; alpha(q) is 0 unless a target was found."""
    observed = _alpha(group, algorithm) if found else 0.0
    if group.log_rho is None:
        return {"alpha": observed}
    p_auto, p_guide = (_corrected(group, guided, algorithm) for guided in (False, True))
    return {
        "alpha": _adaptive(p_auto, p_guide, algorithm) if found else 0.0,
        "alpha_observed": observed,
        "p_auto_corrected": float(p_auto),
        "p_guide_corrected": float(p_guide),
    }


def _alpha(group: TaskGroup, algorithm: Algorithm) -> float:
    """Compute alpha(q) by the rule `algorithm.weight`, from which rollouts are correct."""
    correct = group.correct(guided=False)
    if algorithm.weight == "fixed":
        return algorithm.alpha
    if algorithm.weight == "group-advantage":
        return float(group_advantage_weight(correct, alpha_max=algorithm.alpha_max))
    return _adaptive(correct.mean(-1), group.correct(guided=True).mean(-1), algorithm)


def _adaptive(p_auto: Tensor, p_guide: Tensor, algorithm: Algorithm) -> float:
    alpha0, gamma, alpha_max = algorithm.alpha0, algorithm.gamma, algorithm.alpha_max
    return float(adaptive_weight(p_auto, p_guide, alpha0=alpha0, gamma=gamma, alpha_max=alpha_max))


def _corrected(group: TaskGroup, guided: bool, algorithm: Algorithm) -> Tensor:
    """Estimate the pass rate under the current weights, with the bound of `grpo_correction` on each ratio: [1]."""
    assert group.log_rho is not None
    rollouts = group.guided if guided else group.autonomous
    log_rho = torch.tensor([[group.log_rho[rollout.slot] for rollout in rollouts]], dtype=torch.float64)
    return corrected_pass_rate(group.correct(guided=guided), log_rho, bound=algorithm.grpo_correction.bound)
