"""The measurement of the transport, at a size that takes no time."""

import json
from pathlib import Path

import pytest

from sgpo_async.bench import transport
from sgpo_async.bench.transport import NO_PEERS, OURS, Sizes, run_bench_transport

pytestmark = pytest.mark.process


def test_rollouts_arrive_in_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transport, "WARM_S", 0.2)
    assert run_bench_transport(sizes=Sizes(tokens=20, seconds=0.2, turns=2), peers="", to=tmp_path) == 0
    report = json.loads((tmp_path / "transport.json").read_text())
    assert list(report["rollouts_per_s"]) == list(OURS)
    for setting, found in report["rollouts_per_s"].items():
        assert len(found["turns"]) == 2 and found["low"] > 0, setting
    assert [(ratio["of"], ratio["to"]) for ratio in report["ratios"]] == [
        ("records", "zeromq"),
        ("hub", "zeromq"),
        ("hub, journal", "zeromq"),
        ("arrays to records", "msgpack lists"),
    ]
    text = (tmp_path / "transport.txt").read_text()
    assert NO_PEERS in text
    assert text in capsys.readouterr().out
