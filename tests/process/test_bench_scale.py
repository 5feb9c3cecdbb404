"""Simulated nodes over real sockets around a real hub: nothing is lost while nodes come and go."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sgpo_async.bench import overlap, pinned, scale
from sgpo_async.simulation import Lengths

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]


def test_nodes_that_come_and_go_cost_no_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "LENGTHS", Lengths(longest=256, median=60, sigma=0.5))
    monkeypatch.setattr(scale, "WARM", 2)
    found = scale.measure(4, speed=10.0, steps=6)
    assert found.nodes == 4 and found.lost == 0
    assert 0 < found.of_ceiling <= 1 and found.tokens_per_s > 0 and found.rollouts_per_s > 0
    assert found.hub_ms > 0 and found.hub_mb > 10 and found.busy > 0


def test_the_overlap_bench_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(overlap.QUICK[0], problems=8, steps=3, lengths=Lengths(longest=256, median=60), gpus=3)
    monkeypatch.setattr(overlap, "QUICK", (small,))
    assert overlap.run_bench_overlap(quick=True, to=tmp_path) == 0
    text = (tmp_path / "overlap.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    (scenario,) = json.loads((tmp_path / "overlap.json").read_text())
    names = [row["setting"] for row in scenario["rows"]]
    assert names == [
        "synchronous",
        "colocated",
        "split, lag 0",
        "lag 1",
        "lag 2",
        "lag 4",
        "lag 8",
        "lag 2, no updates",
    ]
    for row in scenario["rows"]:
        assert row["ranks"] + row["nodes"] == (6 if row["setting"] in overlap.TURNS else 3)
        for seed in row["seeds"]:
            assert sum(seed["learner"].values()) == pytest.approx(1) and seed["dropped"] == 0
    rates = {row["setting"]: row["seeds"][0]["tokens_per_s"] for row in scenario["rows"]}
    assert rates["colocated"] < rates["synchronous"]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each side")
def test_real_processes_are_measured_on_a_core_for_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SKIPPED", 2)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    found = pinned.measure(0, steps=6, cores=(first, second))
    assert found.problems_per_s > 0 and found.lag == 0
    assert 0 <= found.learner_idle < 1 and 0 <= found.engine_idle < 1
    rows = pinned._table({0: [found], 2: [found]}).splitlines()
    assert rows[2].split()[3] == "1.00"
