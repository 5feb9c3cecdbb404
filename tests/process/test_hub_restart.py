"""The hub is killed again and again while a run goes on: nothing is lost, and every restart is short.

`python tests/process/test_hub_restart.py [KILLS]` runs the demo of 120 steps, kills its hub 20 times, and prints how
long each time the next training step took.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from run_support import PATIENCE_S, RealRun, RunProcess, assert_all_trained, assert_right_weights, real_run, until

from sgpo_async.hub import HubCore
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.recovery import recover
from sgpo_async.tasks.sources import source_of

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
STEPS = 12


def kill_hub(run: RealRun, hub: RunProcess) -> tuple[RunProcess, float]:
    """kill -9, start the hub again, wait for the next step; return the new hub, and the seconds from start to step."""
    steps = len(run.metrics())
    hub.process.kill()
    hub.process.wait()
    assert_journal_agrees(run)
    began = time.monotonic()
    hub = run.hub()
    until(lambda: len(run.metrics()) > steps, "a step after the restart")
    return hub, time.monotonic() - began


def assert_journal_agrees(run: RealRun) -> None:
    """Rebuild the core from a copy of the journal. Its ledgers balance, and it is where the learner is."""
    with tempfile.TemporaryDirectory() as folder:
        for path in run.folder.glob("hub.journal*"):
            shutil.copy(path, folder)
        settings = replace(run.settings, hub=replace(run.settings.hub, address="tcp://127.0.0.1:1"))
        journal = Journal(Path(folder))
        core, _ = recover(HubCore(settings, source_of(settings)), journal)
        journal.close()
    for leases in (core.training.leases, core.evaluation.leases):
        leases.check()
    assert core.training.step - len(run.metrics()) in (0, 1), "the last commit may not be in the metrics yet"
    trained = core.training.step * settings.learner.problems_per_step
    assert core.status()["ledger"]["trained"] == trained


def whole_run(run: RealRun, *, kills: int, every: int, steps: int) -> list[float]:
    """Start a run of separate processes, kill its hub every so many steps; return the seconds until the next steps."""
    hub = run.hub()
    address = run.address()
    learner = run.learner("--hub", address)
    actors = [run.actor(f"actor-{number}", hub=address) for number in range(2)]
    stores = set()
    seconds = []
    for kill in range(kills):
        until(lambda: len(run.metrics()) >= (kill + 1) * every, "more steps")  # noqa: B023
        stores.add(store_of(run))
        hub, recovery = kill_hub(run, hub)
        seconds.append(recovery)
    stores.add(store_of(run))
    assert len(stores) == 1, "a restarted hub opens the store that the learner still has"
    assert learner.wait(PATIENCE_S + 5 * steps) == 0, learner.output
    assert [actor.wait() for actor in actors] == [0, 0], actors[0].output
    assert hub.wait() == 0, hub.output
    return seconds


def store_of(run: RealRun) -> tuple[int, int]:
    """Device and inode of the weight store's file."""
    found = until(lambda: json.loads((run.folder / "hub.json").read_text()), "hub.json")
    stat = Path(found["store"]).stat()
    return stat.st_dev, stat.st_ino


@pytest.mark.slow
def test_a_killed_hub_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = (f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", "hub.max_lag=8", "evaluation.every=3")
    with real_run(tmp_path, *settings) as run:
        whole_run(run, kills=3, every=3, steps=STEPS)
        summary = run.summary()
        tasks = STEPS * run.settings.learner.problems_per_step
        assert_all_trained(summary["ledger"], tasks=tasks, size=run.settings.rollout.size)
        # Every actor came back to its leases; only those that a killed hub had journalled and not sent are given again.
        assert summary["leases_reissued"] < tasks / 2, summary
        assert_right_weights(summary)
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert [one["version"] for one in summary["evaluations"]] == [0, 3, 6, 9, 12]
        assert not list(run.folder.glob("hub.journal*")), "the journal goes with the run"
        run.assert_cleaned_up()


@pytest.mark.slow
def test_a_hub_and_an_actor_that_are_killed_together_lose_no_group(tmp_path: Path) -> None:
    """The leases of the actor are found in the journal, and reissued when it does not come back."""
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", "hub.max_lag=8") as run:
        hub = run.hub()
        address = run.address()
        learner = run.learner("--hub", address)
        first = run.actor("first", hub=address)
        until(lambda: len(run.metrics()) >= 2, "two steps")
        children = psutil.Process(first.process.pid).children(recursive=True)
        for process in (hub.process, first.process):
            process.kill()
            process.wait()
        psutil.wait_procs(children, PATIENCE_S)
        hub = run.hub()
        second = run.actor("first", hub=address)  # under the name of the dead one
        assert (learner.wait(), hub.wait(), second.wait()) == (0, 0, 0), learner.output + second.output
        tasks = STEPS * run.settings.learner.problems_per_step
        assert_all_trained(run.summary()["ledger"], tasks=tasks, size=run.settings.rollout.size)


def main() -> None:
    """The demo under 20 kills: prints the recovery times and the end of the run as JSON."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        whole_demo = ("steps=120", "learner.problems_per_step=16", "tasks.held_out=200", "evaluation.every=20")
        with real_run(Path(folder), *whole_demo, "hub.address=tcp://127.0.0.1:0") as run:
            seconds = whole_run(run, kills=kills, every=115 // kills, steps=120)
            summary = run.summary()
    report = {
        "kills": kills,
        "seconds_to_next_step": [round(one, 2) for one in seconds],
        "median": round(statistics.median(seconds), 2),
        "max": round(max(seconds), 2),
        **{key: summary[key] for key in ("steps", "pass_auto_last", "ledger", "leases_reissued", "rejected")},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
