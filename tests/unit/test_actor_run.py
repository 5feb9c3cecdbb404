"""An actor's life from session to session: which refusals end it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from typing import Any

import pytest

from sgpo_async.actor import run as actor_run
from sgpo_async.actor.run import Actor, ActorOptions
from sgpo_async.cli.main import main
from sgpo_async.config.schema import Engine, Run, Sglang
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


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, Sglang(servers=3, tp=2)),
        ({"servers": 1, "tp": 8}, Sglang(servers=1, tp=8)),
        ({"tp": 4}, Sglang(servers=3, tp=4)),
        ({"sglang_urls": ("http://a:1",)}, Sglang(servers=3, tp=2, urls=["http://a:1"])),
    ],
)
def test_a_node_has_its_own_servers(own: dict[str, Any], expected: Sglang) -> None:
    run = Run(engine=Engine(kind="sglang", slots=9, sglang=Sglang(servers=3, tp=2)))
    node = Actor(ActorOptions(hub="memory", **own))._with_own_options(run)
    assert node.engine == Engine(kind="sglang", slots=9, sglang=expected)


def test_a_node_that_launches_servers_does_not_attach_to_those_of_the_run() -> None:
    run = Run(engine=Engine(kind="sglang", sglang=Sglang(urls=["http://a:1"], tp=2)))
    node = Actor(ActorOptions(hub="memory", servers=2))._with_own_options(run)
    assert node.engine.sglang == Sglang(servers=2, tp=2)


def test_the_command_line_reaches_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ActorOptions] = []
    monkeypatch.setattr(actor_run, "Actor", lambda options: given.append(options) or Scripted([True]))
    assert main(["actor", "--hub", "tcp://127.0.0.1:1", "--slots", "5", "--servers", "2", "--tp", "4"]) == 0
    assert given == [ActorOptions(hub="tcp://127.0.0.1:1", slots=5, servers=2, tp=4)]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--servers", "-1"], "--servers must be >= 0"),
        (["--tp", "-1"], "--tp must be >= 0"),
        (["--servers", "1", "--sglang-url", "http://a:1"], "--servers must not be given with --sglang-url"),
    ],
)
def test_options_that_make_no_sense_end_the_command(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["actor", "--hub", "tcp://127.0.0.1:1", *words]) == 2
    assert error in capsys.readouterr().err
