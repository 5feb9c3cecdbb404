"""The first steps of the demo by the synchronous loop, with a fixed seed: no change of structure may move them.

`python tests/process/test_loss_curve.py` writes the file anew, for a change that is meant to move them.
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
WORDS = ["steps=6", "learner.problems_per_step=4", "local.ranks=1", "local.actors=1", "engine.deterministic=true"]


def curve(folder: Path) -> list[dict[str, Any]]:
    """Loss, its two terms, entropy and gradient norm of each step."""
    path = folder / "run.yaml"
    path.write_text(to_yaml(load("configs/demo.yaml", [*WORDS, f"out={folder}"])))
    command = [sys.executable, str(Path(__file__).with_name("synchronous_losses.py")), str(path)]
    done = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.process
def test_the_loss_curve_is_the_one_on_record(tmp_path: Path) -> None:
    """Up to what another processor or torch rounds otherwise."""
    found, expected = curve(tmp_path), [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        GOLDEN.write_text("".join(json.dumps(line) + "\n" for line in curve(Path(place))))
