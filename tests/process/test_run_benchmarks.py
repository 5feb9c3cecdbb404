"""Actors evaluate benchmarks during training, with their own sampling settings and verifiers; the lag is reported."""

import json
import math
from pathlib import Path

import pytest
from run_support import assert_all_trained, real_run

from sgpo_async.evaluation.compare import compare_folders
from sgpo_async.evaluation.results import Results
from sgpo_async.tasks.sources import open_source

pytestmark = pytest.mark.process


@pytest.mark.slow
def test_every_round_reports_every_benchmark(tmp_path: Path) -> None:
    """math-verify checks sums, which the policy cannot read, and cues reduced to the last digit, often right by chance.

    The held-out problems are evaluated too, with the verifier of the built-in domain.
    """
    sums = [{"unique_id": f"test/{i}", "problem": f"{i} + 777000", "answer": str(777000 + i)} for i in range(6)]
    path = tmp_path / "math500.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    guessed, cues = tmp_path / "own.jsonl", open_source("cues", path="", held_out=12, seed=0).held_out()
    rows = [{"problem": cue.problem, "answer": cue.answer.split()[-1]} for cue in cues]
    guessed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        "steps=4",
        "evaluation.every=2",
        "evaluation.samples=2",
        "evaluation.temperature=0.6",
        "evaluation.top_p=0.95",
        f"evaluation.benchmarks={{math500: {{path: {path}, samples: 3}}, guessed: {{path: {guessed}, samples: 4}}}}",
    )
    with real_run(tmp_path / "run", *overrides) as run:
        local = run.local()
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        summary, lines = run.summary(), run.metrics()
        assert_all_trained(summary["ledger"], tasks=4 * 4, size=run.settings.rollout.size)
        rounds = summary["evaluations"]
        assert [evaluation["version"] for evaluation in rounds] == [0, 2, 4]
        for evaluation in rounds:
            score, by_chance = evaluation["benchmarks"]
            assert (score["name"], score["avg"], score["samples"], score["problems"]) == ("math500", 0.0, 3, 6)
            assert {k: found["mean"] for k, found in score["pass_at"].items()} == {"1": 0.0, "2": 0.0}
            judged = Results(run.folder / "benchmarks" / str(evaluation["version"])).problems("guessed")
            right = [sum(result.correct) for result in judged]
            assert (by_chance["name"], by_chance["problems"], by_chance["samples"]) == ("guessed", 12, 4)
            assert 0 < sum(right) < 48 and by_chance["avg"] == pytest.approx(sum(right) / 48)
            for k, found in by_chance["pass_at"].items():
                none = [math.comb(4 - count, int(k)) / math.comb(4, int(k)) for count in right]
                assert found["mean"] == pytest.approx(1 - sum(none) / 12), k
            assert evaluation["problems"] == 8 and evaluation["pass_guided"] > 0.5
            assert evaluation["version"] <= evaluation["served_oldest"] <= evaluation["served_newest"] <= 4
            assert 0 <= evaluation["lag"] <= 4 - evaluation["version"]
        assert rounds[-1]["lag"] == 0
        last = lines[-1]
        assert last["eval_version"] == 4 and last["eval_served"] == [4, 4] and last["eval_lag"] == 0
        assert last["eval_benchmarks"]["math500"] == rounds[-1]["benchmarks"][0]
        assert "math500, avg@3" in local.output
        results = Results(run.folder / "benchmarks" / "4").problems("math500")
        assert [result.id for result in results] == [f"test/{i}" for i in range(6)]
        assert all(len(result.tokens) == 3 and not any(result.correct) for result in results)
        compared = compare_folders(run.folder / "benchmarks" / "4", run.folder / "benchmarks" / "0")
        assert compared.benchmarks["math500"].paired.difference.mean == 0
        assert "Benchmarks" in (run.folder / "report.html").read_text()
