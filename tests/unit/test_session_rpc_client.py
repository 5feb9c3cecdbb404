"""RpcClient completes every future: by its response, its timeout or the end of the session."""

import threading
from typing import Any

import pytest

from sgpo_async.errors import SessionError, Superseded
from sgpo_async.session import rpc_client
from sgpo_async.session.rpc_client import RpcClient


def test_a_response_completes_its_own_future() -> None:
    sent: list[dict[str, Any]] = []
    client = RpcClient(sent.append)
    first = client.request("plan", seconds=60.0, version=1)
    second = client.request("open", seconds=5.0, read=tuple, group="g")
    assert [(c["method"], c["seconds"], c["arguments"]) for c in sent] == [
        ("plan", 60.0, {"version": 1}),
        ("open", 5.0, {"group": "g"}),
    ]
    client.complete(sent[1]["id"], ["host", 1], None)
    assert second.result(0) == ("host", 1)
    assert not first.done()
    client.complete(sent[0]["id"], None, ("Superseded", "gone"))
    with pytest.raises(Superseded, match="^gone$"):
        first.result(0)
    client.complete(sent[0]["id"], 7, None)  # a second response is ignored


def test_a_timeout_fails_the_future_and_a_late_response_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    client = RpcClient(sent.append)
    monkeypatch.setattr(rpc_client, "_GRACE_S", 0.0)
    future = client.request("join", seconds=0.0, group="g")
    still_pending = client.request("pull", seconds=60.0, version=1)
    client.expire()
    with pytest.raises(SessionError, match="^g: join: the weight sender did not respond in time$"):
        future.result(0)
    client.complete(sent[0]["id"], None, None)
    assert not still_pending.done()


def test_the_end_of_the_session_fails_pending_and_later_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    client = RpcClient(lambda _: None)
    pending = client.request("plan", seconds=60.0, version=3)
    client.end("weight receiver of a-1: killed")
    later = client.request("join", seconds=60.0, group="g")
    for future, subject in ((pending, "3: plan"), (later, "g: join")):
        with pytest.raises(SessionError, match=f"{subject}: weight receiver of a-1: killed"):
            future.result(0)


def test_any_thread_may_send_requests() -> None:
    sent: list[dict[str, Any]] = []
    client = RpcClient(sent.append)
    futures: list[Any] = []

    def send() -> None:
        futures.append(client.request("plan", seconds=60.0, version=1))

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len({command["id"] for command in sent}) == 20
    for command in sent:
        client.complete(command["id"], command["id"], None)
    assert sorted(f.result(0) for f in futures) == sorted(c["id"] for c in sent)
