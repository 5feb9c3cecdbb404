"""The programs of tests/gpu run on a CPU with a tiny model: they work; their measurements are not checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.sglang, pytest.mark.process]


def test_the_measurement_for_gpus_runs(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    arguments = f"{out} --device cpu --dtype float32 --shape tiny --slots 8 --tokens 48 --transport tensor distributed"
    command = [sys.executable, str(ROOT / "tests/gpu/measure_servers.py"), *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(out.read_text())
    assert measured["mismatch"]["float32"]["max"] < 1e-4 < measured["mismatch"]["bfloat16"]["max"]
    for transport in ("tensor", "distributed"):
        updates = measured[f"updates_{transport}"]
        assert updates["counted"] == updates["of"] == 4 and 0 < updates["pause_s_max"] < 10
    assert measured["generation"]["all_slots_tokens_per_s"] > 0
    assert measured["versions"]["server"]["sglang"] and measured["date"]


def test_the_measurement_reports_missing_gpus(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/gpu/measure_servers.py"), str(tmp_path / "out.json")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "number of GPUs must be >= 1, got 0" in done.stderr
