"""A learner on another machine than the hub: it cannot open the hub's weight store, so the hub pulls its versions.

The learner has a namespace of process ids of its own, as in a container of its own.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from run_support import RealRun, command_line, real_run, until

pytestmark = pytest.mark.process

PRIVATE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]


def needs_namespaces() -> None:
    if subprocess.run([*PRIVATE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("namespaces of process ids are not available here")


def link_of_hub(run: RealRun, module: str) -> int:
    """The process id of the weight sender or receiver of the link between hub and learner."""

    def found() -> int:
        for process in run.processes():
            words = command_line(process)
            if module in words and json.loads(words[-1])["name"] == "the hub":
                return process.pid
        return 0

    return until(found, f"{module} of the link")


def test_the_hub_pulls_the_weights_of_a_learner_on_another_machine(tmp_path: Path) -> None:
    """Also after the link is lost, and after the hub itself is killed and started again."""
    needs_namespaces()
    with real_run(tmp_path, "steps=24", "hub.stale=drop", "hub.address=tcp://127.0.0.1:0") as run:
        hub, actor = run.hub(), run.actor("actor")
        words = ["launch/learner.py", str(run.config), "--hub", run.address()]
        learner = run.start("learner", "-m", "torch.distributed.run", "--nproc-per-node", "2", *words, prefix=PRIVATE)
        until(lambda: len(run.metrics()) >= 4, "four steps")
        os.kill(link_of_hub(run, "sgpo_async.session.sender"), signal.SIGKILL)
        reached = len(run.metrics())
        until(lambda: len(run.metrics()) >= reached + 4, "four steps more")
        hub.process.kill()
        hub.process.wait()
        hub = run.start("hub-again", "-m", "sgpo_async.cli", "hub", str(run.config))
        assert (learner.wait(), hub.wait(), actor.wait()) == (0, 0, 0), learner.output + hub.output
        assert "it pulls the weights from here" in learner.output
        assert "pulling the learner's weights from tcp://127.0.0.1:" in hub.output
        lines = run.metrics()
        assert [line["step"] for line in lines] == list(range(1, 25))
        assert max(line["mismatch_max_lag0_first"] or 0 for line in lines) < 1e-4
        assert max(line["lag_max"] for line in lines) <= run.settings.hub.max_lag
        run.assert_cleaned_up()
