"""An actor's life from session to session: which refusals end it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable

import pytest

from sgpo_async.actor import run as actor_run
from sgpo_async.actor.run import Actor, ActorOptions
from sgpo_async.errors import Refusal
from sgpo_async.transport import Mailbox, MemoryRouter

TAKEN = Refusal("name is taken", final=False)


class Scripted(Actor):
    """Sessions that end as told: True, the run is over; False, the session is; or a refusal."""

    def __init__(self, outcomes: Iterable[bool | Refusal], *, hub_timeout_s: float = 60.0) -> None:
        super().__init__(ActorOptions(hub="memory", name="a", hub_timeout_s=hub_timeout_s))
        self.outcomes = list(outcomes)

    def _session(self, mailbox: Mailbox) -> bool:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Refusal):
            raise outcome
        self._served_until = time.monotonic()
        return outcome


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_run, "BACKOFF_S", (0.0,))
    monkeypatch.setattr(actor_run, "Dealer", lambda *_, **__: MemoryRouter().dealer(b"a"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)


def test_a_first_refusal_ends_the_actor() -> None:
    with pytest.raises(Refusal, match="taken"):
        Scripted([TAKEN, True]).run()


def test_after_a_session_a_refusal_is_a_matter_of_time() -> None:
    actor = Scripted([False, TAKEN, TAKEN, False, TAKEN, True])
    assert actor.run() == 0
    assert not actor.outcomes


def test_it_gives_up_when_no_session_came_for_long() -> None:
    with pytest.raises(Refusal, match="taken"):
        Scripted([False, TAKEN, True], hub_timeout_s=0.0).run()


def test_a_final_refusal_ends_it_always() -> None:
    with pytest.raises(Refusal, match="tokenizer"):
        Scripted([False, Refusal("tokenizer", final=True), True]).run()
