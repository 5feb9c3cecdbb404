"""The report of `sgpo-async bench transport`, from made-up rates; and the rollouts that its actors send."""

import sys
from pathlib import Path

import pytest

from sgpo_async.bench.hub_ingest import MAX_BYTES, PreparedRollouts, is_kind, rollout_of, run_of
from sgpo_async.bench.transport import Sizes, Worker, report_of, table, versions
from sgpo_async.errors import SgpoError
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire import decode, encode
from sgpo_async.wire import records as wire

RATES = {"zeromq": [100.0, 200.0, 400.0], "records": [70.0, 100.0, 280.0], "msgpack lists": [1.0, 2.0, 3.0]}


def test_a_ratio_is_computed_within_each_turn() -> None:
    report = report_of(RATES, Sizes(turns=3))
    assert report["rollouts_per_s"]["records"] == {"median": 100, "low": 70, "high": 280, "turns": [70, 100, 280]}
    (ratio,) = report["ratios"]
    assert (ratio["of"], ratio["to"], ratio["median"], ratio["low"], ratio["high"]) == (
        "records",
        "zeromq",
        pytest.approx(0.7),
        pytest.approx(0.5),
        pytest.approx(0.7),
    )
    assert report["bytes"] == sum(map(len, encode(rollout_of(500, 0))))


def test_the_table_says_what_falls_short_and_what_is_missing() -> None:
    def lines(records: list[float]) -> str:
        report = report_of(RATES | {"records": records}, Sizes(turns=3))
        return "\n".join(table(report | {"machine": "", "versions": {}, "load": [0, 0]}, missing="no peers"))

    assert "below" not in lines([60, 120, 240])
    assert "below" in lines([59, 118, 236])
    assert lines([1, 1, 1]).endswith("no peers")


def test_prepared_rollouts_are_those_of_their_lease() -> None:
    lease = TaskSampler(run_of(5), source_of(run_of(5))).task(70_000).lease(attempt=3, min_version=2)
    sent = list(PreparedRollouts(rollout_of(5, seed=1)).frames(lease, 2))
    read = [decode(frames, max_bytes=MAX_BYTES) for frames in sent]
    assert [(one.task, one.attempt, one.slot) for one in read] == [(70_000, 3, slot) for slot in range(16)]
    assert [one.guided for one in read] == [False] * 8 + [True] * 8
    assert {int(one.versions[0]) for one in read} == {2}
    assert [list(frames) for frames in sent] == [encode(one) for one in read]


def test_the_kind_of_a_message_is_found_in_its_header() -> None:
    assert is_kind(encode(wire.Ack(task=1, attempt=0, slot=2)), "Ack")
    assert not is_kind(encode(wire.Commit(step=1)), "Committed")
    assert not is_kind(encode(wire.Committed(step=1, status={})), "Commit")
    assert is_kind(encode(wire.Shard(step=0, version=0, problems=1, rollouts=(rollout_of(5, 0),) * 40)), "Shard")


def test_processes_that_end_are_named(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit(1)")
    worker = Worker([sys.executable, str(program)], "records", Sizes())
    with pytest.raises(SgpoError, match="bench transport: the processes of records have ended"):
        worker.rate("records", 0.1)
    worker.close()


def test_an_environment_without_the_peers_is_refused() -> None:
    with pytest.raises(SgpoError, match="must have TransferQueue, ray, .*; make peers makes one"):
        versions(sys.executable)
