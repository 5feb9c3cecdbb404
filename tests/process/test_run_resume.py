"""A learner dies twice, before and after its first checkpoint; hub and actor outlive it, and nothing counts twice."""

from pathlib import Path

import psutil
import pytest
from run_support import Started, assert_all_trained, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 16


def rank(learner: Started, number: int) -> psutil.Process:
    """The process of one rank."""
    ranks = {process.environ().get("RANK"): process for process in psutil.Process(learner.process.pid).children()}
    return ranks[str(number)]


def test_a_learner_is_killed_and_resumes(tmp_path: Path) -> None:
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as run:
        hub, actor = run.hub(), run.actor("actor")

        first = run.learner("--hub", run.address(), name="first", ranks=1)
        until(run.lines, "the first step")
        rank(first, 0).kill()
        assert first.ended() != 0
        reached = run.status()["version"]
        assert reached >= 1

        words = ("learner.resume=true", "learner.checkpoint_every=2")
        second = run.learner(*words, "--hub", run.address(), name="second")
        until((run.folder / "checkpoints" / "step-00000002").exists, "a checkpoint")
        rank(second, 1).kill()
        assert second.ended() != 0
        began_anew = run.lines()
        assert began_anew[0]["step"] == 1 and began_anew[0]["version"] > reached
        reached = run.status()["version"]

        third = run.learner(*words, "--hub", run.address(), name="third", ranks=1)
        assert (third.ended(), hub.ended(), actor.ended()) == (0, 0, 0), third.output
        run.assert_no_trace()
        lines, summary = run.lines(), run.summary()
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        versions = [line["version"] for line in lines]
        assert versions == sorted(set(versions)) and versions[-1] == summary["weight_version"] > reached
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.run.rollout.size)
        assert actor.output.count("session ended") == 1  # at the end of the run, not with its learners
