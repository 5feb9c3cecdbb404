"""`sgpo-async advise`: from a configuration, and from what a run has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sgpo_async.cli.main import main
from sgpo_async.config import load, to_yaml
from sgpo_async.simulation import EngineRates, LearnerRates, Lengths, Settings
from sgpo_async.simulation.advice import best, changes, divisions
from sgpo_async.simulation.calibrate import from_run
from sgpo_async.simulation.hardware import QWEN_7B, Hardware, engine_rates, learner_rates
from sgpo_async.simulation.predict import predict


def test_a_configuration_gets_predictions_without_starting_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "builtin:paper-qwen2.5-7b", "--gpus", "8", "16", "--no-simulation"]) == 0
    text = capsys.readouterr().out
    assert "4 learner ranks, 4 inference nodes of 56 slots, hub.max_lag=2: limited by generation" in text
    assert "one more inference node" in text and "16 GPUs: the best division for each lag" in text
    assert "simulated 0" not in text


def test_the_options_of_a_configuration_are_refused_for_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(tmp_path), "--gpus", "8"]) == 2
    assert "--gpus and key=value are for a configuration" in capsys.readouterr().err


def run_folder(folder: Path, *, steps: int, idle: float) -> Path:
    """A run of 2 s a step, whose trainer waited for this share of the time."""
    run = load("configs/demo.yaml", [f"out={folder}", "name=run"])
    made = folder / "run"
    made.mkdir()
    (made / "config.yaml").write_text(to_yaml(run))
    lines = [
        {
            "step": step, "wall_s": 2.0 * step, "tokens_generated": 4000 * step, "tokens_trained": 3000 * step,
            "learner_idle": idle, "engine_idle": 0.1, "lag_mean": 1.2, "actors": 2, "running": 150,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": 1, "rollouts": [{"tokens": 20 + i} for i in range(12)]}]
    (made / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return made


def test_a_run_is_predicted_as_it_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path, steps=40, idle=0.5)
    assert main(["advise", str(folder), "--no-simulation"]) == 0
    text = capsys.readouterr().out
    assert "2.00 s a step, lag 1.2; the trainer waited 50% of the time, the engines 10%" in text
    run = load(folder / "config.yaml", [])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings, measured = from_run(run, lines, [{"rollouts": [{"tokens": 20}]}])
    assert measured.step_s == pytest.approx(2.0)
    assert predict(settings).step_s == pytest.approx(2.0, rel=0.01)


def test_a_run_that_is_too_short_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", str(run_folder(tmp_path, steps=4, idle=0.5))]) == 2
    assert "has 4 steps, too few to advise from; let it train at least 10" in capsys.readouterr().err


BASE = Settings(
    nodes=1,
    engine=engine_rates(QWEN_7B, Hardware(), slots=64),
    learner=learner_rates(QWEN_7B, Hardware(), ranks=1),
    lengths=Lengths(longest=2048, median=400, sigma=0.8),
    problems=32,
)


def test_the_best_division_is_the_best_of_all() -> None:
    candidates = list(divisions(BASE, QWEN_7B, Hardware(), gpus=8))
    assert [(one.learner.ranks, one.nodes) for one in candidates] == [(ranks, 8 - ranks) for ranks in range(1, 8)]
    rates = [predict(one).tokens_per_s for one in candidates]
    assert predict(best(candidates)).tokens_per_s == max(rates)
    assert max(rates) > 1.2 * min(rates)


def test_servers_of_several_gpus_are_never_cut() -> None:
    found = [(one.learner.ranks, one.nodes) for one in divisions(BASE, QWEN_7B, Hardware(), gpus=8, tp=2)]
    assert found == [(2, 3), (4, 2), (6, 1)]


def test_changes_change_one_thing() -> None:
    run = Settings(
        nodes=2, engine=EngineRates(slots=10, base_s=0.1, context_s=0.0), learner=LearnerRates(ranks=1, token_s=1e-3),
        lengths=Lengths(longest=10), max_lag=2,
    )  # fmt: skip
    found = changes(run)
    assert found["one more inference node"].nodes == 3 and found["one inference node less"].nodes == 1
    assert found["half as many slots again"].engine.slots == 15
    assert [one.max_lag for name, one in found.items() if name.startswith("hub.max_lag")] == [0, 1, 4, 8]
