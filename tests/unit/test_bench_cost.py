"""The cost estimate, compared with values computed by hand."""

from pathlib import Path

import pytest

from sgpo_async.bench.cost import Assumptions, estimate, main
from sgpo_async.config import Run, load

RECIPE = str(Path(__file__).resolve().parents[2] / "configs" / "paper-qwen2.5-7b.yaml")
DIVISION = ["local.ranks=6", "engine.sglang.servers=2"]
SMALL = [*DIVISION, "steps=10", "learner.problems_per_step=6", "tasks.held_out=5", "evaluation={every: 4, samples: 3}"]


def assumptions(**changes: object) -> Assumptions:
    return Assumptions(
        **{  # type: ignore[arg-type]
            "generate_tokens_per_s": 100.0, "train_tokens_per_s": 50.0, "completion_tokens": 20.0,
            "prompt_tokens": 10.0, "strategy_tokens": 30.0, "response_tokens": 50.0,
            "sft_problems": 7, "sft_validation": 3,
            "benchmarks": {"a": (4, 2), "b": (1, 5)},
        } | changes
    )  # fmt: skip


def run(*overrides: str) -> Run:
    """A short run of the recipe, with six learner ranks and two servers."""
    return load(RECIPE, [*SMALL, *overrides])


def test_every_stage_costs_what_is_computed_by_hand() -> None:
    warm_up, rl, evaluation = estimate(run(), assumptions())
    assert warm_up.trained == pytest.approx(10 * (7 * 60 + 3 * 60 / 3))  # 10 epochs, prompt and response are 60 tokens
    assert warm_up.seconds == pytest.approx(4800 / 300)
    assert warm_up.gpu_hours == pytest.approx(16 * 6 / 3600)
    assert rl.generated == 60 * 12 * 20 + 4 * 5 * 3 * 2 * 20  # evaluation at steps 0, 4, 8 and 10
    assert rl.trained == pytest.approx(60 * (8 * 30 + 30 + 60 / 3))
    assert rl.seconds == pytest.approx(max(16800 / 200, 17400 / 300))
    assert rl.gpus == 8
    assert evaluation.generated == (4 * 2 + 1 * 5) * 20
    assert (evaluation.seconds, evaluation.gpus) == (pytest.approx(260 / 200), 2)


def test_a_synchronous_run_adds_the_times_that_an_asynchronous_run_overlaps() -> None:
    _, asynchronous, _ = estimate(run(), assumptions())
    _, synchronous, _ = estimate(run("hub.max_lag=0"), assumptions())
    assert (asynchronous.seconds, synchronous.seconds) == (pytest.approx(84), pytest.approx(84 + 58))
    _, slow_learner, _ = estimate(run(), assumptions(train_tokens_per_s=5.0))
    assert slow_learner.seconds == pytest.approx(580)


@pytest.mark.parametrize(
    ("overrides", "per_problem"),
    [
        (["algorithm.objective=grpo"], 8 * 30),
        (["algorithm.policy_gradient=false"], 30 + 60 / 3),
        (["algorithm.target=all"], 8 * 30 + 4 * (30 + 60 / 3)),
        (["algorithm.divergence=sft"], 8 * 30 + 30),
        (["algorithm.pass_rates=corrected"], 8 * 30 + 30 + 60 / 3 + (8 * 30 + 4 * 60) / 3),
    ],
)
def test_variants_train_different_numbers_of_tokens(overrides: list[str], per_problem: float) -> None:
    assert estimate(run(*overrides), assumptions())[1].trained == pytest.approx(60 * per_problem)


def test_without_targets_only_the_tokens_of_the_policy_gradient_are_trained() -> None:
    assert estimate(run(), assumptions(target_share=0.0))[1].trained == pytest.approx(60 * 240)


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--generate-tokens-per-s", "6000", "--train-tokens-per-s", "8000", "--completion-tokens", "1000"]
    assert main([RECIPE, *DIVISION, *rates, "--benchmark", "AIME24=30x32"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["generated", "warm-up", "RL", "evaluation", "all"]
    parts = [float(line[-1]) for line in lines[1:4]]
    assert float(lines[4][-1]) == pytest.approx(sum(parts), abs=0.2)
    assert parts[1] == pytest.approx(8 * (430 * 128 * 12 + 23 * 200 * 2) * 1000 / (2 * 6000) / 3600, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-tokens-per-s", "0"], "--train-tokens-per-s must be > 0, got 0.0"),
        (["--target-share", "2"], "--target-share must be in [0, 1], got 2.0"),
        (["--benchmark", "AIME24"], "--benchmark 'AIME24': looks like NAME=PROBLEMSxK, e.g. AIME24=30x32"),
        (
            ["algorithm.objective=luffy"],
            "algorithm.objective must be sgpo or grpo: the cost of other objectives is not modelled, got",
        ),
    ],
)
def test_an_error_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--generate-tokens-per-s", "1", "--train-tokens-per-s", "1", "--completion-tokens", "1"]
    assert main([RECIPE, *DIVISION, *rates, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
