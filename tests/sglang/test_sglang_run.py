"""Complete runs with real servers, started by the commands that a user types; servers and actors are killed."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from run_support import RealRun, assert_all_trained, command_line, real_run, until
from sglang_support import PYTHON, start

from sgpo_async.engines.sglang.processes.launch import CPU_LAUNCHER
from sgpo_async.model.folder import model_folder

pytestmark = [pytest.mark.sglang, pytest.mark.process]
STEPS = 12
OVERRIDES = (f"steps={STEPS}", f"engine.sglang.python={PYTHON}", "engine.slots=48", "engine.sglang.phase_timeout_s=20")
OVERRIDES += ("hub.stale=drop",)


def servers(run: RealRun) -> list[psutil.Process]:
    """The servers' main processes."""
    return [process for process in run.processes() if str(CPU_LAUNCHER) in command_line(process)[:2]]


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_run_continues_when_a_server_dies(tmp_path: Path, transport: str) -> None:
    """No rollout is lost or duplicated: the ledger of rollouts is balanced, and no lease is issued again."""
    overrides = (*OVERRIDES, f"engine.sglang.transport={transport}")
    with real_run(tmp_path, *overrides, base="configs/demo-sglang.yaml") as run:
        local = run.local()
        until(lambda: len(run.metrics()) >= 3, "the third step")
        assert len(servers(run)) == 2
        servers(run)[0].kill()
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        summary = run.summary()
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=12)
        assert summary["leases_reissued"] == summary["duplicates"] == 0
        assert summary["lag_max"] <= run.settings.hub.max_lag
        log = (run.folder / "logs" / "actor-0.log").read_text()
        assert "has ended; the end of" in log and "restarts in" in log
        assert " by tensor: " not in log and " by distributed: " not in log  # no update failed
        mismatch = [
            line["mismatch_max_lag0_first"] for line in run.metrics() if line["mismatch_max_lag0_first"] is not None
        ]
        assert mismatch and max(mismatch) < 1e-4


def test_the_servers_of_a_killed_actor_end_too(tmp_path: Path) -> None:
    """SIGKILL of the actor, without a supervisor; another actor continues the run."""
    with real_run(tmp_path, *OVERRIDES, "hub.address=tcp://127.0.0.1:0", base="configs/demo-sglang.yaml") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address())
        first = run.actor("first")
        until(lambda: len(run.metrics()) >= 2, "the second step")
        lost = servers(run)
        assert len(lost) == 2
        first.process.kill()
        until(lambda: not any(process.is_running() for process in lost), "end of its servers", seconds=120)
        second = run.actor("second")
        assert (learner.wait(), hub.wait(), second.wait()) == (0, 0, 0), second.output
        run.assert_cleaned_up()
        assert_all_trained(run.summary()["ledger"], tasks=STEPS * 4, size=12)
        assert run.summary()["duplicates"] == 0


def test_an_actor_attaches_to_running_servers(tmp_path: Path) -> None:
    """Servers given by URL, which the actor did not start, are still running after the run."""
    server = start(Path(model_folder("builtin:cues")), tmp_path)
    overrides = (*OVERRIDES, "steps=3", f"engine.sglang.urls=[{server.url}]")
    try:
        with real_run(tmp_path / "run", *overrides, base="configs/demo-sglang.yaml") as run:
            local = run.local()
            assert local.wait() == 0, local.output
            assert_all_trained(run.summary()["ledger"], tasks=3 * 4, size=12)
            assert not servers(run)
        assert server.alive
    finally:
        server.stop()
