"""The embedded engine and `generate` at a size that takes no time: both sample all that was asked for."""

import json
from pathlib import Path

import pytest

from sgpo_async.bench import engine

pytestmark = pytest.mark.process


def test_both_ways_sample_every_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "QUICK", engine.Sizes(slots=4, batches=2, mean=6, turns=2))
    assert engine.run_bench_engine(quick=True, model="", sglang="", to=tmp_path) == 0
    (found,) = json.loads((tmp_path / "engine.json").read_text())["models"]
    assert found["model"] == "builtin:cues" and list(found["tokens_per_s"]) == list(engine.LENGTHS)
    for kind, rates in found["tokens_per_s"].items():
        assert len(found["lengths"][kind]) == 8
        for way in ("embedded", "generate"):
            assert len(rates[way]["turns"]) == 2 and rates[way]["low"] > 0
    assert (tmp_path / "engine.txt").read_text() in capsys.readouterr().out
