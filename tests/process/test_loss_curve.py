"""The losses of the first steps of the demo in the synchronous loop, with a fixed seed, must not change.

`python tests/process/test_loss_curve.py` rewrites the golden file; use it after a change that alters the losses on
purpose.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from sgpo_async.config import load, to_yaml

GOLDEN = Path(__file__).parents[1] / "golden" / "loss-curve.jsonl"
OVERRIDES = ["steps=6", "learner.problems_per_step=4", "learner.skip_uniform=false", "engine.deterministic=true"]
OVERRIDES += ["local.ranks=1", "local.actors=1"]


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return loss, its two terms, entropy and gradient norm of each step."""
    path = folder / "run.yaml"
    path.write_text(to_yaml(load("configs/demo.yaml", [*OVERRIDES, f"out={folder}"])))
    command = [sys.executable, str(Path(__file__).with_name("synchronous_losses.py")), str(path)]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.process
def test_the_loss_curve_equals_the_golden_file(tmp_path: Path) -> None:
    """The tolerance allows for rounding differences between processors and versions of torch."""
    found, expected = curve(tmp_path), [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    assert len(found) == len(expected) == 6
    for line, golden in zip(found, expected, strict=True):
        assert line == pytest.approx(golden, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in curve(Path(folder))))
