"""Advantages of single tokens, where a teacher with a context says what earned the reward.

`test_learner_objectives` compares them with the papers' equations inside of whole losses.
"""

from __future__ import annotations

import pytest
import torch

from sgpo_async.algorithm import iw_opd_advantages, rlcsd_advantages, rlcsd_shift, rlsd_advantages

LOG_PI = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -2.0, -0.5]], dtype=torch.float64)
LOG_P = torch.tensor([[-0.9, -4.0, -0.5], [-0.9, -4.0, -0.5]], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)
ALL = torch.ones(2, 3, dtype=torch.bool)


def rlcsd(
    advantages: torch.Tensor, evidence: torch.Tensor, mask: torch.Tensor = ALL, weight: float = 1.0
) -> torch.Tensor:
    return rlcsd_advantages(
        advantages, rlcsd_shift(evidence, scale=0.5, tau=1.0), mask, threshold=0.1, selected_weight=weight
    )


def test_rlsd_rewards_what_the_context_makes_likely_and_blames_what_it_makes_unlikely() -> None:
    found = rlsd_advantages(ADVANTAGES, LOG_P, LOG_PI, clip=0.2, weight=1.0)
    likely = torch.tensor(0.1).double().exp()
    torch.testing.assert_close(
        found[0], 2 * torch.stack([likely, torch.tensor(0.8).double(), torch.tensor(1.0).double()])
    )
    torch.testing.assert_close(
        found[1], -torch.stack([1 / likely, torch.tensor(1.2).double(), torch.tensor(1.0).double()])
    )


def test_rlsd_without_weight_is_grpo_and_never_turns_an_advantage() -> None:
    plain = ADVANTAGES[:, None].expand(2, 3)
    torch.testing.assert_close(rlsd_advantages(ADVANTAGES, LOG_P, LOG_PI, clip=0.2, weight=0.0), plain)
    assert (rlsd_advantages(ADVANTAGES, 9 * LOG_P, LOG_PI, clip=0.9, weight=1.0).sign() == plain.sign()).all()


def test_rlcsd_shifts_only_tokens_with_evidence_and_each_part_keeps_its_mean() -> None:
    evidence = torch.tensor([[2.0, 0.0, 0.05], [2.0, 0.0, 0.05]], dtype=torch.float64)
    shift = 0.5 * torch.tensor(2.0).double().tanh()
    found = rlcsd(ADVANTAGES, evidence)
    torch.testing.assert_close(found[0], torch.stack([3 * (2 + shift), 1.5 * ADVANTAGES[0], 1.5 * ADVANTAGES[0]]))
    torch.testing.assert_close(found[1], torch.stack([3 * (-1 + shift), 1.5 * ADVANTAGES[1], 1.5 * ADVANTAGES[1]]))
    torch.testing.assert_close(rlcsd(ADVANTAGES, evidence, weight=2.0)[:, 0], 2 * found[:, 0])


def test_rlcsd_turns_no_advantage_and_leaves_0_at_0() -> None:
    evidence = torch.full((3, 3), 5.0, dtype=torch.float64) * torch.tensor([[-1.0], [1.0], [1.0]])
    small = torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64)
    assert torch.equal(rlcsd(small, evidence, torch.ones(3, 3, dtype=torch.bool)), torch.zeros(3, 3).double())


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_iw_opd_weighs_the_first_token_most(gamma: float) -> None:
    found = iw_opd_advantages(LOG_P, LOG_PI, ALL, gamma=gamma)[0]
    ratios = (LOG_P - LOG_PI)[0]
    drift = 2.1  # 0.1 and 2.0
    expected = ratios * torch.tensor([1 + gamma, 1 + gamma * (1 - 0.1 / drift), 1.0])
    torch.testing.assert_close(found, expected.double(), atol=1e-7, rtol=0)


def test_the_padding_changes_nothing_and_equal_policies_teach_nothing() -> None:
    mask = torch.tensor([[True, True, False], [True, True, False]])
    noisy = LOG_P.clone()
    noisy[:, 2] = 50.0
    first = iw_opd_advantages(noisy, LOG_PI, mask, gamma=0.5)[:, :2]
    torch.testing.assert_close(first, iw_opd_advantages(LOG_P[:, :2], LOG_PI[:, :2], mask[:, :2], gamma=0.5))
    torch.testing.assert_close(rlcsd(ADVANTAGES, noisy, mask)[:, :2], rlcsd(ADVANTAGES, LOG_P[:, :2], mask[:, :2]))
    assert torch.equal(iw_opd_advantages(LOG_PI, LOG_PI, ALL, gamma=0.5), torch.zeros(2, 3).double())
