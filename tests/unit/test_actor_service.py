"""An actor gives back a lease that its engine cannot serve, and no other lease."""

from types import SimpleNamespace
from typing import Any

import pytest
from rollout_support import TOKENIZER, ScriptedEngine, generated, lease

from sgpo_async.actor.service import Service
from sgpo_async.config import Run
from sgpo_async.engines.base import Failed
from sgpo_async.errors import EngineError
from sgpo_async.wire.records import Heartbeat, Lease, Ready, Release, Rollout


class ScriptedHub:
    """A mailbox that delivers the given leases once and records what the actor sends."""

    def __init__(self, *leases: Lease) -> None:
        self.dealer = SimpleNamespace(connections=1)
        self.sent: list[Any] = []
        self._leases = list(leases)

    def receive(self, timeout_s: float) -> list[Lease]:
        leases, self._leases = self._leases, []
        return leases

    def send(self, message: Any) -> bool:
        self.sent.append(message)
        return True

    def messages(self, kind: type) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]


def service_of(engine: ScriptedEngine, hub: ScriptedHub) -> Service:
    node = SimpleNamespace(poll=list)
    return Service(mailbox=hub, node=node, engine=engine, tokenizer=TOKENIZER, run=Run())  # type: ignore[arg-type]


def run_round(service: Service) -> None:
    """Run one round of the session's loop."""
    assert service.receive() is service.refresh() is None
    service.admit()
    service.generate()
    service.publish()


def test_a_failed_request_gives_its_lease_back_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    hub, engine = ScriptedHub(lease(7), lease(8)), ScriptedEngine()
    engine.events = list  # type: ignore[attr-defined]
    service = service_of(engine, hub)
    run_round(service)
    (first,) = hub.messages(Ready)
    engine.answers = [
        generated((8, 0, 0)),
        Failed(id=(7, 0, 1), error=EngineError("request (7, 0, 1): 3 servers died while it ran on them")),
    ]
    run_round(service)
    [release] = hub.messages(Release)
    assert (release.task, release.servable) == (7, False) and "3 servers died" in release.reason
    assert "task 7: request (7, 0, 1): 3 servers died" in caplog.text
    assert [(rollout.task, rollout.slot) for rollout in hub.messages(Rollout)] == [(8, 0)]
    run_round(service)
    assert [ready.tasks for ready in hub.messages(Ready)] == [first.tasks, 1]  # credit in place of the released lease
    service._beat(0.0)
    assert hub.messages(Heartbeat)[-1].tasks.tolist() == [8]


def test_a_lease_with_an_unservable_request_is_given_back_at_once() -> None:
    hub, engine = ScriptedHub(lease(7), lease(8)), ScriptedEngine()
    engine.events, engine.refuses = list, (7, 0, 1)  # type: ignore[attr-defined]
    run_round(service_of(engine, hub))
    [release] = hub.messages(Release)
    assert (release.task, release.servable) == (7, False) and "too long" in release.reason
    assert {request.id[0] for request in engine.submitted[1:]} == {8}
