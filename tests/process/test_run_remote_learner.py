"""A learner on another machine than the hub: it cannot open the hub's weight store, so the hub pulls its versions.

The learner has a namespace of process ids of its own, as in a container of its own; in the last test every process of
the run has one, and a /dev/shm of its own.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from run_support import RealRun, assert_all_trained, command_line, real_run, until

pytestmark = pytest.mark.process

PRIVATE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
CONTAINER = [*PRIVATE, "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]


def needs_namespaces() -> None:
    if subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode:
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_process_in_a_container_of_its_own(tmp_path: Path) -> None:
    """No path of one means anything to another: all weights travel, also after the hub begins again in another one."""
    needs_namespaces()
    with real_run(tmp_path, "steps=24", "hub.address=tcp://127.0.0.1:0") as run:
        hub = run.start("hub", "-m", "sgpo_async.cli", "hub", str(run.config), prefix=CONTAINER)
        names = ("a", "b", "c")  # fan-out 2: the third gets the weights from another actor
        actors = [
            run.start(name, "launch/actor.py", "--hub", run.address(), "--name", name, prefix=CONTAINER)
            for name in names
        ]
        words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "launch/learner.py", str(run.config)]
        learner = run.start("learner", *words, "--hub", run.address(), prefix=CONTAINER)
        until(lambda: len(run.metrics()) >= 4, "four steps")
        until(lambda: all(run.actor_row(name).get("tokens") for name in names), "tokens of all actors")
        assert sorted(bool(run.actor_row(name)["source"]) for name in names) == [False, False, True]
        senders = [process for process in run.processes() if "sgpo_async.session.sender" in command_line(process)]
        assert len(senders) == 4, "one for each actor and one for the hub: nobody reads a store of another one"

        (inner,) = psutil.Process(hub.process.pid).children()
        inner.kill()
        hub.process.wait()
        hub = run.start("hub-again", "-m", "sgpo_async.cli", "hub", str(run.config), prefix=CONTAINER)
        codes = [process.wait() for process in (learner, hub, *actors)]
        assert codes == [0] * 5, learner.output + hub.output
        assert "it pulls the weights from here" in learner.output
        assert "cannot be opened here" not in hub.output
        assert [line["step"] for line in run.metrics()] == list(range(1, 25))
        assert_all_trained(run.summary()["ledger"], tasks=24 * 4, size=run.settings.rollout.size)
        run.assert_cleaned_up()
