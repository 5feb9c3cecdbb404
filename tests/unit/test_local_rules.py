"""The supervisor's rules with processes that are only pretended."""

from pathlib import Path
from typing import Any

import pytest

from sgpo_async.errors import DeadlineExceeded, RunFailed
from sgpo_async.local import supervisor as module
from sgpo_async.local.supervisor import LEAVING_S, RESTARTS, Supervisor


class Pretended:
    """A child whose end the test decides."""

    def __init__(self, name: str) -> None:
        self.name, self.log, self.pid = name, Path(f"{name}.log"), 1
        self.process = self
        self.code: int | None = None

    def ending(self) -> str:
        return f"ended with code {self.code}"

    def complaint(self) -> str:
        return "words of its log"


class Stage:
    """Processes, plan, clock and hub file in one."""

    actors = 2

    def __init__(self) -> None:
        self.now = 0.0
        self.folder = Path("nowhere")
        self.started: list[Pretended] = []
        self.hub_file: dict[str, Any] = {"address": "tcp://127.0.0.1:9", "pid": 1}

    def start(self, name: str, _command: object) -> Pretended:
        self.started.append(Pretended(name))
        return self.started[-1]

    def hub(self) -> list[str]:
        return []

    def learner(self, _address: str) -> list[str]:
        return []

    def actor(self, _name: str, _address: str) -> list[str]:
        return []

    def child(self, name: str) -> Pretended:
        return next(child for child in self.started if child.name == name)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(module, "read_hub_file", lambda _folder: stage.hub_file)
    monkeypatch.setattr(module.time, "monotonic", lambda: stage.now)
    return stage


def up(stage: Stage) -> Supervisor:
    supervisor = Supervisor(stage, stage)  # type: ignore[arg-type]
    supervisor.tick()
    supervisor.tick()
    return supervisor


def test_nothing_starts_before_the_hub_is_ready(stage: Stage) -> None:
    stage.hub_file = {}
    supervisor = up(stage)
    assert [child.name for child in stage.started] == ["hub"]
    stage.hub_file = {"address": "tcp://127.0.0.1:9", "pid": 2}  # of another hub
    supervisor.tick()
    assert [child.name for child in stage.started] == ["hub"]
    stage.hub_file["pid"] = 1
    supervisor.tick()
    supervisor.tick()
    assert [child.name for child in stage.started] == ["hub", "learner", "actor-0", "actor-1"]


def test_a_hub_that_does_not_start_raises_deadline_exceeded(stage: Stage) -> None:
    stage.hub_file = {}
    supervisor = up(stage)
    stage.now = 61
    with pytest.raises(DeadlineExceeded, match="hub"):
        supervisor.tick()


def test_an_actor_restarts_after_doubling_pauses_and_finally_fails(stage: Stage) -> None:
    stage.actors = 1
    supervisor = up(stage)
    for crash in range(RESTARTS):
        name = "actor-0" + (f".{crash}" if crash else "")
        stage.child(name).code = -9
        supervisor.tick()
        stage.now += 2.0**crash - 0.1
        supervisor.tick()
        assert supervisor.slots[0].state == "restarting"
        stage.now += 0.2
        supervisor.tick()
        assert supervisor.slots[0].state == "started"
    stage.child(f"actor-0.{RESTARTS}").code = 1
    with pytest.raises(RunFailed, match="no actor is left; .* not started again after 5 restarts: words of its log"):
        supervisor.tick()


def test_an_actor_that_ends_with_a_user_error_restarts_only_once(stage: Stage) -> None:
    stage.actors = 1
    supervisor = up(stage)
    stage.child("actor-0").code = 2
    supervisor.tick()
    stage.now += 1.1
    supervisor.tick()
    stage.child("actor-0.1").code = 2
    with pytest.raises(RunFailed, match="actor-0.1 ended with code 2, not started again after 1 restarts: words of"):
        supervisor.tick()


def test_actors_may_leave_before_the_hub_and_the_learner_end(stage: Stage) -> None:
    supervisor = up(stage)
    stage.child("actor-0").code = stage.child("actor-1").code = 0
    supervisor.tick()
    assert supervisor.phase == "finishing"
    stage.now += 119
    supervisor.tick()
    stage.child("hub").code = 0
    supervisor.tick()
    stage.child("learner").code = 0
    supervisor.tick()
    assert supervisor.done


def test_a_learner_that_goes_on_without_actors_has_a_deadline(stage: Stage) -> None:
    supervisor = up(stage)
    stage.child("actor-0").code = stage.child("actor-1").code = 0
    supervisor.tick()
    stage.now += 121
    with pytest.raises(DeadlineExceeded, match="learner"):
        supervisor.tick()


def test_hub_and_actors_have_time_to_end_after_the_learner(stage: Stage) -> None:
    supervisor = up(stage)
    stage.child("learner").code = 0
    supervisor.tick()
    assert supervisor.phase == "finishing"
    assert not supervisor.done
    stage.now += LEAVING_S + 1
    assert supervisor.done


def test_a_run_is_done_as_soon_as_all_processes_have_ended_and_restarts_no_actor(stage: Stage) -> None:
    supervisor = up(stage)
    for name, code in (("hub", 0), ("learner", 0), ("actor-0", 0), ("actor-1", 1)):
        stage.child(name).code = code
    supervisor.tick()
    assert supervisor.done
    assert len(stage.started) == 4


def test_a_learner_that_outlives_the_hub_has_a_deadline(stage: Stage) -> None:
    supervisor = up(stage)
    stage.child("hub").code = 0
    supervisor.tick()
    assert not supervisor.done
    stage.now += 121
    with pytest.raises(DeadlineExceeded, match="learner"):
        supervisor.tick()


def test_a_crash_of_the_hub_is_reported_rather_than_the_learners_failure(stage: Stage) -> None:
    supervisor = up(stage)
    stage.child("learner").code = stage.child("hub").code = 1
    with pytest.raises(RunFailed, match="the hub ended"):
        supervisor.tick()


@pytest.mark.parametrize("who", ["hub", "learner"])
def test_an_error_of_hub_or_learner_ends_the_run(stage: Stage, who: str) -> None:
    supervisor = up(stage)
    stage.child(who).code = 1
    with pytest.raises(RunFailed, match=f"the {who} ended with code 1: words of its log"):
        supervisor.tick()
