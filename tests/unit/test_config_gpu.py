"""The configurations for GPUs have the paper's constants and meet requirements that the schema does not check."""

from pathlib import Path

import pytest

from sgpo_async.config import Run, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["paper-qwen2.5-1.5b", "paper-qwen2.5-7b", "paper-llama3.1-8b"])
def run(request: pytest.FixtureRequest) -> Run:
    run = load(ROOT / "configs" / f"{request.param}.yaml")
    assert run.name == request.param
    return run


def test_the_constants_are_those_of_the_paper(run: Run) -> None:
    sft = run.sft
    assert (sft.epochs, sft.batch, sft.lr, sft.warmup_ratio, sft.validation_share) == (10, 64, 1e-5, 0.1, 0.1)
    assert (run.evaluation.temperature, run.evaluation.top_p) == (0.6, 0.95)
    assert (run.rollout.autonomous, run.rollout.guided, run.rollout.temperature) == (8, 4, 1.0)
    assert (run.optim.lr, run.learner.problems_per_step, run.steps) == (1e-6, 128, 430)
    assert (run.model.dtype, run.rollout.top_p) == ("bfloat16", 0.95)


def test_a_prompt_and_the_longest_completion_fit_into_one_row(run: Run) -> None:
    prompt_tokens = 1000
    assert run.learner.row_tokens >= run.rollout.max_new_tokens + prompt_tokens
    assert run.learner.row_tokens >= run.sft.max_tokens  # prompt and response together


def test_the_run_uses_exactly_eight_gpus(run: Run) -> None:
    assert run.local.ranks + run.local.actors * run.engine.sglang.servers * run.engine.sglang.tp == 8
