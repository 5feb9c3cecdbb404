"""The configurations for GPUs: the paper's constants, and what does not follow from a rule of the schema."""

from pathlib import Path

import pytest

from sgpo_async.config import Algorithm, Run, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["qwen2.5-1.5b", "qwen2.5-7b"])
def run(request: pytest.FixtureRequest) -> Run:
    return load(ROOT / "configs" / f"{request.param}.yaml")


def test_the_constants_are_the_papers(run: Run) -> None:
    assert run.algorithm == Algorithm()  # whose values are the paper's: test_config_load
    assert (run.rollout.autonomous, run.rollout.guided, run.rollout.temperature) == (8, 4, 1.0)
    assert (run.optim.lr, run.learner.problems_per_step, run.steps) == (1e-6, 128, 430)
    assert (run.model.dtype, run.rollout.top_p) == ("bfloat16", 1.0)


def test_eight_gpus_are_enough_and_none_is_left_over(run: Run) -> None:
    assert run.local.ranks + run.local.actors * run.engine.sglang.servers * run.engine.sglang.tp == 8
