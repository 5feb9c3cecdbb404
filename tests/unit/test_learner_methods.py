"""Every method of configs/methods with the built-in policy, its tokenizer and real contexts, on one rank."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from sgpo_async.config import builtin_names, load
from sgpo_async.config.schema import Run
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.train import build
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sources import source_of
from sgpo_async.wire.records import Rollout, Shard
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")

METHODS = [name for name in builtin_names() if name.startswith("builtin:methods/")]
PROBLEMS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(model_folder("builtin:cues"))


def run_of(name: str) -> Run:
    return load("builtin:demo", [name, "learner.problems_per_step=2", "learner.precision=float32"])


def stepper_of(run: Run) -> Stepper:
    return build(run, init_device_mesh("cpu", (1,)))[0]


def shard_of(run: Run, tokenizer: Any) -> Shard:
    """Groups of rollouts which are responses of other problems; every second one is correct."""
    source, sizes = source_of(run), run.rollout
    responses = source_of(replace(run, tasks=replace(run.tasks, context="strategy")))
    template = cases.groups()[0][0]
    rollouts = []
    for task in range(PROBLEMS):
        problem = source.training(task)
        for slot in range(sizes.size):
            guided = slot >= sizes.autonomous
            text = problem.strategy if guided else None
            words = responses.training(task + slot + 1).response
            tokens = np.array([*tokenizer.encode(words), tokenizer.eos_token_id], np.int32)
            rollout = replace(
                template,
                task=task,
                slot=slot,
                guided=guided,
                prompt=np.array(build_prompt(problem.problem, text, tasks=run.tasks, tokenizer=tokenizer), np.int32),
                tokens=tokens,
                logprobs=np.full(len(tokens), -1.0, np.float32),
                versions=np.array([5], np.int32),
                digests=np.zeros(1, np.int64),
                ends=np.array([len(tokens)], np.int32),
                reward=float(slot % 2),
            )
            rollouts.append(rollout)
    return Shard(step=5, version=5, problems=PROBLEMS, rollouts=tuple(rollouts))


def gradient(stepper: Stepper, shard: Shard) -> tuple[dict[str, Any], torch.Tensor]:
    metrics = stepper.accumulate(stepper.batch(shard)).reduce()
    return metrics, torch.cat([p.grad.full_tensor().flatten() for p in stepper.policy.parameters()])


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_every_method_has_a_loss_and_a_gradient_of_its_own(name: str, tokenizer: Any) -> None:
    run = run_of(name)
    metrics, found = gradient(stepper_of(run), shard_of(run, tokenizer))
    assert math.isfinite(metrics["loss"]) and torch.isfinite(found).all() and found.abs().max() > 0
    algorithm = run.algorithm
    assert (metrics["targets"] > 0) == (algorithm.objective in ("opsd", "sdpo", "kdrl", "pi-distill"))
    assert (metrics["alpha"] > 0) == (metrics["targets"] > 0)
    asked = algorithm.asks_teacher or algorithm.reference_kl > 0
    assert (metrics["tokens_forward_only"] > 0) == asked
    if algorithm.objective == "grpo":
        return
    plain_algorithm = replace(algorithm, objective="grpo", reference_kl=0.0, policy_gradient=True)
    grpo = replace(run, algorithm=plain_algorithm, tasks=replace(run.tasks, context="strategy"))
    _, plain = gradient(stepper_of(grpo), shard_of(run, tokenizer))
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-9)


def test_a_frozen_teacher_that_is_the_policy_without_context_teaches_nothing(tokenizer: Any) -> None:
    """At the start of a run, teacher and policy are the same weights: without a context all divergences are 0."""
    run = load("builtin:demo", ["builtin:methods/opsd", "tasks.context=none", "learner.problems_per_step=2"])
    metrics, found = gradient(stepper_of(run), shard_of(run, tokenizer))
    assert abs(metrics["loss"]) < 1e-6 and found.abs().max() < 1e-4


def test_the_reference_is_a_copy_of_its_own_unless_the_teacher_is_frozen(tokenizer: Any) -> None:
    run = run_of("builtin:methods/sdpg")
    assert run.copies_reference and not run.copies_teacher
    stepper = stepper_of(run)
    assert stepper.reference is not None and stepper.reference is not stepper.teacher
    frozen = replace(run, algorithm=replace(run.algorithm, teacher="frozen"))
    assert frozen.copies_teacher and not frozen.copies_reference
    stepper = stepper_of(frozen)
    assert stepper.reference is stepper.teacher


def test_the_kl_to_the_start_is_0_at_the_start_and_pulls_back_after_steps(tokenizer: Any) -> None:
    """All rewards are equal, so nothing but the KL to the start has a gradient."""
    words = ["builtin:methods/maxrl", "algorithm.reference_kl=1.0", "learner.problems_per_step=2"]
    run = load("builtin:demo", [*words, "learner.precision=float32"])
    stepper, shard = stepper_of(run), shard_of(run, tokenizer)
    shard = replace(shard, rollouts=tuple(replace(r, reward=0.0) for r in shard.rollouts))
    metrics, found = gradient(stepper, shard)
    assert metrics["loss"] == pytest.approx(0, abs=1e-9) and found.abs().max() < 1e-6
    stepper.optimiser.zero_grad()
    with torch.no_grad():
        for parameter in stepper.policy.parameters():
            parameter.mul_(1.3)
    before = gradient(stepper, shard)[0]["loss"]
    assert before > 1e-4
    stepper.optimiser.zero_grad()
    losses = [stepper.update(replace(shard, step=step))["loss"] for step in range(20, 30)]
    assert losses[-1] < 0.8 * losses[0]


def rollouts_by_slot(shard: Shard) -> dict[tuple[int, int], Rollout]:
    return {(r.task, r.slot): r for r in shard.rollouts}


def test_rlsd_moves_the_weight_of_tokens_but_not_the_direction_of_a_rollout(tokenizer: Any) -> None:
    run = run_of("builtin:methods/rlsd")
    stepper, shard = stepper_of(run), shard_of(run, tokenizer)
    batch = stepper.batch(shard)
    own = rollouts_by_slot(shard)
    for item in batch.sequences.policy_gradient:
        assert item.context is None and item.evidence is not None
        assert len(item.evidence) == len(own[item.rollout.task, item.rollout.slot].tokens)
        assert (item.evidence <= 0).all() and item.evidence.any()


def test_the_weight_of_rlsd_follows_the_steps_of_the_run_and_not_the_versions(tokenizer: Any) -> None:
    """A resumed run repeats steps, but never a version."""
    run = run_of("builtin:methods/rlsd")
    shard = shard_of(run, tokenizer)
    late = replace(shard, step=run.algorithm.rlsd.steps)
    grpo = replace(
        run, algorithm=replace(run.algorithm, objective="grpo"), tasks=replace(run.tasks, context="strategy")
    )
    plain = gradient(stepper_of(grpo), shard)[1]
    torch.testing.assert_close(gradient(stepper_of(run), late)[1], plain, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(gradient(stepper_of(run), shard)[1], plain, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["opsd", "sdpo", "kdrl", "iw-opd", "pi-distill", "rlsd", "pope"])
def test_with_cut_mask_a_completion_that_was_cut_counts_nowhere(name: str, tokenizer: Any) -> None:
    words = [f"builtin:methods/{name}", "learner.problems_per_step=2", "rollout.cut=mask", "learner.skip_uniform=false"]
    run = load("builtin:demo", words)
    shard = shard_of(run, tokenizer)
    cut = {r.slot for r in shard.rollouts} - {0, 1, 2, 3}
    shard = replace(
        shard, rollouts=tuple(replace(r, finish="length" if r.slot in cut else "stop") for r in shard.rollouts)
    )
    items = stepper_of(run).batch(shard).sequences.items
    assert items and not {item.rollout.slot for item in items} & cut


@pytest.mark.parametrize("name", ["opsd", "kdrl", "iw-opd", "pi-distill", "rlsd", "rlcsd", "sdpg"])
def test_with_stale_mask_only_fresh_tokens_are_trained(name: str, tokenizer: Any) -> None:
    """Every rollout begins with three stale tokens."""
    words = [f"builtin:methods/{name}", "learner.problems_per_step=2", "hub.stale=mask", "hub.max_lag=1"]
    run = load("builtin:demo", words)
    shard = shard_of(run, tokenizer)
    spans = {
        "versions": np.array([2, 5], np.int32),
        "digests": np.zeros(2, np.int64),
    }
    rollouts = tuple(replace(r, **spans, ends=np.array([3, len(r.tokens)], np.int32)) for r in shard.rollouts)
    metrics, found = gradient(stepper_of(run), replace(shard, rollouts=rollouts))
    trained = {(r.task, r.slot) for r in rollouts if r.guided or name != "pi-distill"}
    assert torch.isfinite(found).all() and found.abs().max() > 0
    assert 0 < metrics["tokens_stale"] <= 3 * len(trained)


def test_of_each_prompt_whose_rollouts_have_equal_rewards_one_is_trained(tokenizer: Any) -> None:
    """Those of the guided prompt differ, so all of them are."""
    run = run_of("builtin:methods/pope")
    shard = shard_of(run, tokenizer)
    rollouts = tuple(r if r.guided else replace(r, reward=0.0) for r in shard.rollouts)
    items = stepper_of(run).batch(replace(shard, rollouts=rollouts)).sequences.policy_gradient
    plain = [item for item in items if not item.rollout.guided]
    assert [item.stands_for for item in plain] == [run.rollout.autonomous] * PROBLEMS
    assert len(items) - len(plain) == PROBLEMS * run.rollout.guided


@pytest.mark.parametrize("name", ["rlsd", "iw-opd", "pi-distill", "sdpg"])
def test_a_batch_in_two_parts_has_the_gradient_of_the_whole(name: str, tokenizer: Any) -> None:
    run = run_of(f"builtin:methods/{name}")
    shard = shard_of(run, tokenizer)
    whole = gradient(stepper_of(run), shard)[1]
    stepper = stepper_of(run)
    for task in range(PROBLEMS):
        part = replace(shard, rollouts=tuple(r for r in shard.rollouts if r.task == task))
        stepper.accumulate(stepper.batch(part), last=task == PROBLEMS - 1)
    parts = torch.cat([p.grad.full_tensor().flatten() for p in stepper.policy.parameters()])
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-7)
