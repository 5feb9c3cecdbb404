"""Every objective and variant on one rank: loss and gradient compared with the papers' equations, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from sgpo_async.config.schema import Correction, Run
from sgpo_async.errors import ConfigError, DataError
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.train import build
from sgpo_async.wire.records import Rollout
from tests.reference import learner_cases as cases
from tests.reference import objectives as reference
from tests.reference import sgpo
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_rank")

OLDEST = 4  # the version of the weights is 5, and max_lag is 1
Found = tuple[dict[str, object], dict[str, Tensor]]


def gradients(run: Run, parts: list[list[Rollout]]) -> Found:
    """Metrics and gradient of one step."""
    stepper = cases.stepper(run, cases.tiny_model(), _teacher(run))
    metrics = stepper.accumulate(stepper.batch(cases.shard_of(parts, problems=len(parts)))).reduce()
    return metrics, {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}


def expected(run: Run, parts: list[list[Rollout]]) -> tuple[float, dict[str, Tensor]]:
    model = cases.tiny_model()
    loss = reference.reference_loss(
        model, parts, run, teacher=_teacher(run), responses=_responses(run), start=_start(run)
    )
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def _teacher(run: Run) -> object:
    return cases.tiny_model(seed=1) if run.algorithm.copies_teacher else None


def _start(run: Run) -> object:
    return cases.tiny_model(seed=cases.START) if run.algorithm.reference_kl else None


def _responses(run: Run) -> reference.Responses:
    return cases.demonstrations if run.algorithm.needs_responses else lambda _: None


def assert_equal(found: Found, expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0]["loss"] == pytest.approx(expected[0], abs=1e-10)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-10, rtol=1e-9)


def test_the_variants_cover_every_objective_and_differ_in_their_loss() -> None:
    assert {keys.get("objective", "sgpo") for keys in VARIANTS.values()} == OBJECTIVES.keys()
    losses = [expected(cases.settings(**keys), cases.groups(seed=4))[0] for keys in VARIANTS.values()]
    assert len({round(loss, 6) for loss in losses}) == len(VARIANTS)


@pytest.mark.parametrize("row_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_loss_and_gradient_equal_the_reference_without_packing(name: str, row_tokens: int) -> None:
    run, parts = cases.settings(row_tokens=row_tokens, **VARIANTS[name]), cases.groups(seed=4)
    reference_result = expected(run, parts)
    assert max(float(g.abs().max()) for g in reference_result[1].values()) > 1e-3
    assert_equal(gradients(run, parts), reference_result)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_equals_finite_differences_of_the_loss(name: str) -> None:
    """Differences along a random direction, with the stop-gradient quantities of the loss held constant."""
    run, parts = cases.settings(**VARIANTS[name]), cases.groups(seed=4)
    _, found = gradients(run, parts)
    base, generator = cases.tiny_model(), torch.Generator().manual_seed(5)
    shapes = {key: p.shape for key, p in base.named_parameters()}
    direction = {key: torch.randn(shape, dtype=torch.float64, generator=generator) for key, shape in shapes.items()}
    slope, width = 0.0, 5e-4
    for step, weight in ((2, -1), (1, 8), (-1, -8), (-2, 1)):  # exact for polynomials of degree 4
        model = cases.tiny_model()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter += step * width * direction[key]
            loss = reference.reference_loss(
                model, parts, run, teacher=_teacher(run), responses=_responses(run), at=base, start=_start(run)
            )
        slope += weight * loss.item() / (12 * width)
    assert slope == pytest.approx(sum(float((found[key] * direction[key]).sum()) for key in direction), abs=3e-4)


@pytest.mark.parametrize("name", ["sgpo", "reverse", "luffy", "sft"])
def test_the_losses_use_the_temperature_of_the_rollouts(name: str) -> None:
    run, parts = cases.settings(temperature=0.7, **VARIANTS[name]), cases.groups(seed=4)
    assert_equal(gradients(run, parts), expected(run, parts))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen-shannon", "sft"])
@pytest.mark.parametrize("keys", [{"alpha0": 0.0}, {"weight": "fixed", "alpha": 0.0}, {"guide_gate": 1.0}])
def test_alpha_0_gives_exactly_grpo(divergence: str, keys: dict[str, object]) -> None:
    """The results are equal bit for bit."""
    sgpo = gradients(cases.settings(divergence=divergence, **keys), cases.groups())
    grpo = gradients(cases.settings(objective="grpo"), cases.groups())
    assert sgpo[0]["loss"] == grpo[0]["loss"]
    assert (sgpo[0]["alpha"], sgpo[0]["targets"]) == (0, 0)
    assert all(torch.equal(gradient, grpo[1][name]) for name, gradient in sgpo[1].items())


@pytest.mark.parametrize("keys", [{"divergence": "sft"}, {"target": "all"}, {"weight": "fixed"}, {}])
def test_without_a_correct_guided_rollout_nothing_is_distilled(keys: dict[str, object]) -> None:
    failed = [[replace(r, reward=0.0, unguided_logprob=None) for r in group] for group in cases.groups()]
    for policy_gradient in (True, False):
        metrics, found = gradients(cases.settings(policy_gradient=policy_gradient, **keys), failed)
        assert (metrics["loss"], metrics["alpha"]) == (0, 0)
        assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())


@pytest.mark.parametrize("objective", ["luffy", "hpt"])
def test_without_demonstrations_luffy_and_hpt_are_exactly_grpo(objective: str) -> None:
    parts = [group for group in cases.groups() if cases.demonstrations(group[0].task) is None]
    assert len(parts) == 1
    found, grpo = (gradients(cases.settings(objective=name), parts) for name in (objective, "grpo"))
    assert found[0]["loss"] == grpo[0]["loss"]
    assert all(torch.equal(gradient, grpo[1][name]) for name, gradient in found[1].items())


def test_sft_without_demonstrations_trains_nothing() -> None:
    metrics, found = gradients(cases.settings(objective="sft"), cases.groups()[1:2])
    assert (metrics["loss"], metrics["tokens"]) == (0, 0)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())


def test_luffy_has_no_gradient_if_all_rollouts_are_correct() -> None:
    solved = [[replace(r, reward=1.0) for r in group if not r.guided] for group in cases.groups()]
    metrics, found = gradients(cases.settings(objective="luffy"), solved)
    assert metrics["likelihood_loss"] is None
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())


def test_the_guide_gate_removes_targets_of_problems_below_it() -> None:
    """In every group with a correct guided rollout, two of the three guided rollouts are correct."""
    targets = [gradients(cases.settings(guide_gate=gate), cases.groups())[0]["targets"] for gate in (0.0, 0.66, 0.67)]
    assert targets == [3, 3, 0]


def test_equation_4_requires_the_scores_of_its_possible_targets() -> None:
    """A checkpoint of a run with another objective or target may contain rollouts without scores."""
    bare = [[replace(r, unguided_logprob=None) for r in group] for group in cases.groups()]
    message = (
        r"^task \d: its correct guided rollouts must have the score that algorithm.target=reachable needs, got none; "
        r"resume with the algorithm.objective and algorithm.target of the run's start$"
    )
    with pytest.raises(DataError, match=message):
        gradients(cases.settings(), bare)
    assert gradients(cases.settings(target="all"), bare)[0]["targets"] > 3  # type: ignore[operator]


def test_the_behaviour_teacher_requires_top_k_tokens_in_its_rollouts() -> None:
    """A checkpoint of a run with another teacher may contain rollouts without these tokens."""
    bare = [[replace(r, top_tokens=None, top_logprobs=None) for r in group] for group in cases.groups()]
    message = (
        r"^task \d: its guided rollouts must have the {} most likely tokens at each position, got {}; "
        r"resume with the algorithm.teacher and algorithm.teacher_top_k of the run's start$"
    )
    with pytest.raises(DataError, match=message.format(3, 0)):
        gradients(cases.settings(teacher="behaviour"), bare)
    with pytest.raises(DataError, match=message.format(4, 3)):
        gradients(cases.settings(teacher="behaviour", teacher_top_k=4), cases.groups())


def test_teacher_top_k_above_the_size_of_the_vocabulary_is_rejected_at_the_start() -> None:
    run = cases.settings(teacher="behaviour", teacher_top_k=5000)
    with pytest.raises(
        ConfigError, match=r"algorithm\.teacher_top_k must be < \d+, the size of the vocabulary, got 5000"
    ):
        build(run, init_device_mesh("cpu", (1,)))


def test_the_behaviour_teacher_needs_no_forward_pass() -> None:
    metrics, _ = gradients(cases.settings(teacher="behaviour"), cases.groups())
    assert (metrics["targets"], metrics["tokens_forward_only"], metrics["kl_correction_mean"]) == (3, 0, 1)


def test_corrected_and_observed_pass_rates_are_equal_if_engine_and_learner_agree() -> None:
    model, parts = cases.tiny_model(), cases.groups(seed=4)
    with torch.no_grad():
        exact = [
            [
                replace(
                    r,
                    logprobs=cases.log_probs(model, r.prompt, r.tokens)[range(len(r.tokens)), r.tokens.tolist()]
                    .numpy()
                    .astype(np.float32),
                )
                for r in group
            ]
            for group in parts
        ]
    observed, corrected = (gradients(cases.settings(pass_rates=rates), exact)[0] for rates in ("observed", "corrected"))
    assert corrected["alpha"] == pytest.approx(observed["alpha"], abs=1e-6)
    assert corrected["alpha_observed"] == observed["alpha"]
    assert corrected["p_auto_corrected"] == pytest.approx(np.mean([0.25, 0.5, 0.25, 0.0]), abs=1e-6)
    assert (observed["alpha_observed"], observed["p_auto_corrected"]) == (None, None)


def test_the_metrics_of_corrected_pass_rates_equal_plain_loops() -> None:
    keys = {"pass_rates": "corrected", "grpo_correction": Correction(mode="token", bound=4.0)}
    run, parts = cases.settings(**keys), cases.groups(seed=4)
    metrics, _ = gradients(run, parts)
    model = cases.tiny_model()
    rates, alphas, observed = [], [], []
    for group in parts:
        own, guided = ([r for r in group if r.guided == flag] for flag in (False, True))
        problem = reference.Problem(model, model, model, None, run, own, guided, None)
        rates.append(reference.corrected_rates(problem))
        found = any(r.reward for r in guided)
        alphas.append(reference.alpha(problem) * found)
        plain = replace(run, algorithm=replace(run.algorithm, pass_rates="observed"))
        observed.append(reference.alpha(replace(problem, run=plain)) * found)
    assert metrics["alpha"] == pytest.approx(np.mean(alphas))
    assert metrics["alpha_observed"] == pytest.approx(np.mean(observed))
    assert np.mean(alphas) != pytest.approx(np.mean(observed), rel=1e-3)
    assert [metrics["p_auto_corrected"], metrics["p_guide_corrected"]] == pytest.approx(np.mean(rates, axis=0))


@pytest.mark.parametrize("limiter", ["mask", "clamp", "smooth", "quantile", "none"])
def test_the_kl_that_the_limiter_removes_is_reported(limiter: str) -> None:
    run, parts = cases.settings(limiter=limiter, delta=0.5, quantile=0.6), cases.groups(seed=4)
    metrics, _ = gradients(run, parts)
    model, divergences, kept = cases.tiny_model(), [], []
    for group in parts:
        targets = [r for r in group if r.unguided_logprob is not None]
        if not targets:
            continue
        target = max(targets, key=lambda r: r.unguided_logprob)
        log_p, log_q = (cases.log_probs(model, p, target.tokens).detach() for p in (target.prompt, group[0].prompt))
        d = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        divergences += list(d)
        kept += sgpo.limited(d, limiter, 0.5, 0.6)
    above = [x for x in divergences if x > 0.5]
    assert metrics["kl_mean"] == pytest.approx(np.mean(divergences))
    assert metrics["kl_masked_fraction"] == pytest.approx(len(above) / len(divergences))
    assert metrics["kl_masked_mass"] == pytest.approx(sum(above) / sum(divergences))
    assert metrics["kl_limited_mass"] == pytest.approx(1 - sum(kept) / sum(divergences), abs=1e-12)


def test_tokens_of_forward_passes_without_gradient_are_counted() -> None:
    parts = cases.groups()
    all_tokens = sum(len(r.prompt) + len(r.tokens) - 1 for group in parts for r in group)
    guided = [r for group in parts for r in group if r.guided and r.reward]
    default, corrected, grpo = (
        gradients(cases.settings(target="all", delta=2.0, **keys), parts)[0]["tokens_forward_only"]
        for keys in ({}, {"pass_rates": "corrected"}, {"objective": "grpo"})
    )
    assert default == sum(len(r.prompt) + len(r.tokens) - 1 for r in guided)
    assert (corrected, grpo) == (default + all_tokens, 0)


def cut(parts: list[list[Rollout]], slot: int) -> list[list[Rollout]]:
    """The same groups; max_new_tokens has cut the rollout in this slot."""
    return [
        [replace(r, finish="length", unguided_logprob=None) if r.slot == slot else r for r in group] for group in parts
    ]


def test_masked_completions_count_neither_by_tokens_nor_by_reward() -> None:
    """Three of four rollouts are left, each with the weight 1/(P G1) that it had."""
    run, parts = cases.settings(objective="grpo"), cases.groups()
    masking = replace(run, rollout=replace(run.rollout, cut="mask"))
    loss, wanted = expected(run, [[r for r in group if r.slot != 1] for group in parts])
    assert_equal(
        gradients(masking, cut(parts, 1)), (0.75 * loss, {name: 0.75 * slope for name, slope in wanted.items()})
    )
    assert_equal(gradients(run, cut(parts, 1)), expected(run, parts))


def test_a_group_whose_completions_are_all_masked_is_not_trained() -> None:
    run = cases.settings(objective="grpo")
    masking = replace(run, rollout=replace(run.rollout, cut="mask"))
    parts = cases.groups()
    for slot in range(4):
        parts = cut(parts, slot)
    metrics, found = gradients(masking, parts)
    assert metrics["loss"] == 0 and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("target", ["reachable", "all"])
def test_a_guided_completion_that_was_cut_is_never_distilled(target: str) -> None:
    """Even if the verifier has found its answer: another one is the target, or none."""
    run, parts = cases.settings(target=target), cases.groups()
    found = gradients(run, cut(parts, 4))
    wrong = [[replace(r, reward=0.0, unguided_logprob=None) if r.slot == 4 else r for r in group] for group in parts]
    fewer = gradients(replace(run, algorithm=replace(run.algorithm, weight="fixed")), cut(parts, 4))
    assert_equal(fewer, expected(replace(run, algorithm=replace(run.algorithm, weight="fixed")), wrong))
    assert found[0]["targets"] == fewer[0]["targets"] > 0


def test_masked_stale_tokens_leave_the_weights_of_the_others_as_they_are() -> None:
    """Eq. 1: the sum over the fresh tokens of a rollout is divided by the number of all of its tokens."""
    run = cases.settings(objective="grpo", grpo_correction=Correction(mode="token", bound=1.5))
    masking = replace(run, hub=replace(run.hub, max_lag=1, stale="mask"))
    parts, model = cases.spread(cases.groups(seed=2), seed=3), cases.tiny_model()
    losses, stale = [], 0
    for group in parts:
        own = [r for r in group if not r.guided]
        for rollout, advantage in zip(own, sgpo.advantages(np.array([[r.reward for r in own]]))[0], strict=True):
            log_pi = cases.log_probs(model, rollout.prompt, rollout.tokens)
            for t, token in enumerate(rollout.tokens):
                if rollout.token_versions()[t] >= OLDEST:
                    weight = min(float((log_pi[t, token].detach() - rollout.logprobs[t]).exp()), 1.5)
                    losses.append(-weight * advantage * log_pi[t, token] / len(rollout.tokens) / 4 / len(parts))
        stale += sum(int((r.token_versions() < OLDEST).sum()) for r in own)
    torch.stack(losses).sum().backward()
    metrics, found = gradients(masking, parts)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-10, rtol=1e-9)
    assert metrics["tokens_stale"] == stale > 0 and metrics["lag_max"] == 1


def test_stale_tokens_are_not_distilled_if_they_are_masked() -> None:
    """Eq. 5: as above, with d_t of all tokens known from a step that masks nothing."""
    run = cases.settings(limiter="none", kl_correction=Correction(mode="none", bound=1.0))
    masking = replace(run, hub=replace(run.hub, max_lag=1, stale="mask"))
    parts = cases.spread(cases.groups(seed=2), seed=3)
    whole = cases.stepper(run, cases.tiny_model())
    statistics = whole.accumulate(whole.batch(cases.shard_of(parts, problems=4)))
    alpha = {group[0].task: own["alpha"] for group, own in zip(parts, statistics.problems, strict=True)}
    expected, targets = 0.0, 0
    for rollout, d, _ in statistics.distilled:
        task = rollout.task
        fresh = torch.from_numpy(rollout.token_versions() >= OLDEST)
        expected += alpha[task] * float(d[fresh].sum()) / len(d) / 4
        targets += bool(fresh.any())
    found, _ = gradients(masking, parts)
    assert (found["kd_loss"], found["targets"]) == (pytest.approx(expected), targets)
    corrected = gradients(replace(masking, hub=replace(run.hub, max_lag=1, stale="correct")), parts)[0]
    assert corrected["kd_loss"] == pytest.approx(statistics.reduce()["kd_loss"]) and corrected["tokens_stale"] == 0
