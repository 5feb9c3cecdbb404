"""RpcClient as futures: every one ends, by its answer, its deadline or the end of the session."""

import threading
from typing import Any

import pytest

from sgpo_async.errors import SessionError, Superseded
from sgpo_async.session import rpc_client
from sgpo_async.session.rpc_client import RpcClient


def test_an_answer_ends_its_own_future() -> None:
    sent: list[dict[str, Any]] = []
    asked = RpcClient(sent.append)
    first = asked.ask("plan", seconds=60.0, version=1)
    second = asked.ask("open", seconds=5.0, read=tuple, group="g")
    assert [(c["what"], c["seconds"], c["arguments"]) for c in sent] == [
        ("plan", 60.0, {"version": 1}),
        ("open", 5.0, {"group": "g"}),
    ]
    asked.settle(sent[1]["id"], ["host", 1], None)
    assert second.result(0) == ("host", 1)
    assert not first.done()
    asked.settle(sent[0]["id"], None, ("Superseded", "gone"))
    with pytest.raises(Superseded, match="^gone$"):
        first.result(0)
    asked.settle(sent[0]["id"], 7, None)  # a second answer is of no use


def test_a_deadline_ends_a_future_and_a_late_answer_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    asked = RpcClient(sent.append)
    monkeypatch.setattr(rpc_client, "_GRACE_S", 0.0)
    future = asked.ask("join", seconds=0.0, group="g")
    patient = asked.ask("pull", seconds=60.0, version=1)
    asked.expire()
    with pytest.raises(SessionError, match="g: join: no answer from the link"):
        future.result(0)
    asked.settle(sent[0]["id"], None, None)
    assert not patient.done()


def test_the_end_of_the_session_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = RpcClient(lambda _: None)
    before = asked.ask("plan", seconds=60.0, version=3)
    asked.end("node of a-1: killed")
    after = asked.ask("join", seconds=60.0, group="g")
    for future, what in ((before, "3: plan"), (after, "g: join")):
        with pytest.raises(SessionError, match=f"{what}: node of a-1: killed"):
            future.result(0)


def test_any_thread_may_ask() -> None:
    sent: list[dict[str, Any]] = []
    asked = RpcClient(sent.append)
    futures: list[Any] = []
    threads = [
        threading.Thread(target=lambda: futures.append(asked.ask("plan", seconds=60.0, version=1))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len({command["id"] for command in sent}) == 20
    for command in sent:
        asked.settle(command["id"], command["id"], None)
    assert sorted(f.result(0) for f in futures) == sorted(c["id"] for c in sent)
