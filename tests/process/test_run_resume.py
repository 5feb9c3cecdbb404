"""The learner is killed before and after its first checkpoint; hub and actor survive, and nothing counts twice."""

from pathlib import Path

import psutil
import pytest
from run_support import RunProcess, assert_all_trained, assert_right_weights, real_run, until

from sgpo_async.metrics.samples import read_samples

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 16


def rank(learner: RunProcess, number: int) -> psutil.Process:
    """The process of one rank."""
    ranks = {process.environ().get("RANK"): process for process in psutil.Process(learner.process.pid).children()}
    return ranks[str(number)]


def test_a_killed_learner_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as run:
        hub, actor = run.hub(), run.actor("actor")

        first = run.learner("--hub", run.address(), name="first", ranks=1)
        until(run.metrics, "the first step")
        rank(first, 0).kill()
        assert first.wait() != 0
        reached = run.status()["version"]
        assert reached >= 1

        overrides = ("learner.resume=true", "learner.checkpoint_every=2")
        second = run.learner(*overrides[1:], "--hub", run.address(), name="second")
        until((run.folder / "checkpoints" / "step-00000002").exists, "a checkpoint")
        rank(second, 1).kill()
        assert second.wait() != 0
        restarted = run.metrics()
        assert restarted[0]["step"] == 1 and restarted[0]["version"] > reached
        reached = run.status()["version"]

        third = run.learner(*overrides, "--hub", run.address(), name="third", ranks=1)
        assert (third.wait(), hub.wait(), actor.wait()) == (0, 0, 0), third.output
        run.assert_cleaned_up()
        lines, summary = run.metrics(), run.summary()
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert [sample["step"] for sample in read_samples(run.folder)] == list(range(1, STEPS + 1))
        versions = [line["version"] for line in lines]
        assert versions == sorted(set(versions)) and versions[-1] == summary["weight_version"] > reached
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
        assert_right_weights(summary)
        assert "joining again" not in actor.output, "the actor does not notice that a learner died"
