"""The tool-using example: a policy learns by SGPO, in episodes of two turns, which tool to call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 900

pytestmark = [pytest.mark.process, pytest.mark.timeout(2 * DEADLINE_S)]


def run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_policy_learns_which_tool_to_call(tmp_path: Path) -> None:
    run("examples/tool_use.py", "--out", str(tmp_path))
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1, "the umask's"
    config = str(tmp_path / "config.yaml")
    run("launch/local.py", config, f"out={tmp_path}", "local.actors=1", "local.ranks=1")
    summary = json.loads((tmp_path / "tool-use" / "summary.json").read_text())
    first, *_, last = summary["evaluations"]
    assert first["pass_auto"] < 0.5, "it asks a random store"
    assert first["pass_guided"] > 0.85, "it follows a strategy"
    assert last["pass_auto"] > 0.85
    metrics = [json.loads(line) for line in (tmp_path / "tool-use" / "metrics.jsonl").read_text().splitlines()]
    for span in ("first", "later"):  # before and after a reply
        found = [line[f"mismatch_mean_lag0_{span}"] for line in metrics]
        assert 0 < max(one or 0.0 for one in found) < 1e-4, "engine and learner agree"
    assert summary["ledger"]["rollouts"]["trained"] == 60 * 16 * 12
