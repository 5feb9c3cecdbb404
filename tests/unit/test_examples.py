"""examples/sgpo_in_one_file.py trains, and its loss equals the learner's."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sgpo_async.config.schema import Algorithm, Learner, Local, Run
from sgpo_async.learner.batch import from_shard
from sgpo_async.model.load import load_model
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.wire.records import Rollout, Shard
from tests.reference import learner_cases as cases

FILE = Path(__file__).parents[2] / "examples" / "sgpo_in_one_file.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sgpo_in_one_file", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_the_example_fits_in_200_lines() -> None:
    assert len(FILE.read_text().splitlines()) <= 200


def test_a_few_steps_train(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "PROBLEMS", 4)
    monkeypatch.setattr(example, "HELD_OUT", 8)
    first, second = example.train(2)
    assert first["guided"] == 1 and first["loss"] > 0
    assert second["loss"] != first["loss"]
    assert 0 <= second["held_out"] <= 1


@pytest.mark.usefixtures("one_rank")
def test_the_loss_of_the_example_equals_the_learner_s(example: ModuleType) -> None:
    """On the same rollouts; the learner packs, chunks and weights, and the example follows the equations literally."""
    problems = [CuesSource(seed=3, held_out=1).training(i) for i in range(3)]
    policy = load_model(example.FOLDER, device="cpu", dtype="float32")
    sampler = example.Sampler()
    sampler.load(policy, 0)
    with torch.no_grad():  # make the teacher differ from the policy, so that the KL comes not only from the strategy
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    teacher = load_model(example.FOLDER, device="cpu", dtype="float32")
    alone = sampler.roll_out(problems, 4, guided=False, seed=0)
    guided = sampler.roll_out(problems, 3, guided=True, seed=0)
    parts = [example.problem_losses(policy, teacher, *pair) for pair in zip(alone, guided, strict=True)]
    grpo, distillation, alpha, found = (torch.stack(each) for each in zip(*parts, strict=True))
    expected = example.sgpo_loss(grpo, distillation, alpha, found).item()

    rollouts = []
    for task, groups in enumerate(zip(alone, guided, strict=True)):
        for is_guided, group in zip((False, True), groups, strict=True):
            logits, mask = example.completion_logits(policy, alone[task].prompt, group.tokens)
            log_pi = example.token_logprobs(logits, group.tokens, mask).detach()
            for g, tokens in enumerate(group.tokens):
                correct = is_guided and bool(group.rewards[g])
                own = log_pi[g, : len(tokens)].numpy()
                rollouts.append(
                    Rollout(
                        task=task, attempt=0, slot=g + 4 * is_guided, purpose="train", guided=is_guided,
                        prompt=group.prompt, tokens=tokens, logprobs=own, versions=np.zeros(1, np.int32),
                        digests=np.zeros(1, np.int64),
                        ends=np.array([len(tokens)], np.int32), reward=float(group.rewards[g]), finish="stop",
                        unguided_logprob=float(own.sum()) if correct else None,
                    )
                )  # fmt: skip
    anchored = Algorithm(teacher_temperature=1.0, distil_skip=0)
    run = Run(algorithm=anchored, learner=Learner(problems_per_step=3, row_tokens=64), local=Local(ranks=1))
    stepper = cases.stepper(run, copy.deepcopy(policy), teacher)
    shard = Shard(step=0, version=0, problems=3, rollouts=tuple(rollouts))
    found_loss = stepper.accumulate(from_shard(shard, run.algorithm)).reduce()["loss"]
    assert found_loss == pytest.approx(expected, rel=1e-4) and expected > 0
