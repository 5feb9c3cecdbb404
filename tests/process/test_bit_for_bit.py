"""At lag 0, with one actor and a deterministic engine, asynchronous training equals synchronous training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgpo_async.config import load, to_yaml
from sgpo_async.metrics import read_metrics, read_summary

OVERRIDES = [
    "name=exact",
    "steps=3",
    "learner.problems_per_step=3",
    "local.ranks=1",
    "local.actors=1",
    "engine.deterministic=true",
    "hub.max_lag=0",
    "tasks.held_out=2",
    "evaluation.every=100",
]


@pytest.mark.process
@pytest.mark.parametrize(
    "config", ["configs/demo.yaml", pytest.param("configs/demo-paper.yaml", marks=pytest.mark.slow)]
)
def test_the_loss_curves_are_equal_bit_for_bit(tmp_path: Path, config: str) -> None:
    run = load(config, [*OVERRIDES, f"out={tmp_path}"])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))

    subprocess.run([sys.executable, "-m", "sgpo_async.cli", "local", str(path)], check=True, timeout=500)
    asynchronous = read_metrics(run.folder)

    command = [sys.executable, str(Path(__file__).with_name("synchronous_losses.py")), str(path)]
    output = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    synchronous = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]

    assert len(synchronous) == len(asynchronous) == 3
    for line, reference in zip(asynchronous, synchronous, strict=True):
        assert {key: line[key] for key in reference} == reference
    assert read_summary(run.folder)["lag_max"] == 0
    # The curves are not trivially equal: the policy changes, and both terms of the loss contribute.
    assert len({line["entropy"] for line in asynchronous}) == 3
    assert asynchronous[0]["kd_loss"] > 0
