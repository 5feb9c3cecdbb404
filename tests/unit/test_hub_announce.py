"""The hub logs who joins and leaves, why, and how many actors there are; and the end of the run."""

import json
import logging
from collections.abc import Iterator

import pytest
from hub_support import Driver, make_rollout, make_run, train_one_step

from sgpo_async import logs
from sgpo_async.hub import events as ev
from sgpo_async.hub.announce import Announcer
from sgpo_async.hub.events import Effect, Event, Shutdown, Tick
from sgpo_async.wire import records as wire


class Announced(Driver):
    """A driver whose events an announcer follows, as in the hub's loop."""

    def __init__(self, **settings: int) -> None:
        super().__init__(make_run(**settings))
        self.announcer = Announcer(self.core)

    def handle(self, event: Event) -> list[Effect]:
        effects = super().handle(event)
        self.announcer.look([event], effects)
        for effect in effects:
            if isinstance(effect, Shutdown):
                self.announcer.ended(effect.reason)
        return effects


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="sgpo_async"):
        yield


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines since the last call."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_joins_and_leaves_are_logged_with_names_and_the_number_of_actors(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.actor(b"a")
    hub.actor(b"b")
    assert told(caplog) == ["a has joined; actors: 1", "b has joined; actors: 2"]
    hub.send(b"a", wire.Goodbye(reason="stopped"))
    assert told(caplog) == ["a has left: stopped; actors: 1"]
    hub.actor(b"c")
    hub.send(b"b", wire.Goodbye())
    assert told(caplog) == ["c has joined; actors: 2", "b has left: it said goodbye; actors: 1"]


def test_rollouts_and_heartbeats_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.learner()
    hub.actor(b"a", credit=3)
    told(caplog)
    train_one_step(hub)
    hub.send(b"a", wire.Heartbeat(state="serving", version=0))
    hub.advance(1.0)
    hub.send(b"a", wire.StatusRequest())
    assert told(caplog) == []


def test_a_silent_actor_leaves(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.actor(b"a")
    told(caplog)
    hub.advance(hub.run.hub.lease_timeout_s + 1)
    assert told(caplog) == ["a has left: the hub has not heard from it in time; actors: 0"]


def test_a_lost_session_and_a_return_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.actor(b"a")
    told(caplog)
    hub.handle(ev.SenderDown(b"a", "the connection was lost"))
    assert told(caplog) == ["a has lost its session: the connection was lost"]
    hub.actor(b"a")
    assert told(caplog) == ["a is back"]
    hub.handle(ev.SenderDown(b"a", "killed"))
    hub.advance(60.0)
    assert told(caplog) == ["a has lost its session: killed", "a has left: the session ended: killed; actors: 0"]


def test_a_quarantined_actor_leaves(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.learner()
    hub.actor(b"a", credit=9)
    told(caplog)
    for lease in hub.leases(b"a")[:3]:
        hub.send(b"a", make_rollout(lease, 0, versions=(7,)))
    (line,) = [line for line in told(caplog) if line.startswith("a has left")]
    assert line == (
        "a has left: quarantined after 3 invalid messages, the last one: tokens have a version that does not exist "
        "yet; actors: 0"
    )


def test_an_actor_that_was_refused_or_expelled_leaves_for_that_reason(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced(max_leases=2)
    hub.actor(b"a")
    hub.actor(b"b")
    told(caplog)
    hub.send(b"a", wire.Ready(tasks=3, version=0))
    (line,) = told(caplog)
    assert line.startswith("a has left: a has 0 leases and asks for 3, but hub.max_leases is 2")
    hub.handle(ev.Expelled(b"b", "the key node-1 was revoked"))
    assert "b has left: the key node-1 was revoked; actors: 0" in told(caplog)


def test_the_reason_of_an_absence_is_forgotten_at_the_return(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.actor(b"a")
    hub.handle(ev.Disconnected(b"a"))
    hub.actor(b"a")
    told(caplog)
    hub.advance(hub.run.hub.lease_timeout_s + 1)
    assert told(caplog) == ["a has left: the hub has not heard from it in time; actors: 0"]
    hub.actor(b"a")
    hub.handle(ev.Disconnected(b"a"))
    hub.advance(60.0)
    assert told(caplog)[-1] == "a has left: its connection was closed; actors: 0"


def test_a_reason_of_an_actor_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.actor(b"a")
    told(caplog)
    hub.send(b"a", wire.Goodbye(reason="\x1b[2J\n" + "x" * 2**20))
    (line,) = told(caplog)
    assert line.startswith("a has left: \\x1b[2J\\nxxx") and line.isprintable() and len(line) < 400


def test_strangers_leave_nothing_behind() -> None:
    hub = Announced()
    kept = [own for own in vars(hub.announcer).values() if isinstance(own, set | dict)]
    for number in range(100):
        hub.send(b"stranger %d" % number, wire.Goodbye(reason="x"))
        hub.handle(ev.Disconnected(b"stranger %d" % number))
        hub.handle(ev.SenderDown(b"stranger %d" % number, "x"))
    assert not any(kept)


@pytest.mark.parametrize(("ranks", "text"), [(1, "1 rank"), (2, "2 ranks")])
def test_the_learner_joins_once_all_its_ranks_are_there(
    caplog: pytest.LogCaptureFixture, ranks: int, text: str
) -> None:
    hub = Announced()
    hub.learner(ranks=ranks)
    assert told(caplog) == [f"the learner has joined with {text}"]
    hub.send(b"r0", wire.Goodbye())
    assert told(caplog) == ["learner rank 0 has left"]


def test_the_end_is_logged_with_the_step_and_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced(steps=5)
    hub.learner()
    hub.actor(b"a", credit=3)
    train_one_step(hub)
    told(caplog)
    hub.handle(ev.Interrupted("the hub received SIGTERM"))
    hub.advance(60.0)
    hub.handle(Tick())
    assert told(caplog)[-1] == "the run has ended at step 1 of 5: the hub received SIGTERM"


def test_what_a_restarted_hub_knows_already_is_not_announced(caplog: pytest.LogCaptureFixture) -> None:
    hub = Announced()
    hub.learner()
    hub.actor(b"a")
    told(caplog)
    hub.announcer = Announcer(hub.core)
    hub.handle(ev.HubRestarted())
    hub.advance(1.0)
    assert told(caplog) == []


def test_the_json_format_has_the_names_and_numbers_as_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = logging.getLogger("sgpo_async")
    handlers, level = package.handlers, package.level
    monkeypatch.setenv(logs.FORMAT, "json")
    try:
        logs.set_up("hub")
        hub = Announced()
        hub.learner(ranks=2)
        hub.actor(b"a")
    finally:
        package.handlers = handlers
        package.setLevel(level)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["event"], first["learner_ranks"]) == ("joined", 2)
    assert (second["event"], second["actor"], second["actors"]) == ("joined", "a", 1)
    assert second["message"] == "a has joined; actors: 1" and second["role"] == "hub"
