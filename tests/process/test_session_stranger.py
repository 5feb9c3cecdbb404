"""Strangers at the ports of a session get neither code nor weights; what they send costs a session at most."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from test_session_rpc import PATIENCE_S, Session, listening, model, wait_for

from sgpo_async.session import Deadlines, ReceiverDown, SenderDown, SenderUp, WeightReceiver

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STRANGER = Path(__file__).with_name("rpc_stranger.py")


@pytest.fixture
def make() -> Iterator[Callable[..., Session]]:
    sessions = []

    def make(**deadlines: float) -> Session:
        sessions.append(Session(Deadlines(**deadlines)))
        sessions[-1].writer.publish(0, model(0))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_stranger_who_comes_to_the_rendezvous_first_runs_no_code(
    make: Callable[..., Session], tmp_path: Path
) -> None:
    session = make()
    up = wait_for(session.sender, SenderUp)
    with subprocess.Popen([sys.executable, str(STRANGER), str(up.port), str(tmp_path)]) as stranger:
        try:
            until((tmp_path / "tried").exists, "the stranger's attempt")
            until(lambda: connections(session.sender.pid, up.port) >= 2, "the stranger's connection")
            assert listening_ports(session.sender.pid) == {up.port}, "Torch RPC waits for the real receiver"
            session.receiver.connect("127.0.0.1", up.port, up.secret)
            session.arrives(0)
            assert listening(session.sender.pid) == set()
            session.writer.publish(1, model(1))
            session.arrives(1)
            assert not (tmp_path / "made").exists() and stranger.poll() is None
        finally:
            stranger.kill()


def connections(pid: int, port: int) -> int:
    """How many connections this process has accepted at this port, its own one to itself included."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in found)


def listening_ports(pid: int) -> set[int]:
    found = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}


def test_a_receiver_with_another_secret_gets_nothing(make: Callable[..., Session]) -> None:
    session = make(join_s=10.0)
    up = wait_for(session.sender, SenderUp)
    session.receiver.connect("127.0.0.1", up.port, bytes(len(up.secret)))
    assert "rendezvous with the weight receiver: not done within 10 s" in wait_for(session.sender, SenderDown).reason
    assert "rendezvous with the weight sender" in wait_for(session.receiver, ReceiverDown).reason


def test_a_stranger_who_destroys_the_rendezvous_costs_one_session(make: Callable[..., Session]) -> None:
    session = make(join_s=20.0)
    up = wait_for(session.sender, SenderUp)
    store = dist.TCPStore("127.0.0.1", up.port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    session.receiver.connect("127.0.0.1", up.port, up.secret)
    spoil = time.monotonic() + PATIENCE_S
    down: list[object] = []
    while not down and time.monotonic() < spoil:
        for key in stored(store):
            spoil_key(store, key)
        down = [
            e for h in (session.sender, session.receiver) for e in h.poll() if isinstance(e, SenderDown | ReceiverDown)
        ]
    assert down, "the session goes on"
    again = make()
    again.connect()
    again.arrives(0)


def stored(store: dist.TCPStore) -> list[str]:
    """The keys in the store; none if it has gone."""
    try:
        return store.list_keys()
    except RuntimeError:
        return []


def spoil_key(store: dist.TCPStore, key: str) -> None:
    try:
        store.set(key, "a stranger's")
    except RuntimeError:
        return


def test_the_secret_is_on_no_command_line(make: Callable[..., Session]) -> None:
    session = make()
    up = wait_for(session.sender, SenderUp)
    session.receiver.connect("127.0.0.1", up.port, up.secret)
    session.arrives(0)
    for pid in (session.sender.pid, session.receiver.pid):
        process = psutil.Process(pid)
        assert up.secret.hex() not in " ".join([*process.cmdline(), *process.environ().values()])
    assert up.secret.hex() not in repr(up)


PEER = """
import os, sys
from pathlib import Path
os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from sgpo_async.errors import SessionError
from sgpo_async.session import calls
from sgpo_async.session.rpc_world import RpcWorld
from sgpo_async.session.settings import Deadlines
from sgpo_async.session.messages import Request
import base64, pickle
from torch.distributed import rpc
from torch._C._distributed_rpc import _invoke_rpc_builtin
port, secret, made = int(sys.argv[1]), bytes.fromhex(sys.stdin.readline()), sys.argv[2]
class Bomb:
    def __reduce__(self):
        return os.mkdir, (made,)
world = RpcWorld("weight_receiver", Deadlines(), secret=secret, from_peer=calls.FROM_PEER)
world.reach("127.0.0.1", port)
world.join()
for function, argument in ((os.mkdir, made), (calls.announce, Bomb())):
    try:
        world.call(function, argument)
    except SessionError as error:
        assert "mkdir is not allowed in a message" in str(error), error
    else:
        raise AssertionError(function)
job = base64.b64encode(pickle.dumps((os.mkdir, (made,), {}))).decode()
world.call(calls.submit, Request(1, "compute", 60.0, {"version": 0, "job": job}))
response = calls.callee.inbox.get(timeout=60.0)
while getattr(response, "id", None) != 1:
    response = calls.callee.inbox.get(timeout=60.0)
assert "mkdir is not allowed" in response.error[1], response
try:
    _invoke_rpc_builtin(rpc.get_worker_info("weight_sender"), "aten::from_file", 60.0, "/etc/hostname", False, 1).wait()
except RuntimeError as error:
    assert "aten::from_file is not allowed in a session" in str(error), error
else:
    raise AssertionError("from_file")
assert world.call(calls.manifest)
print("the session goes on", flush=True)
os._exit(0)
"""


def test_even_a_peer_that_knows_the_secret_runs_no_code(make: Callable[..., Session], tmp_path: Path) -> None:
    session = make()
    up = wait_for(session.sender, SenderUp)
    done = subprocess.run(
        [sys.executable, "-c", PEER, str(up.port), str(tmp_path / "made")],
        input=up.secret.hex() + "\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout == "the session goes on\n", done.stderr[-3000:]
    assert not (tmp_path / "made").exists()


def test_a_process_that_takes_the_senders_port_gets_no_receiver(tmp_path: Path) -> None:
    """The weight sender has died, and a stranger listens at its port: no secret, no session."""
    receiver = WeightReceiver("a-1", store="/nowhere", deadlines=Deadlines(join_s=10.0))
    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
        receiver.connect("127.0.0.1", store.port, b"s" * 32)
        until(lambda: len(stored(store)) > 1, "the receiver's first value")
        reason = wait_for(receiver, ReceiverDown).reason
        assert "rendezvous with the weight sender" in reason and "not done within 10 s" in reason
    finally:
        receiver.stop()
