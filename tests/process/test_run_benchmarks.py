"""Benchmarks on the fleet while training goes on: sampled and judged in their own way, reported with their lag."""

import json
import math
from pathlib import Path

import pytest
from run_support import assert_all_trained, real_run

from sgpo_async.evaluation.compare import compare_folders
from sgpo_async.evaluation.results import Results
from sgpo_async.tasks.sources import open_source

pytestmark = pytest.mark.process


def test_every_round_reports_every_benchmark(tmp_path: Path) -> None:
    """Sums that the policy of cues cannot read, through math-verify; held-out cues beside them, through their own.

    And cues of which only the last figure counts, which is often right by chance.
    """
    sums = [{"unique_id": f"test/{i}", "problem": f"{i} + 777000", "answer": str(777000 + i)} for i in range(6)]
    path = tmp_path / "math500.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sums))
    guessed, cues = tmp_path / "own.jsonl", open_source("cues", path="", held_out=12, seed=0).held_out()
    rows = [{"problem": one.problem, "answer": one.answer.split()[-1]} for one in cues]
    guessed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "steps=4",
        "evaluation.every=2",
        "evaluation.samples=2",
        "evaluation.temperature=0.6",
        "evaluation.top_p=0.95",
        f"evaluation.benchmarks={{math500: {{path: {path}, samples: 3}}, guessed: {{path: {guessed}, samples: 4}}}}",
    )
    with real_run(tmp_path / "run", *words) as run:
        local = run.local()
        assert local.ended() == 0, local.output
        run.assert_no_trace()
        summary, lines = run.summary(), run.lines()
        assert_all_trained(summary["ledger"], tasks=4 * 4, size=run.run.rollout.size)
        rounds = summary["evaluations"]
        assert [one["version"] for one in rounds] == [0, 2, 4]
        for one in rounds:
            score, by_chance = one["benchmarks"]
            assert (score["name"], score["avg"], score["samples"], score["problems"]) == ("math500", 0.0, 3, 6)
            assert {k: found["mean"] for k, found in score["pass_at"].items()} == {"1": 0.0, "2": 0.0}
            judged = Results(run.folder / "benchmarks" / str(one["version"])).problems("guessed")
            right = [sum(result.correct) for result in judged]
            assert (by_chance["name"], by_chance["problems"], by_chance["samples"]) == ("guessed", 12, 4)
            assert 0 < sum(right) < 48 and by_chance["avg"] == pytest.approx(sum(right) / 48)
            for k, found in by_chance["pass_at"].items():
                none = [math.comb(4 - count, int(k)) / math.comb(4, int(k)) for count in right]
                assert found["mean"] == pytest.approx(1 - sum(none) / 12), k
            assert one["problems"] == 8 and one["pass_guided"] > 0.5
            assert one["version"] <= one["served_oldest"] <= one["served_newest"] <= 4
            assert 0 <= one["lag"] <= 4 - one["version"]
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
