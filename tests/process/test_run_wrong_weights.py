"""An engine that serves other weights than it reports is named; the honest actor's work and the run go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_support import RealRun, RunProcess, assert_all_trained, free_port, real_run, until

from sgpo_async.hub.served_weights import UNKNOWN_DIGEST

pytestmark = pytest.mark.process

STEPS = 8
SETTINGS = [f"steps={STEPS}", "learner.canary_every=1", "hub.canary_s=0.5", "local.ranks=1", "optim.lr=1e-3"]


@contextmanager
def run_with(directory: Path, fault: str) -> Iterator[tuple[RealRun, RunProcess, RunProcess, RunProcess]]:
    """A run whose two actors join before the learner; yields it with the hub, the faulty actor and the learner."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(directory, *SETTINGS, f"hub.address={address}") as run:
        hub = run.hub()
        run.address()
        faulty = run.start(
            "faulty", "tests/process/wrong_weights_actor.py", fault, "--hub", address, "--name", "faulty"
        )
        honest = run.actor("honest")
        until(lambda: {row["name"] for row in run.status()["actors"]} == {"faulty", "honest"}, "both actors")
        learner = run.learner("--hub", address, ranks=1)
        yield run, hub, faulty, learner
        assert learner.wait() == 0, learner.output
        assert honest.wait() == 0, honest.output
        assert hub.wait() == 0, hub.output
        assert "weights alarm: honest" not in hub.output
        summary = run.summary()
        assert summary["steps"] == STEPS
        assert_all_trained(summary["ledger"], tasks=4 * STEPS, size=run.settings.rollout.size)


@pytest.mark.parametrize(
    ("fault", "alarms"), [("ignores", {"differs", "stuck"}), pytest.param("half", {"differs"}, marks=pytest.mark.slow)]
)
def test_an_engine_whose_weights_are_not_those_of_its_version_is_named(
    tmp_path: Path, fault: str, alarms: set[str]
) -> None:
    with run_with(tmp_path, fault) as (run, hub, faulty, _):
        pass
    assert faulty.wait() == 0, faulty.output
    found = {kind for kind, count in run.summary()["canary"]["alarms"].items() if count}
    assert found == alarms
    assert "weights alarm: faulty at version" in hub.output
    assert ("it does not load the weights whose version it reports" in hub.output) == ("stuck" in alarms)
    assert "quarantined" not in hub.output
    lines = run.metrics()
    assert max(line["canary_max"] for line in lines if line["canary_max"] is not None) > 1e-3
    assert "WEIGHTS ALARM" in (run.folder / "report.html").read_text()


@pytest.mark.slow
def test_an_actor_that_reports_a_digest_that_was_never_published_is_quarantined(tmp_path: Path) -> None:
    with run_with(tmp_path, "digest") as (run, hub, faulty, _):
        assert faulty.wait() == 3, faulty.output
    assert "quarantined after 3 invalid messages" in faulty.output
    assert "faulty is quarantined" in hub.output and UNKNOWN_DIGEST in hub.output
    assert run.summary()["rejected"] >= 3
    assert all(line["canary_alarms"] == {"differs": 0, "stuck": 0, "moved": 0} for line in run.metrics())
