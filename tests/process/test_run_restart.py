"""torchrun restarts the ranks of a learner after `kill -9`: the run trains to its end, and nothing counts twice."""

from pathlib import Path

import pytest
from run_support import (
    RealRun,
    RunProcess,
    assert_all_trained,
    assert_right_weights,
    free_port,
    rank_of,
    real_run,
    until,
)

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 40  # so many that a fast machine does not finish before the second kill
OVERRIDES = [f"steps={STEPS}", "learner.checkpoint_every=1", "learner.keep_checkpoints=2"]
PATIENCE_S = 600.0


def torchrun(run: RealRun, *overrides: str, rendezvous: str) -> RunProcess:
    """The learner as a user starts it; `learner.resume` has its default."""
    place = {
        "static": ["--master-addr=127.0.0.1", f"--master-port={free_port()}"],
        "standalone": ["--standalone", "--local-addr=127.0.0.1"],
    }[rendezvous]
    command = ["-m", "torch.distributed.run", *place, "--max-restarts=3", "--nproc-per-node=2"]
    return run.start("learner", *command, "launch/learner.py", str(run.config), *overrides)


def kill(run: RealRun, learner: RunProcess, rank: int, *, attempt: int, after: int) -> None:
    """Kill a rank of the `attempt` (0: the first) by SIGKILL when there is a checkpoint of a step above `after`."""
    checkpoints = run.folder / "checkpoints"
    until(
        lambda: any(int(path.name[5:]) > after for path in checkpoints.glob("step-*")),
        f"a checkpoint after step {after}",
        seconds=PATIENCE_S,
    )
    rank_of(learner, rank, attempt=attempt).kill()


def assert_trained_to_the_end(run: RealRun, learner: RunProcess) -> None:
    assert learner.wait(PATIENCE_S) == 0, learner.output[-4000:]
    assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
    summary = run.summary()
    assert summary["steps"] == STEPS and summary["world_size"] == 2
    assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
    assert_right_weights(summary)
    assert not list(run.folder.glob("*.earlier-*")), "an attempt has begun anew"


@pytest.mark.parametrize("rendezvous", ["static", "standalone"])
def test_ranks_beside_a_hub_are_killed(tmp_path: Path, rendezvous: str) -> None:
    """First rank 1, then rank 0; the hub and the actor live on."""
    with real_run(tmp_path, *OVERRIDES, "hub.address=tcp://127.0.0.1:0") as run:
        hub, actor = run.hub(), run.actor("actor")
        learner = torchrun(run, "--hub", run.address(), rendezvous=rendezvous)
        kill(run, learner, 1, attempt=0, after=0)
        kill(run, learner, 0, attempt=1, after=STEPS // 2)
        assert_trained_to_the_end(run, learner)
        assert (hub.wait(), actor.wait()) == (0, 0)
        assert "joining again" not in actor.output, "the actor does not notice that a rank was killed"
        run.assert_cleaned_up()


def test_ranks_with_their_own_hub_are_killed(tmp_path: Path) -> None:
    """The hub beside rank 0 ends with it; that of the next attempt goes on from its journal, and so does the actor."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, *OVERRIDES, f"hub.address={address}") as run:
        learner, actor = torchrun(run, rendezvous="standalone"), run.actor("actor", hub=address)
        kill(run, learner, 0, attempt=0, after=0)
        kill(run, learner, 1, attempt=1, after=STEPS // 2)
        assert_trained_to_the_end(run, learner)
        assert actor.wait() == 0
        run.assert_cleaned_up()
