"""The rules of restarts and of the supervisor, with fake child processes and a fake clock."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sgpo_async.cli.local import LocalCommandLines
from sgpo_async.config import load
from sgpo_async.errors import ConfigError, DeadlineExceeded, RunFailed
from sgpo_async.local import children, hub_process, supervisor
from sgpo_async.local.children import Processes
from sgpo_async.local.hub_process import HUB_START_S, kept_hub
from sgpo_async.local.restarts import LIMIT, WINDOW_S, Restarts
from sgpo_async.local.supervisor import LAST_S, LEAVING_S, MAY_PASS, Supervisor


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
    batch_timeout_s = 700.0

    def __init__(self) -> None:
        self.now = 0.0
        self.folder = Path("nowhere")
        self.trained = False  # the learner has written its summary
        self.started: list[FakeChild] = []
        self.hub_addresses: list[str] = []
        self.hub_file: dict[str, Any] = {"address": "tcp://127.0.0.1:9", "pid": 1}

    def start(self, name: str, _command: object) -> FakeChild:
        self.started.append(FakeChild(name))
        return self.started[-1]

    def hub(self, address: str) -> list[str]:
        self.hub_addresses.append(address)
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
    monkeypatch.setattr(hub_process, "read_hub_file", lambda _folder: run.hub_file)
    monkeypatch.setattr(supervisor, "summary_written", lambda _folder, _since: run.trained)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: run.now)
    return run


def test_pauses_double_and_the_next_crash_within_the_window_is_final() -> None:
    restarts = Restarts()
    pauses = [restarts.pause_after_crash(number) for number in range(LIMIT + 1)]
    assert pauses == [1, 2, 4, 8, 16, None]
    assert restarts.crashes == LIMIT + 1


def test_a_process_whose_lives_are_long_is_started_again_for_ever() -> None:
    restarts = Restarts()
    life = WINDOW_S / LIMIT
    pauses = [restarts.pause_after_crash(number * life) for number in range(100)]
    assert pauses[:LIMIT] == [1, 2, 4, 8, 16] and set(pauses[LIMIT:]) == {16}
    assert restarts.pause_after_crash(101 * life + WINDOW_S) == 1, "a quiet window forgets them"


def test_short_lives_after_long_ones_are_final() -> None:
    restarts = Restarts()
    for number in range(9):
        assert restarts.pause_after_crash(number * WINDOW_S) == 1
    assert [restarts.pause_after_crash(8 * WINDOW_S + number) for number in range(1, 6)] == [2, 4, 8, 16, None]


def test_a_lower_limit_counts_the_same_crashes() -> None:
    restarts = Restarts()
    assert restarts.pause_after_crash(0) == 1
    assert restarts.pause_after_crash(1, limit=1) is None


@pytest.mark.parametrize(("seconds", "expected"), [(None, 40), ("270", 280)])
def test_a_learner_that_is_stopped_has_longer_than_torchrun_gives_its_ranks(
    seconds: str | None, expected: int, run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large model, a checkpoint takes longer than torchrun's default of 30 s."""
    asked: list[float] = []
    if seconds is None:
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    else:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    monkeypatch.setattr(supervisor, "_await_checkpoint", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(
        supervisor, "Processes", lambda _folder: SimpleNamespace(start=run.start, stop=lambda **_: None)
    )

    def fail(_self: Supervisor) -> None:
        raise RunFailed("the test is over")

    monkeypatch.setattr(Supervisor, "tick", fail)
    observer: Any = SimpleNamespace(close=lambda **_: None)
    with pytest.raises(RunFailed):
        supervisor.supervise(run, tmp_path, observer)  # type: ignore[arg-type]
    assert asked == [expected]


def test_a_shutdown_timeout_that_is_no_number_is_an_error_before_anything_starts(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5m")
    with pytest.raises(ConfigError, match="TORCH_ELASTIC_SHUTDOWN_TIMEOUT must be a whole number of seconds, got '5m'"):
        supervisor.supervise(run, tmp_path, cast(Any, None))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_process_that_survives_its_kill_is_logged_and_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(children, "REAP_S", 0.1)
    (tmp_path / "hub.json").write_text("{}")
    processes = Processes(tmp_path)
    processes._children += [FakeChild("learner"), FakeChild("actor-0")]  # type: ignore[list-item]
    processes.stop(grace_s=0.0)
    assert caplog.messages == ["learner, actor-0: still exist 0.1 s after SIGKILL"]
    assert processes._watchdog.returncode is not None and not (tmp_path / "hub.json").exists()


def start(run: FakeRun) -> Supervisor:
    supervisor = Supervisor(run, run)  # type: ignore[arg-type]
    supervisor.tick()
    supervisor.tick()
    return supervisor


def test_nothing_starts_before_the_hub_is_ready(run: FakeRun) -> None:
    run.hub_file = {}
    supervisor = start(run)
    assert [child.name for child in run.started] == ["hub"]
    run.hub_file = {"address": "tcp://127.0.0.1:9", "pid": 2}  # of another hub
    supervisor.tick()
    assert [child.name for child in run.started] == ["hub"]
    run.hub_file["pid"] = 1
    supervisor.tick()
    supervisor.tick()
    assert [child.name for child in run.started] == ["hub", "learner", "actor-0", "actor-1"]


def test_a_hub_that_does_not_start_raises_deadline_exceeded(run: FakeRun) -> None:
    run.hub_file = {}
    supervisor = start(run)
    run.now = HUB_START_S + 1
    with pytest.raises(DeadlineExceeded, match=r"the hub: no hub.json within 60 s"):
        supervisor.tick()


def test_an_actor_restarts_after_doubling_pauses_and_finally_fails(run: FakeRun) -> None:
    run.actors = 1
    supervisor = start(run)
    for crash in range(LIMIT):
        name = "actor-0" + (f".{crash}" if crash else "")
        run.child(name).code = -9
        supervisor.tick()
        run.now += 2.0**crash - 0.1
        supervisor.tick()
        assert supervisor.slots[0].state == "restarting"
        run.now += 0.2
        supervisor.tick()
        assert supervisor.slots[0].state == "started"
    run.child(f"actor-0.{LIMIT}").code = 1
    reason = "no actor is left; .* not started again after 5 restarts within 10 minutes: end of its log"
    with pytest.raises(RunFailed, match=reason):
        supervisor.tick()


def test_an_actor_whose_lives_did_work_is_started_again_more_often(run: FakeRun) -> None:
    run.actors = 1
    supervisor = start(run)
    for crash in range(4 * LIMIT):
        run.child("actor-0" + (f".{crash}" if crash else "")).code = -9
        supervisor.tick()
        run.now += WINDOW_S / LIMIT
        supervisor.tick()
        assert supervisor.slots[0].state == "started"


def test_the_others_go_on_when_one_actor_has_failed_for_good(run: FakeRun) -> None:
    supervisor = start(run)
    for name in ("actor-0", "actor-0.1"):
        run.child(name).code = MAY_PASS
        supervisor.tick()
        run.now += 1.1
        supervisor.tick()
    assert [slot.state for slot in supervisor.slots] == ["failed", "started"]
    run.child("actor-1").code = -9
    supervisor.tick()
    run.now += 1.1
    supervisor.tick()
    assert [slot.state for slot in supervisor.slots] == ["failed", "started"]
    assert run.started[-1].name == "actor-1.1"


def test_an_actor_whose_error_may_pass_restarts_only_once(run: FakeRun) -> None:
    run.actors = 1
    supervisor = start(run)
    run.child("actor-0").code = MAY_PASS
    supervisor.tick()
    run.now += 1.1
    supervisor.tick()
    run.child("actor-0.1").code = MAY_PASS
    with pytest.raises(RunFailed, match="actor-0.1 ended with code 3, not started again after 1 restart within"):
        supervisor.tick()


def test_a_permanent_error_of_one_actor_ends_the_run_at_once(run: FakeRun) -> None:
    """The others would find the same; the line is that of its log."""
    supervisor = start(run)
    run.child("actor-1").code = 2
    with pytest.raises(RunFailed, match="actor-1 ended with code 2: end of its log"):
        supervisor.tick()


def test_actors_may_leave_before_the_hub_and_the_learner_end(run: FakeRun) -> None:
    supervisor = start(run)
    run.trained = True
    run.child("actor-0").code = run.child("actor-1").code = 0
    supervisor.tick()
    assert supervisor.phase == "finishing"
    assert supervisor.notes == []
    run.now += LAST_S - 1
    supervisor.tick()
    run.child("hub").code = 0
    supervisor.tick()
    run.child("learner").code = 0
    supervisor.tick()
    assert supervisor.done


def test_a_learner_that_does_not_end_after_its_last_step_has_a_deadline(run: FakeRun) -> None:
    supervisor = start(run)
    run.trained = True
    supervisor.tick()
    run.now += LAST_S + 1
    with pytest.raises(DeadlineExceeded, match="learner"):
        supervisor.tick()


def test_the_user_learns_at_once_that_no_actor_is_left_and_the_run_goes_on(run: FakeRun) -> None:
    """The learner has a deadline of its own: for its batch."""
    supervisor = start(run)
    run.child("actor-0").code = 0
    supervisor.tick()
    assert supervisor.notes == ["actor-0 has left"]
    run.child("actor-1").code = 0
    supervisor.tick()
    assert supervisor.notes[1:] == [
        "actor-1 has left",
        "no actor is left: the learner waits 700 s for a batch (learner.batch_timeout_s); "
        "to go on, start one with: sgpo-async actor --hub tcp://127.0.0.1:9",
    ]
    run.now += 699
    supervisor.tick()
    assert len(supervisor.notes) == 3 and supervisor.phase != "finishing"
    run.child("learner").code = 1
    with pytest.raises(RunFailed, match="the learner ended with code 1: end of its log"):
        supervisor.tick()


def test_a_run_waits_also_if_one_actor_has_left_and_the_other_has_failed(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("actor-0").code = 0
    run.child("actor-1").code = MAY_PASS
    supervisor.tick()
    assert len(supervisor.notes) == 2, "actor-1 starts once more"
    run.now += 1.1
    supervisor.tick()
    run.child("actor-1.1").code = MAY_PASS
    supervisor.tick()
    supervisor.tick()
    assert [note.partition(":")[0] for note in supervisor.notes[3:]] == ["no actor is left"]


def test_a_learner_that_ends_between_two_looks_of_one_tick_has_not_failed(run: FakeRun) -> None:
    supervisor = start(run)

    class Ending:
        codes = iter([None])
        code = property(lambda self: next(self.codes, 0))

    supervisor._learner = Ending()  # type: ignore[assignment]
    supervisor.tick()
    assert not supervisor.done
    supervisor.tick()
    assert supervisor.phase == "finishing"


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


def test_the_address_of_a_hub_that_crashed_overrides_the_configured_one() -> None:
    config = str(Path(__file__).resolve().parents[2] / "configs" / "demo.yaml")
    plan = LocalCommandLines(load(config), [config, "hub.address=tcp://127.0.0.1:0"])
    for address, expected in (("", "tcp://127.0.0.1:0"), ("tcp://127.0.0.1:5", "tcp://127.0.0.1:5")):
        arguments = plan.hub(address)
        arguments = arguments[arguments.index("hub") + 1 :]
        assert load(arguments[0], arguments[1:]).hub.address == expected


@pytest.mark.parametrize("code", [1, -9, -11])
def test_a_hub_that_crashes_is_started_again_at_its_address(run: FakeRun, code: int) -> None:
    supervisor = start(run)
    run.hub_file = {"address": "tcp://127.0.0.1:9", "pid": 0}  # the dead hub's
    for crash in range(LIMIT):
        run.child("hub" + (f".{crash}" if crash else "")).code = code
        supervisor.tick()
        run.now += 2.0**crash - 0.1
        supervisor.tick()
        assert run.hub_addresses == [""] + crash * ["tcp://127.0.0.1:9"], "not before its pause"
        run.now += 0.2
        supervisor.tick()
        assert run.hub_addresses == [""] + (crash + 1) * ["tcp://127.0.0.1:9"]
    assert supervisor.notes[0] == f"the hub ended with code {code}, starts again in 1 s (see hub.log)"
    assert [child.name for child in run.started if "hub" not in child.name] == ["learner", "actor-0", "actor-1"]
    run.child(f"hub.{LIMIT}").code = code
    with pytest.raises(RunFailed, match=f"the hub ended with code {code}, not started again after 5 restarts"):
        supervisor.tick()


def test_a_hub_that_was_started_again_must_become_ready(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("hub").code = -9
    run.hub_file = {}
    supervisor.tick()
    run.now += 1.1
    supervisor.tick()
    run.now += HUB_START_S - 1
    supervisor.tick()
    run.now += 2
    with pytest.raises(DeadlineExceeded, match=r"the hub: no hub.json"):
        supervisor.tick()


@pytest.mark.parametrize("code", [2, 143])
def test_an_error_of_the_users_and_a_signal_that_the_hub_obeyed_end_the_run(run: FakeRun, code: int) -> None:
    supervisor = start(run)
    run.child("hub").code = code
    with pytest.raises(RunFailed, match=f"the hub ended with code {code}: end of its log"):
        supervisor.tick()


def test_a_hub_that_fails_on_a_full_disk_ends_the_run_at_once(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_process, "disk_full", lambda log: str(log) == "hub.log")
    supervisor = start(run)
    run.child("hub").code = 1
    with pytest.raises(RunFailed, match="the hub ended with code 1: end of its log"):
        supervisor.tick()


@pytest.mark.parametrize("code", [0, 1, 2, -9])
def test_a_hub_that_ends_before_it_is_ready_ends_the_run(run: FakeRun, code: int) -> None:
    run.hub_file = {}
    supervisor = start(run)
    run.child("hub").code = code
    with pytest.raises(RunFailed, match=f"the hub ended with code {code}: end of its log"):
        supervisor.tick()


def test_a_hub_that_crashes_after_the_learners_end_is_not_started_again(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("learner").code = 0
    supervisor.tick()
    for name in ("hub", "actor-0", "actor-1"):
        run.child(name).code = -9
    supervisor.tick()
    assert supervisor.done and len(run.started) == 4


def test_a_learner_that_fails_while_the_hub_is_gone_fails_after_its_crash(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("learner").code = run.child("hub").code = 1
    with pytest.raises(RunFailed, match="after a crash of the hub, the learner ended with code 1: end of its log"):
        supervisor.tick()
    assert supervisor.notes == ["the hub ended with code 1, starts again in 1 s (see hub.log)"]


def test_an_error_of_the_learner_ends_the_run(run: FakeRun) -> None:
    supervisor = start(run)
    run.child("learner").code = 1
    with pytest.raises(RunFailed, match="^the learner ended with code 1: end of its log"):
        supervisor.tick()


def test_a_kept_hub_is_started_again_by_a_thread_and_its_failure_is_the_error(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_process, "TICK_S", 0.001)
    with pytest.raises(RunFailed, match="the hub ended with code 2: end of its log"):  # noqa: SIM117
        with kept_hub(run, run.hub) as address:  # type: ignore[arg-type]
            assert address == "tcp://127.0.0.1:9"
            run.child("hub").code = -9
            wait_until(lambda: run.started[-1].name == "hub.1", run)
            run.child("hub.1").code = 2
            wait_until(lambda: not any(thread.name == "kept-hub" for thread in threading.enumerate()), run)
            raise DeadlineExceeded("learner-0", "Committed", 120)
    assert run.hub_addresses == ["", "tcp://127.0.0.1:9"]


def test_a_kept_hub_that_ends_by_itself_is_no_error(run: FakeRun) -> None:
    with kept_hub(run, run.hub) as address:  # type: ignore[arg-type]
        run.child("hub").code = 0
    assert address and [child.name for child in run.started] == ["hub"]


def wait_until(what: Callable[[], bool], run: FakeRun) -> None:
    """Let the pretended clock run until it is so."""
    for _ in range(100_000):
        if what():
            return
        run.now += 0.1
        threading.Event().wait(0.001)
    raise AssertionError("waited too long")
