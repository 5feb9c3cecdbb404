"""The rules of the supervisor, with fake child processes and a fake clock."""

from pathlib import Path
from typing import Any

import pytest

from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.local import supervisor as module
from sgpo_async.local.supervisor import LEAVING_S, RESTARTS, Supervisor


class FakeChild:
    """A child process that ends when the test sets `code`."""

    def __init__(self, name: str) -> None:
        self.name, self.log, self.pid = name, Path(f"{name}.log"), 1
        self.process = self
        self.code: int | None = None

    def ending(self) -> str:
        return f"ended with code {self.code}"

    def complaint(self) -> str:
        return "end of its log"


class FakeRun:
    """Starts fake processes, and holds their command lines, the clock and the hub file."""

    actors = 2

    def __init__(self) -> None:
        self.now = 0.0
        self.folder = Path("nowhere")
        self.started: list[FakeChild] = []
        self.hub_file: dict[str, Any] = {"address": "tcp://127.0.0.1:9", "pid": 1}

    def start(self, name: str, _command: object) -> FakeChild:
        self.started.append(FakeChild(name))
        return self.started[-1]

    def hub(self) -> list[str]:
        return []

    def learner(self, _address: str) -> list[str]:
        return []

    def actor(self, _name: str, _address: str) -> list[str]:
        return []

    def child(self, name: str) -> FakeChild:
        return next(child for child in self.started if child.name == name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    monkeypatch.setattr(module, "read_hub_file", lambda _folder: run.hub_file)
    monkeypatch.setattr(module.time, "monotonic", lambda: run.now)
    return run


def start(run: FakeRun) -> Supervisor:
    supervisor = Supervisor(run, run)  # type: ignore[arg-type]
    supervisor.tick()
    supervisor.tick()
    return supervisor


def test_nothing_starts_before_the_hub_is_ready(run: FakeRun) -> None:
    run.hub_file = {}
    supervisor = start(run)
    assert [child.name for child in run.started] == ["hub"]
    run.hub_file = {"address": "tcp://127.0.0.1:9", "pid": 2}  # written by another hub
    supervisor.tick()
    assert [child.name for child in run.started] == ["hub"]
    run.hub_file["pid"] = 1
    supervisor.tick()
    supervisor.tick()
    assert [child.name for child in run.started] == ["hub", "learner", "actor-0", "actor-1"]


def test_a_hub_that_does_not_start_raises_deadline_exceeded(run: FakeRun) -> None:
    run.hub_file = {}
    supervisor = start(run)
    run.now = 61
    with pytest.raises(DeadlineExceeded, match="hub"):
        supervisor.tick()


def test_an_actor_restarts_after_doubling_delays_and_finally_fails(run: FakeRun) -> None:
    run.actors = 1
    supervisor = start(run)
    for crash in range(RESTARTS):
        name = "actor-0" + (f".{crash}" if crash else "")
        run.child(name).code = -9
        supervisor.tick()
        run.now += 2.0**crash - 0.1
        supervisor.tick()
        assert supervisor.slots[0].state == "restarting"
        run.now += 0.2
        supervisor.tick()
        assert supervisor.slots[0].state == "started"
    run.child(f"actor-0.{RESTARTS}").code = 1
    with pytest.raises(RunFailed, match="no actor is left; .* not started again after 5 restarts: end of its log"):
        supervisor.tick()


def test_an_actor_that_ends_with_a_user_error_restarts_only_once(run: FakeRun) -> None:
    run.actors = 1
    supervisor = start(run)
    run.child("actor-0").code = 2
    supervisor.tick()
    run.now += 1.1
    supervisor.tick()
    run.child("actor-0.1").code = 2
    with pytest.raises(RunFailed, match="actor-0.1 ended with code 2, not started again after 1 restarts: end of"):
        supervisor.tick()


def test_actors_may_leave_before_the_hub_and_the_learner_end(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("actor-0").code = run.child("actor-1").code = 0
    supervisor.tick()
    assert supervisor.phase == "finishing"
    run.now += 119
    supervisor.tick()
    run.child("hub").code = 0
    supervisor.tick()
    run.child("learner").code = 0
    supervisor.tick()
    assert supervisor.done


def test_a_learner_that_continues_without_actors_has_a_deadline(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("actor-0").code = run.child("actor-1").code = 0
    supervisor.tick()
    run.now += 121
    with pytest.raises(DeadlineExceeded, match="learner"):
        supervisor.tick()


def test_hub_and_actors_have_time_to_end_after_the_learner(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("learner").code = 0
    supervisor.tick()
    assert supervisor.phase == "finishing"
    assert not supervisor.done
    run.now += LEAVING_S + 1
    assert supervisor.done


def test_a_run_is_done_as_soon_as_all_processes_have_ended_and_restarts_no_actor(run: FakeRun) -> None:
    supervisor = start(run)
    for name, code in (("hub", 0), ("learner", 0), ("actor-0", 0), ("actor-1", 1)):
        run.child(name).code = code
    supervisor.tick()
    assert supervisor.done
    assert len(run.started) == 4


def test_a_learner_that_outlives_the_hub_has_a_deadline(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("hub").code = 0
    supervisor.tick()
    assert not supervisor.done
    run.now += 121
    with pytest.raises(DeadlineExceeded, match="learner"):
        supervisor.tick()


def test_a_crash_of_the_hub_is_reported_rather_than_the_learners_failure(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("learner").code = run.child("hub").code = 1
    with pytest.raises(RunFailed, match="the hub ended"):
        supervisor.tick()


@pytest.mark.parametrize("name", ["hub", "learner"])
def test_an_error_of_hub_or_learner_ends_the_run(run: FakeRun, name: str) -> None:
    supervisor = start(run)
    run.child(name).code = 1
    with pytest.raises(RunFailed, match=f"the {name} ended with code 1: end of its log"):
        supervisor.tick()
