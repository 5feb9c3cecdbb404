"""The supervisor with real processes that crash, exit, hang or ignore signals; no process may outlive it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from run_support import PATIENCE_S, until

from sgpo_async.local.run_folder import read_hub_file

DUMMIES = Path(__file__).with_name("dummies.py")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.process


class Local:
    """A run of dummies whose supervisor is a separate process."""

    def __init__(self, folder: Path, *behaviours: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(DUMMIES), "run", str(folder), *behaviours],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def living(self) -> list[int]:
        """The ids of all living processes with this run's folder in their arguments, also watchdog and supervisor."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if str(self.folder) in (process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Local]]:
    runs: list[Local] = []

    def begin(*behaviours: str) -> Local:
        runs.append(Local(tmp_path / "run", *behaviours))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.living():
            os.kill(pid, signal.SIGKILL)


def actors_started(run: Local) -> int:
    return len(list(run.folder.glob("actor-*.pid")))


def wait_until_all_run(run: Local) -> None:
    until(lambda: (run.folder / "worker.pid").exists() and actors_started(run) >= 2, "a worker and two actors")


def assert_cleaned_up(run: Local) -> None:
    until(lambda: not run.living(), "end of all processes")
    assert not (run.folder / "hub.json").exists()


def test_a_finished_run_ends_by_itself(start: Callable[..., Local]) -> None:
    run = start("learner=short")
    code, output = run.finish()
    assert code == 0, output
    assert "stopping: False" in output
    assert_cleaned_up(run)


@pytest.mark.parametrize(("number", "expected_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_processes_even_those_that_ignore_it(
    start: Callable[..., Local], number: int, expected_code: int
) -> None:
    run = start("learner=stubborn")
    wait_until_all_run(run)
    run.process.send_signal(number)
    code, output = run.finish()
    assert code == expected_code, output
    assert_cleaned_up(run)


def test_a_signal_during_start_up_ends_everything(start: Callable[..., Local]) -> None:
    run = start("hub=silent")
    until((run.folder / "logs" / "hub.log").exists, "hub.log")
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
    assert_cleaned_up(run)


def test_a_second_signal_ends_the_run_without_waiting(start: Callable[..., Local]) -> None:
    run = start("learner=stubborn")
    wait_until_all_run(run)
    run.process.send_signal(signal.SIGINT)
    assert run.process.stdout is not None
    for line in run.process.stdout:
        if "stopping: True" in line:
            break
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
    assert_cleaned_up(run)


def test_kill_9_of_the_supervisor_leaves_no_orphan(start: Callable[..., Local]) -> None:
    run = start("learner=stubborn")
    wait_until_all_run(run)
    run.process.kill()
    assert_cleaned_up(run)


def test_a_crashed_actor_is_restarted(start: Callable[..., Local]) -> None:
    run = start("actor=crash-once", "learner=plain")
    until(lambda: actors_started(run) >= 3, "a third actor")
    run.process.send_signal(signal.SIGINT)
    _, output = run.finish()
    assert "was killed by signal 9, starts again in 1 s" in output
    assert_cleaned_up(run)


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("learner=crash", "error: the learner ended with code 1: problems.jsonl:7: has no answer"),
        ("hub=port-taken", "error: the hub ended with code 2: hub.address: tcp://127.0.0.1:1 is in use"),
        ("actor=user-error", "ended with code 2: tasks.prompt: chat, but the tokenizer has no chat template"),
    ],
)
def test_a_process_that_ends_too_early_ends_the_run_with_its_error(
    start: Callable[..., Local], behaviour: str, expected: str
) -> None:
    run = start(behaviour)
    code, output = run.finish()
    assert code == 2
    assert expected in output
    assert "starts again" not in output
    assert_cleaned_up(run)


def hubs(run: Local) -> list[psutil.Process]:
    return [process for process in map(psutil.Process, run.living()) if "hub" in process.cmdline()]


def test_a_hub_killed_from_outside_is_started_again_at_its_address(start: Callable[..., Local]) -> None:
    run = start()
    wait_until_all_run(run)
    (hub,) = hubs(run)
    hub.kill()
    until(lambda: read_hub_file(run.folder).get("pid", hub.pid) != hub.pid, "the next hub")
    (successor,) = hubs(run)
    assert successor.cmdline()[-1] == "tcp://127.0.0.1:1"
    assert len(list(run.folder.glob("actor-*.pid"))) == 2, "the actors go on"
    run.process.send_signal(signal.SIGINT)
    _, output = run.finish()
    assert "note: the hub was killed by signal 9, starts again in 1 s" in output
    assert_cleaned_up(run)


def test_actors_that_leave_are_missed_at_once_and_the_run_goes_on(start: Callable[..., Local]) -> None:
    run = start("actor=leave", "learner=plain")
    assert run.process.stdout is not None
    notes = (line for line in run.process.stdout if line.startswith("note: no actor"))
    assert "sgpo-async actor --hub tcp://127.0.0.1:1" in next(notes)
    run.process.send_signal(signal.SIGINT)
    assert run.finish()[0] == 130
    assert_cleaned_up(run)


def test_a_second_run_in_the_same_folder_is_refused(start: Callable[..., Local]) -> None:
    first = start()
    wait_until_all_run(first)
    second = start()
    code, output = second.finish()
    assert code == 2
    assert "another run writes here" in output
    assert first.process.poll() is None
    first.process.send_signal(signal.SIGINT)
    first.finish()
    assert_cleaned_up(first)
