"""The measurement of the fused losses, at a size that takes no time."""

import json
from pathlib import Path

import pytest

from sgpo_async.bench.loss import main
from sgpo_async.bench.worker_loss import LOSSES


@pytest.mark.process
def test_the_report_has_every_way_and_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loss.json"
    sizes = ["--tokens", "32", "--vocabulary", "100", "--width", "8"]
    assert main([*sizes, "--repetitions", "1", "--to", str(path)]) == 0
    report = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["sizes"] == {"T": 32, "V": 100, "H": 8}
    for loss in LOSSES:
        assert report[loss]["fused"]["loss"] == pytest.approx(report[loss]["naive"]["loss"], rel=1e-5)
        cpu = [report[loss][way]["cpu_s"] for way in ("fused", "naive")]
        assert report[loss]["fused_over_naive"]["cpu_s"] == pytest.approx(cpu[0] / cpu[1])
