"""In deterministic mode a run that is killed and resumed has the final weights of an uninterrupted one, bit for bit.

SGPO_ASYNC_KILLS=20 pytest tests/process/test_exact_resume.py kills it at twenty random points.
"""

import os
import random
import time
from pathlib import Path

import pytest
from run_support import RealRun, free_port, rank_of, real_run, until

KILLS = int(os.environ.get("SGPO_ASYNC_KILLS", "3"))
STEPS = KILLS + 4
PATIENCE_S = 600.0
OVERRIDES = [
    f"steps={STEPS}",
    "learner.problems_per_step=3",
    "learner.checkpoint_every=1",
    "local.ranks=1",
    "local.actors=1",
    "engine.deterministic=true",
    "hub.max_lag=0",
    "tasks.held_out=2",
    "hub.address=tcp://127.0.0.1:0",
]

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1200 + 120 * KILLS)]


def weights(run: RealRun, *, kills: int) -> bytes:
    """Train to the end; kill the learner `kills` times, at random moments of random steps."""
    draw = random.Random(f"kills {kills}")
    hub, actor = run.hub(), run.actor("actor")
    command = ["-m", "torch.distributed.run", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    command += [f"--max-restarts={kills}", "launch/learner.py", str(run.config), "--hub", run.address()]
    learner = run.start("learner", *command)
    for number, reached in enumerate(sorted(draw.randrange(1, STEPS - 2) for _ in range(kills))):
        rank = rank_of(learner, 0, attempt=number)
        until(lambda reached=reached: len(run.metrics()) >= reached, f"step {reached}", seconds=PATIENCE_S)
        time.sleep(draw.uniform(0, 3))
        rank.kill()
    assert learner.wait(PATIENCE_S) == 0, learner.output[-4000:]
    assert (hub.wait(), actor.wait()) == (0, 0)
    assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
    return (run.folder / "policy" / "model.safetensors").read_bytes()


def test_a_run_killed_at_random_points_has_the_same_final_weights(tmp_path: Path) -> None:
    with real_run(tmp_path / "whole", *OVERRIDES) as run:
        expected = weights(run, kills=0)
    with real_run(tmp_path / "killed", *OVERRIDES) as run:
        found = weights(run, kills=KILLS)
    assert found == expected
