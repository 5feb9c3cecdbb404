"""An actor over several sessions: which refusals by the hub end it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable

import pytest

from sgpo_async.actor import run as actor_run
from sgpo_async.actor.run import Actor, ActorOptions
from sgpo_async.errors import Refusal
from sgpo_async.transport import Mailbox, MemoryRouter

NAME_TAKEN = Refusal("name is taken", final=False)


class Scripted(Actor):
    """An actor with scripted sessions: True ends the run, False ends only the session, a refusal is raised."""

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


def test_a_refusal_before_the_first_session_ends_the_actor() -> None:
    with pytest.raises(Refusal, match="taken"):
        Scripted([NAME_TAKEN, True]).run()


def test_after_a_session_a_refused_actor_tries_again() -> None:
    actor = Scripted([False, NAME_TAKEN, NAME_TAKEN, False, NAME_TAKEN, True])
    assert actor.run() == 0
    assert not actor.outcomes


def test_an_actor_gives_up_after_hub_timeout_s_without_a_session() -> None:
    with pytest.raises(Refusal, match="taken"):
        Scripted([False, NAME_TAKEN, True], hub_timeout_s=0.0).run()


def test_a_final_refusal_always_ends_the_actor() -> None:
    with pytest.raises(Refusal, match="tokenizer"):
        Scripted([False, Refusal("tokenizer", final=True), True]).run()
