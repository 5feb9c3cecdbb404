"""A child process and its parent, without Torch: the protocol, and how and why the child ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from sgpo_async.session.parent_side import Child
from sgpo_async.session.settings import Settings

pytestmark = pytest.mark.process

PATIENCE_S = 150.0
Start = Callable[[str], Child]

HANG = "import ctypes; ctypes.CDLL(None).pause()"  # hangs inside a library call, like a rendezvous


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a child whose body is the given code."""
    children: list[Child] = []
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', Path.cwd())}")

    def start(body: str) -> Child:
        lines = textwrap.indent(textwrap.dedent(body).strip(), "    ")
        (tmp_path / "dummy_child.py").write_text(
            "import os, time\n"
            "from sgpo_async.errors import SessionError\n"
            "from sgpo_async.session.child_side import run_child\n"
            f"def body(settings, child):\n{lines}\n"
            "run_child('dummy', body)\n"
        )
        children.append(Child("dummy_child", Settings("a-1", os.getpid()), role="dummy"))
        return children[-1]

    yield start
    for child in children:
        child.stop()


def next_events(child: Child) -> list[dict[str, Any]]:
    """Wait until the child has events, and return them."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        connection.wait([child], deadline - time.monotonic())
        events = child.poll()
        if events:
            return events
    raise AssertionError(f"no event within {PATIENCE_S} s")


def gone(pid: int) -> bool:
    """Return whether a process ends in time; a zombie has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_only_the_protocol_writes_to_standard_output(start: Start) -> None:
    child = start("""
        print("stray")
        os.system("echo stray")
        os.write(1, b"stray")
        child.emit("hello", value=1)
        child.down("a\\nb")
    """)
    events = []
    while not events or events[-1]["event"] != "down":
        events += next_events(child)
    assert events == [{"event": "hello", "value": 1}, {"event": "down", "reason": "dummy of a-1: a b"}]
    assert child.poll() == []


def test_commands_arrive_in_order(start: Start) -> None:
    child = start("""
        for _ in range(3):
            child.emit("echo", **child.commands.get())
        child.down("done")
    """)
    for n in range(3):
        child.send({"n": n})
    events = []
    while not events or events[-1]["event"] != "down":
        events += next_events(child)
    assert [e.get("n") for e in events] == [0, 1, 2, None]
    child.send({"n": 3})  # sending to a dead child raises no error


@pytest.mark.parametrize("how", ["exit", "error", "internal", "kill"])
def test_the_last_event_gives_the_reason_of_the_end(start: Start, how: str) -> None:
    body, reason = {
        "exit": ("os._exit(3)", "dummy of a-1: exited with code 3"),
        "error": ("raise SessionError('listen: no')", "dummy of a-1: listen: no"),
        "internal": ("assert 1 == 2", "dummy of a-1: internal error: AssertionError()"),
        "kill": ("os.kill(os.getpid(), 9)", "dummy of a-1: killed by SIGKILL"),
    }[how]
    child = start(body)
    assert next_events(child) == [{"event": "down", "reason": reason}]
    assert child.poll() == []


def test_a_phase_that_hangs_in_a_library_ends_at_its_deadline(start: Start) -> None:
    child = start(f"""
        with child.phase("rendezvous", 0.5):
            {HANG}
    """)
    assert next_events(child) == [{"event": "down", "reason": "dummy of a-1: rendezvous: not done within 0.5 s"}]


def test_the_error_of_a_failed_phase_names_it(start: Start) -> None:
    child = start("""
        with child.phase("listen", 30):
            raise RuntimeError("no\\nport")
    """)
    assert next_events(child) == [{"event": "down", "reason": "dummy of a-1: listen: no port"}]


def test_a_child_ignores_sigint_but_not_sigterm(start: Start) -> None:
    child = start("""
        child.emit("ready")
        while True:
            child.emit("echo", **child.commands.get())
    """)
    next_events(child)
    os.kill(child.pid, signal.SIGINT)
    child.send({"n": 1})
    assert next_events(child) == [{"event": "echo", "n": 1}]
    os.kill(child.pid, signal.SIGTERM)
    assert next_events(child) == [{"event": "down", "reason": "dummy of a-1: killed by SIGTERM"}]


def test_stop_ends_a_child_that_sigstop_has_stopped(start: Start) -> None:
    child = start(f"child.emit('ready'); {HANG}")
    next_events(child)
    os.kill(child.pid, signal.SIGSTOP)
    child.stop()
    assert gone(child.pid)
    assert child.poll() == []
    child.stop()


PARENT = """
import os, select, sys, time
from sgpo_async.session.parent_side import Child
from sgpo_async.session.settings import Settings
child = Child("dummy_child", Settings("a-1", os.getpid()), role="dummy")
select.select([child], [], [])
assert child.poll() == [{"event": "ready"}]
if sys.argv[1] == "fork" and os.fork() == 0:
    time.sleep(600)  # keeps the pipes open after the parent has ended
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("pipes", ["closed", "fork"])
def test_a_child_does_not_outlive_its_parent(start: Start, pipes: str) -> None:
    start(f"child.emit('ready'); {HANG}").stop()  # writes the module dummy_child, which the script below uses
    command = [sys.executable, "-c", PARENT, pipes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        grandchildren = psutil.Process(parent.pid).children()
        parent.kill()
        try:
            assert gone(pid)
        finally:
            for process in grandchildren:
                if process.is_running():
                    process.kill()
