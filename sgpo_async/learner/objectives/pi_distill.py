"""pi-Distill: teacher and student are the same weights, with and without the context, and learn from guided rollouts.

Source: https://arxiv.org/abs/2602.04942, from its authors' page and the losses of their code. With o ~ p(.|q,c):

    J_T = E[ R ] - alpha KL( p || sg[pi] )                the teacher learns what works, and stays near the student
    J_S = E[ (pi/sg[p]) R ] - alpha KL( sg[p] || pi )     the student learns it from the teacher's rollouts
    L = -(J_T + J_S)/2

R is the advantage within the guided group, the ratio is bounded for each token (`grpo_correction`), both KLs are sums
over the vocabulary, averaged over tokens, and alpha is the paper's beta (0.1 to 0.5).
"""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import Distillation, PolicyGradient, TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo


def pi_distill(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train each guided rollout after both prompts, with weight 1/(2 P G2), and the autonomous ones like GRPO."""
    pairs, plain = group.with_advantages(algorithm, guided=True), group.plain_prompt
    weight = 1 / (2 * group.problems * max(len(group.guided), 1))
    teacher = [PolicyGradient(rollout, advantage, weight) for rollout, advantage in pairs]
    student = [PolicyGradient(rollout, advantage, weight, prompt=plain) for rollout, advantage in pairs]
    return Trained(
        policy_gradient=[
            *(grpo(group, algorithm).policy_gradient if algorithm.policy_gradient else []),
            *teacher,
            *student,
        ],
        distillation=_both_ways(group, algorithm.alpha * weight) if algorithm.alpha else [],
        metrics={"alpha": algorithm.alpha if pairs else 0.0},
    )


def _both_ways(group: TaskGroup, weight: float) -> list[Distillation]:
    plain = group.plain_prompt
    counted = group.counted_of(group.guided)
    to_student = [Distillation(own, own.prompt, plain, weight, "reverse") for own in counted]
    to_teacher = [Distillation(own, plain, own.prompt, weight, "forward") for own in counted]
    return to_student + to_teacher
