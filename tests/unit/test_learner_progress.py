"""The learning-rate schedule, and the progress, summary and evaluation rounds of a run."""

import math
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgpo_async.config.schema import Optim, Run
from sgpo_async.evaluation.compare import compare_folders
from sgpo_async.learner.optimiser import learning_rate
from sgpo_async.learner.progress import Progress
from sgpo_async.learner.rounds import remove_rounds, write_round
from sgpo_async.learner.train import Trainer
from sgpo_async.metrics.problems import ProblemResult, summarise
from sgpo_async.wire.records import BenchmarkScore, Evaluated

STATUS = {
    "version": 9,
    "actors": [{}, {}],
    "tokens_generated": 100,
    "engine_idle": 0.25,
    "ledger": {"dispatched": 1},
    "evaluations": [],
    "leases_reissued": 0,
    "rejected": 0,
    "duplicates": 0,
}


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("constant", lambda _: 1.0),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_the_schedule(schedule: str, shape: object) -> None:
    optim = Optim(lr=0.5, warmup_steps=4, schedule=schedule)
    rates = [learning_rate(optim, step=step, steps=12) for step in range(12)]
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5]
    assert rates[4:] == pytest.approx([0.5 * shape(i / 8) for i in range(8)])


def test_progress_accumulates_and_survives_a_checkpoint() -> None:
    progress = Progress()
    progress.trained({"tokens": 12, "lag_histogram": {"0": 6, "2": 4}, "lag_max": 2}, idle_s=1, wall_s=4)
    assert progress.evaluated([]) == {}
    assert (
        progress.evaluated(
            [
                Evaluated(
                    version=0, pass_auto=0.1, pass_guided=0.9, problems=5, served_oldest=0, served_newest=0, lag=0.0
                )
            ]
        )["eval_version"]
        == 0
    )
    progress = Progress(**progress.plain())
    progress.trained({"tokens": 30, "lag_histogram": {"1": 30}, "lag_max": 1}, idle_s=1, wall_s=4)
    progress.evaluated(
        [Evaluated(version=2, pass_auto=0.8, pass_guided=1.0, problems=5, served_oldest=2, served_newest=2, lag=0.0)]
    )
    summary = progress.summary(STATUS)
    assert (summary["steps"], summary["tokens_trained"], summary["lag_max"]) == (2, 42, 2)
    assert summary["lag_mean"] == (4 * 2 + 30) / 40  # over sampled tokens: the other two tokens are of a demonstration
    assert summary["learner_idle"] == 0.25
    assert (summary["pass_auto_first"], summary["pass_auto_last"], summary["pass_guided_last"]) == (0.1, 0.8, 1.0)
    assert summary["pass_guided_first"] == 0.9
    assert (summary["actors"], summary["weight_version"]) == (2, 9)


def test_a_run_without_steps_has_a_summary() -> None:
    summary = Progress().summary(STATUS)
    assert summary["lag_mean"] == summary["learner_idle"] == 0


def round_of(version: int, *solved: int) -> Evaluated:
    """A round with two benchmarks: one with `solved` of 4 samples correct per problem, and one without results."""
    results = [
        ProblemResult(
            id=str(number),
            digest=f"d{number}",
            correct=[sample < count for sample in range(4)],
            tokens=[7] * 4,
            finish=["stop"] * 4,
            timed_out=[],
        )
        for number, count in enumerate(solved)
    ]
    found = summarise(results)
    fields = {"name": "sums", "samples": 4, "problems": len(results), "pass_at": found["pass"]}
    none = BenchmarkScore(name="long", avg=None, low=None, high=None, samples=4, problems=0)
    avg = {"avg": found["avg"]["mean"], "low": found["avg"]["low"], "high": found["avg"]["high"]}
    score = BenchmarkScore(**fields, **avg, results={result.id: asdict(result) for result in results})
    return Evaluated(
        version=version,
        pass_auto=0.0,
        pass_guided=0.0,
        problems=1,
        served_oldest=version,
        served_newest=version + 1,
        lag=0.0,
        benchmarks=(score, none),
    )


def test_metrics_contain_pass_at_k_but_not_the_results_of_problems() -> None:
    sums = Progress().evaluated([round_of(0, 0, 2, 4)])["eval_benchmarks"]["sums"]
    assert sums["avg"] == 0.5
    assert {k: rate["mean"] for k, rate in sums["pass_at"].items()} == pytest.approx(
        {"1": 0.5, "2": 11 / 18, "4": 2 / 3}
    )
    assert "results" not in sums


def test_rounds_of_a_run_can_be_compared_like_evaluations(tmp_path: Path) -> None:
    run = Run(out=str(tmp_path))
    for evaluated in (round_of(0, 0, 2, 4), round_of(8, 2, 4, 4)):
        write_round(run, evaluated)
    rounds = tmp_path / "run" / "benchmarks"
    found = compare_folders(rounds / "8", rounds / "0")
    assert found.differences == [f"model: {run.folder}, versions 8 to 9, {run.folder}, versions 0 to 1"]
    assert list(found.benchmarks) == ["sums"]
    sums = found.benchmarks["sums"]
    assert (sums.avg_a, sums.avg_b, sums.paired.better, sums.paired.worse) == (pytest.approx(10 / 12), 0.5, 2, 0)
    assert (sums.k, sums.pass_a, sums.pass_b) == (4, 1.0, pytest.approx(2 / 3))
    remove_rounds(run)
    assert not list(rounds.iterdir())


def test_rounds_of_an_abandoned_attempt_are_removed(tmp_path: Path) -> None:
    """Versions are compared as numbers, not as text: 12 is above 9."""
    run = Run(out=str(tmp_path))
    remove_rounds(run, above=9)  # the folder does not exist yet
    for version in (0, 8, 9, 12, 100):
        write_round(run, round_of(version, 0, 2, 4))
    remove_rounds(run, above=9)
    assert {folder.name for folder in (tmp_path / "run" / "benchmarks").iterdir()} == {"0", "8", "9"}


def test_a_round_that_arrives_before_the_hub_state_is_written_before_the_checkpoint(tmp_path: Path) -> None:
    """The hub keeps no per-problem results after sending them; a learner that is killed now would lose them."""
    evaluations: deque[Evaluated] = deque()

    def snapshot(step: int) -> bytes:
        evaluations.append(round_of(8, 0, 2, 4))
        return f"at {step}".encode()

    hub: Any = SimpleNamespace(evaluations=evaluations, snapshot=snapshot)
    unused: Any = None
    run = Run(out=str(tmp_path))
    parts = {"metrics": None, "alarm": unused, "samples": unused, "step_log": unused}
    trainer = Trainer(run, hub, unused, unused, unused, Progress(step=9), unused, base=0, **parts)
    assert trainer._hub_state() == b"at 9"
    assert (tmp_path / "run" / "benchmarks" / "8" / "summary.json").exists()
    assert len(evaluations) == 1, "the metrics of the next step must still report this round"
