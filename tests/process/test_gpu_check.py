"""The code of `make gpu-check` runs on a CPU with tiny shapes; the measurements mean nothing there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]


def check(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run tests/gpu/check.py; return its exit status and report."""
    command = [sys.executable, str(ROOT / "tests/gpu/check.py"), "--out", str(out), "--wheels", str(out / "none")]
    tiny = ["--device", "cpu", "--size", "tiny"]
    done = subprocess.run([*command, *tiny, *arguments], capture_output=True, text=True, timeout=800, check=False)
    assert done.stdout.strip().endswith(str(out / "gpu-check.json")), done.stderr
    report: dict[str, Any] = json.loads((out / "gpu-check.json").read_text())
    return done.returncode, report


def test_a_training_step_is_measured_on_a_cpu(tmp_path: Path) -> None:
    status, report = check(tmp_path, "--parts", "step")
    assert status == 0, report
    assert report["versions"]["torch"] and report["date"] and report["commit"]
    steps = report["parts"]["step"]["figures"]
    assert len(steps) == 4
    for row in steps.values():
        assert row["tokens_per_s"] > 0 and row["micro_batches"] == 3
        assert any("scaled_dot_product" in operator for operator in row["attention"])


@pytest.mark.slow
def test_every_other_part_runs_on_a_cpu(tmp_path: Path) -> None:
    status, report = check(tmp_path, "--parts", "demo", "mismatch", "losses", "weights", "tests")
    assert status == 0, report
    mismatch = report["parts"]["mismatch"]["figures"]
    assert 0 < mismatch["tiny float32"]["mean"] < 1e-4 < mismatch["tiny bfloat16"]["mean"]
    losses = report["parts"]["losses"]["figures"]
    assert {name for name in losses if name[-5:] in ("naive", "fused")} == {
        f"{loss} {kind}" for loss in ("logprobs", "forward_kl") for kind in ("naive", "fused")
    }
    weights = report["parts"]["weights"]["figures"]
    assert all(weights[f"version {v}"]["load_s"] > 0 for v in range(3))
    summary = report["parts"]["demo"]["figures"]["summary"]
    assert summary["steps"] == 2 and summary["ledger"]["trained"] == 4
    assert "skipped" in report["parts"]["tests"]["figures"]["pytest"]


def test_a_failed_or_skipped_part_is_reported_with_the_reason(tmp_path: Path) -> None:
    """A part on CUDA fails without a GPU; a part for which no time is left is skipped."""
    status, report = check(tmp_path, "--device", "cuda", "--parts", "losses")
    assert status == 1
    assert report["parts"]["losses"]["status"] == "failed" and "CUDA" in report["parts"]["losses"]["output"]

    status, report = check(tmp_path, "--minutes", "0.1", "--parts", "step")
    assert status == 1
    assert report["parts"] == {"step": {"status": "skipped", "reason": "no time left"}}
