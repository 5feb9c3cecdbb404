"""The hub as a real process with real sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sgpo_async.transport import Dealer, Mailbox
from sgpo_async.transport.token import token_of
from sgpo_async.wire import records as wire

pytestmark = pytest.mark.process
START_S = 120.0

PROGRAM = """
import sys
from dataclasses import replace
from sgpo_async.config import Hub, Run, Tasks
from sgpo_async.errors import SgpoError
from sgpo_async.hub import serve

folder, address = sys.argv[1:]
assert "torch" not in sys.modules
try:
    status = serve(Run(out=folder, hub=Hub(address=address), tasks=Tasks(held_out=2)))
except SgpoError as error:
    print(error)
    status = 3
assert "torch" not in sys.modules
sys.exit(status)
"""


class Hub:
    def __init__(self, folder: Path, address: str = "tcp://127.0.0.1:0") -> None:
        command = [sys.executable, "-c", PROGRAM, str(folder), address]
        self.file = folder / "run" / "hub.json"
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def contact(self) -> dict:
        """Wait for hub.json, which the hub writes when it accepts connections; return its content."""
        deadline = time.monotonic() + START_S
        while not self.file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        return json.loads(self.file.read_text())

    def kill(self) -> int:
        self.process.kill()
        return self.process.wait()


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path)
    yield hub
    hub.kill()


def ask(mailbox: Mailbox, message: wire.Message, kind: type):
    mailbox.send(message)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for answer in mailbox.receive(0.1):
            if isinstance(answer, kind):
                return answer
    raise AssertionError(f"no {kind.__name__}")


def connect(address: str) -> Mailbox:
    return Mailbox(Dealer(address, max_bytes=2**20))


def test_the_hub_writes_its_address_answers_survives_garbage_and_removes_its_files(hub):
    contact = hub.contact()
    assert contact["pid"] == hub.process.pid and Path(contact["store"]).exists()
    observer = connect(contact["address"])
    for size in (0, 10, 1000):
        observer.dealer.send([os.urandom(size)])
    deadline = time.monotonic() + START_S
    while ask(observer, wire.StatusRequest(), wire.Status).status["rejected"] < 3:
        assert time.monotonic() < deadline
    assert ask(observer, wire.SettingsRequest(), wire.Settings).settings["tasks"]["held_out"] == 2
    learner = connect(contact["address"])
    welcome = ask(learner, wire.Hello(role="learner", name="learner-0", token=token_of(hub.file.parent)), wire.Welcome)
    assert welcome.store == contact["store"]
    learner.send(wire.Finish())
    learner.send(wire.Goodbye())
    assert hub.process.wait(START_S) == 0
    assert not hub.file.exists() and not Path(contact["store"]).exists()
    learner.close()
    observer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_hub_and_its_weight_senders(hub, number):
    """The weight sender of an actor that is just joining ends too."""
    actor = connect(hub.contact()["address"])
    ask(actor, wire.Hello(role="actor", name="a"), wire.Welcome)
    (sender,) = psutil.Process(hub.process.pid).children()
    hub.process.send_signal(number)
    assert hub.process.wait(START_S) == 128 + number
    assert not hub.file.exists()
    assert not sender.is_running()
    actor.close()


def test_a_second_hub_on_the_same_port_fails_and_names_the_address(hub, tmp_path):
    address = hub.contact()["address"]
    second = Hub(tmp_path / "second", address)
    output, _ = second.process.communicate(timeout=START_S)
    assert second.process.returncode == 3
    assert "hub.address" in output and address in output
    assert not second.file.exists()
